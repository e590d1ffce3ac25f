"""Matrix products on a CPU through oneDNN.

PyTorch gives float32 products to MKL, which on some processors is far behind oneDNN in the same float32
(`python benchmarks/speed/products.py` shows it for a machine). PyTorch carries both, and reaches oneDNN's
through the operator that its compiler uses.

`fast_linear` is `torch.nn.functional.linear` with that operator, forwards and backwards; inside
`fast_products()` every linear layer uses it. Which kernel is used depends on the processor and the sizes,
never on a timing, so that two equal runs on one machine are equal to the last bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LEAST = 2**21
"""Multiplications from which on oneDNN is the faster one: entering it costs some microseconds."""


@functools.cache
def available() -> bool:
    """True on processors with AVX-512, where PyTorch has oneDNN."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def product(
    left: Float[Tensor, "M K"], right: Float[Tensor, "N K"], *, fast: bool = True
) -> Float[Tensor, "M N"]:
    """left right^T, without a gradient; by PyTorch's own choice if not `fast`."""
    return _onednn(left, right) if fast and _suits(left, right) else left @ right.T


def fast_linear(
    input: Float[Tensor, "*S K"],
    weight: Float[Tensor, "*N K"],
    bias: Tensor | None = None,
) -> Float[Tensor, ...]:
    """x W^T + b; what oneDNN does not suit goes the usual way."""
    if not _suits(input, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        return cast(Tensor, _Linear.apply(bias, input, weight))
    return _onednn(input, weight, bias)


def fast_products(wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Linear layers called inside use `fast_linear`, if the processor has it and it is wanted."""
    return _Mode() if wanted and available() else contextlib.nullcontext()


def checkpoint_contexts() -> tuple[Any, Any]:
    """For gradient checkpointing: what is computed again on the way back is computed as it was before."""
    active = any(isinstance(mode, _Mode) for mode in _active_modes())
    return contextlib.nullcontext(), fast_products(active)


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if func is F.linear:
            return fast_linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """Its bias comes first, as in PyTorch's own: gradients are ready in that order, and ZeRO-2 puts them into
    its messages as they come. A process whose rows are few takes PyTorch's, and must have the same order."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
        _, to_x, to_weight = ctx.needs_input_grad
        # A frozen weight needs no inputs on the way back, and they are what takes memory.
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)
        ctx.shape, ctx.width = x.shape, len(weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, ctx.width)
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[1]:
            to_x = _onednn(grad, weight.T).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            inputs = x.reshape(-1, x.shape[-1])
            # The kernel is faster when the smaller side is the left one.
            wide = ctx.width > inputs.shape[1]
            to_weight = _onednn(inputs.T, grad.T).T if wide else _onednn(grad.T, inputs.T)
        if ctx.needs_input_grad[0]:
            to_bias = grad.sum(0)
        return to_bias, to_x, to_weight


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # A sum's gradient is one number expanded, for which oneDNN falls back to a loop.
    x, weight = (each.contiguous() if 0 in each.stride() else each for each in (x, weight))
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        available()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.dim() == 2
        and x.numel() * len(weight) >= LEAST
    )


def _active_modes() -> list[Any]:
    from torch.overrides import _get_current_function_mode_stack

    return list(_get_current_function_mode_stack())
