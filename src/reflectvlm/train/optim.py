"""The optimiser and its learning rate, as settings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reflectvlm.models.freezing import trained_rows
from reflectvlm.models.quantized import import_bitsandbytes

_LEAST_8BIT, _BLOCK = 4096, 256
"""bitsandbytes keeps the moments of smaller tensors in 32 bits, and one scale for so many in 8."""


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv 1711.05101) with warm-up and a schedule. Frozen parameters never enter it."""

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: float = 0.0
    """Share of all steps over which the rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final: float = 0.0
    """Where linear and cosine end, as a share of `lr`."""
    max_grad_norm: float = 1.0
    bits: Literal[32, 8] = 32
    """Of the two moments. 8: in blocks with a scale each (arXiv 2110.02861), a quarter of the memory; needs
    bitsandbytes. Weights and gradients stay as they are."""

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"AdamW.schedule is {self.schedule!r}. It must be constant, linear or cosine.")
        for name in ("lr", "eps", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"AdamW.{name} is {getattr(self, name)}. It must be positive.")
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"AdamW.{name} is {getattr(self, name)}. It is a share, from 0 to 1.")
        if self.bits not in (32, 8):
            raise ValueError(f"AdamW.bits is {self.bits!r}. It must be 32 or 8.")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """One group; and a second one without weight decay for parameters of which only some rows
        train (`models.freezing`), because decay would move the others too.

        Raises ValueError if nothing trains, or if moments in 8 bits cannot be had here.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        whole = [parameter for parameter in trained if trained_rows(parameter) is None]
        by_rows = [parameter for parameter in trained if trained_rows(parameter) is not None]
        groups: list[dict[str, Any]] = [{"params": whole}, {"params": by_rows, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise ValueError(
                "Nothing trains: every parameter is frozen. Leave a part out of policy.freeze_parts, or give "
                "a quantised policy adapters with policy.lora."
            )
        settings: dict[str, Any] = {
            "lr": self.lr,
            "betas": tuple(self.betas),
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }
        if self.bits == 8:
            return _in_8_bits(groups, settings)
        # one sweep over memory instead of a dozen
        return torch.optim.AdamW(groups, fused=True, **settings)

    def state_bytes(self, parameter: Tensor) -> int:
        """Memory of the moments of a parameter that trains."""
        count = parameter.numel()
        if self.bits == 32:
            return 2 * count * parameter.element_size()
        if count < _LEAST_8BIT:
            return 2 * count * 4
        return 2 * (count + 4 * -(-count // _BLOCK))

    def rate(self, step: int, total: int) -> float:
        """Learning rate of step `step` of `total`, counted from 0; a later step has that of the end."""
        warm = math.ceil(self.warmup * total)
        if step < warm:
            return self.lr * (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, total - warm))
        match self.schedule:
            case "constant":
                return self.lr
            case "linear":
                return self.lr * (1 - (1 - self.final) * done)
            case _:
                return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))


def optimizer_bits(optimizer: torch.optim.Optimizer) -> int:
    """Of its moments."""
    return 8 if type(optimizer).__module__.startswith("bitsandbytes") else 32


def _in_8_bits(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    library = import_bitsandbytes("optimizer.bits=8", "optimizer.bits=32")
    device = groups[0]["params"][0].device
    trial = nn.Parameter(torch.zeros(_LEAST_8BIT, device=device))
    trial.grad = torch.ones_like(trial)
    try:
        library.optim.AdamW8bit([trial], **settings).step()
    except Exception as error:  # boundary: a kernel that is not there shows in half a dozen ways
        raise ValueError(
            f"optimizer.bits=8: bitsandbytes {library.__version__} cannot take a step on {device.type!r}: "
            f"{error}. Set optimizer.bits=32, or install a bitsandbytes that can."
        ) from error
    made: torch.optim.Optimizer = library.optim.AdamW8bit(groups, min_8bit_size=_LEAST_8BIT, **settings)
    return made
