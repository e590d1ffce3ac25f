"""Which dtypes can be trained in.

float16 cannot: its smallest number is 6e-8, and there is no loss scaling here. As weights, AdamW's
eps of 1e-8 becomes 0 in it and the first step divides 0 by 0. As compute dtype, gradients of the
activations, which a mean over many tokens makes small, vanish without a word: on the tiny policy,
with a mean over 10,000 times as many tokens, two in five of them. bfloat16 has the range of float32.
"""

from __future__ import annotations

import torch
from torch import nn


def check_trainable_dtype(module: nn.Module, compute: str | None) -> None:
    """Raises ValueError where float16 would spoil the weights or lose the gradients."""
    trains = any(parameter.requires_grad for parameter in module.parameters())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                f"The weight {name!r} is float16, in which an optimiser's step is 0 divided by 0. Train with "
                "policy.dtype=float32, and policy.compute=bfloat16 for speed; float16 is for answering only."
            )
        if trains and compute is None and parameter.dtype == torch.float16:
            raise ValueError(
                f"The weight {name!r} is float16 and policy.compute is null, so gradients pass through "
                "float16, in which small ones vanish. Train with policy.compute=bfloat16; frozen weights may "
                "stay float16."
            )
    if compute == "float16":
        raise ValueError(
            "policy.compute is float16, in which small gradients vanish. Train with policy.compute=bfloat16, "
            "or null for that of the weights; float16 is for answering only."
        )
