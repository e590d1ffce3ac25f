"""A base whose linear layers are stored in 4 or 8 bits, for adapters to train on (QLoRA, arXiv 2305.14314).

    nf4     4-bit NormalFloat in blocks of 64, whose scales are quantised once more: 0.52 bytes a number
    int8    LLM.int8() (arXiv 2208.07339): rows in 8 bits, outlier columns in 16: 1 byte a number

bitsandbytes does it, through transformers. Quantised are the linear layers of the language model; vision
tower, projector, embedding and head stay as they are, because they are a small share and quality suffers
there first.

A base in int8 computes a row a little differently beside other rows, because a column is an outlier if any
row says so: engine and trainer differ by its rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

Quantize: TypeAlias = Literal["nf4", "int8"]

_SKIPPED = ("lm_head", "visual", "model.visual")
"""Modules that stay as they are, by the starts and ends of their names."""
_KINDS = ("Params4bit", "Int8Params")
"""bitsandbytes' classes of quantised weights, by name: it is no package that has to be there."""


def quantization_settings(quantize: Quantize, compute: torch.dtype) -> Any:
    """What `from_pretrained` takes as `quantization_config`. Raises ValueError for an unknown word and where
    bitsandbytes is missing."""
    if quantize not in get_args(Quantize):
        raise ValueError(f"policy.quantize is {quantize!r}. It must be 'nf4', 'int8' or null.")
    import_bitsandbytes(f"policy.quantize={quantize}", "policy.quantize=null")
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        # It says at every product that inputs are cast to float16, which is how the method works.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(_SKIPPED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=list(_SKIPPED),
    )


def import_bitsandbytes(what: str, instead: str) -> Any:
    """The package. Raises ValueError, one line, if it is missing or cannot be loaded."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            f"{what} needs bitsandbytes, which is not installed. Install the extra "
            f"`reflectvlm[bitsandbytes]`, or set {instead}."
        ) from error
    except (OSError, RuntimeError, AttributeError) as error:  # its library was built for another machine
        raise ValueError(
            f"{what} needs bitsandbytes, which is installed but cannot be loaded: {error}. Install one for "
            f"this machine, or set {instead}."
        ) from error
    return bitsandbytes


def ready_for_training(model: Any, compute: torch.dtype) -> Any:
    """What bitsandbytes would change while a model is used, so that it is the same before and after.

    On a CPU it lays 4-bit weights out anew at the first product without gradients, in a form whose products
    have none: after a rollout nothing below would train. Kept from doing so here. And it casts biases to
    the dtype of a product's inputs, back and forth, of which the first time rounds: done here at once.
    """
    for _, module in quantized_layers(model):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if module.bias is not None:
            rounded = module.bias.data.to(compute)
            module.bias.data = rounded if hasattr(module, "compute_dtype") else rounded.to(module.bias.dtype)
    return model


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer whose weight is quantised."""
    for name, module in model.named_modules():
        kind = type(getattr(module, "weight", None)).__name__
        # An adapter's layer shows its base's weight as its own.
        if kind in _KINDS and not hasattr(module, "base_layer"):
            yield name, module


def dequantized(layer: Any) -> Tensor:
    """The weight that a layer computes with, in floating point; of any linear layer."""
    if type(layer.weight).__name__ not in _KINDS:
        return layer.weight.detach()
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)).detach()


def count(parameter: Tensor) -> int:
    """Numbers that a parameter stands for: two 4-bit ones share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def stored_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter, with the scales of a quantised one."""
    own = parameter.numel() * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    scales: list[Tensor] = [] if state is None else [state.absmax]
    if state is not None and state.nested:
        scales.append(state.state2.absmax)
    if isinstance(of_rows := getattr(parameter, "SCB", None), Tensor):
        scales.append(of_rows)
    return own + sum(one.numel() * one.element_size() for one in scales)
