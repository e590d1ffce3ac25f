"""Attention kernels for segments of unequal length: flash-attn's, or the one that comes with torch.

Both take `query` [Q, H, d] and gathered `key`, `value` [K, h, d] with the limits of their segments, in
bfloat16 or float16 on a GPU, and are causal at the *lower right*: the last query of a segment sees all of
its keys. That convention is flash-attn's since 2.1, and torch does not state it; so either kernel is tried
on a small case, forwards and backwards, before it is used, and left alone if it answers something else.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

log = logging.getLogger("reflectvlm")

TOLERANCE = 0.05
"""Of the trial, relative to the largest number: bfloat16 has 8 bits, and a key seen or missed shows in the
first digit."""


class VarlenKernel(Protocol):
    def __call__(
        self,
        query: Float[Tensor, "Q H d"],
        key: Float[Tensor, "K h d"],
        value: Float[Tensor, "K h d"],
        cu_q: Int[Tensor, " c"],
        cu_k: Int[Tensor, " c"],
        max_q: int,
        max_k: int,
        scaling: float,
        /,
    ) -> Float[Tensor, "Q H d"]: ...


@functools.cache
def varlen_kernel(device: torch.device) -> VarlenKernel:
    """The first kernel that is there and passes the trial.

    Raises ValueError if there is none, with what was found wrong.
    """
    if device.type != "cuda":
        raise ValueError(
            f"prefix_attention='varlen' runs on a CUDA device, and the policy is on {str(device)!r}. "
            "Load it with prefix_attention=auto, split or dense."
        )
    found: list[str] = []
    for name, make in (("flash-attn", flash_attn_kernel), ("torch", torch_kernel)):
        kernel = make()
        if kernel is None:
            found.append(f"{name} has none")
        elif (error := trial_error(kernel, device)) <= TOLERANCE:
            return kernel
        else:
            found.append(f"{name}'s is off by {error:.3g} in a trial")
    raise ValueError(
        f"prefix_attention='varlen' finds no kernel for segments of unequal length: {', '.join(found)}. "
        "Install the extra (pip install reflectvlm[flash-attn]) or a newer torch, or load the policy with "
        "prefix_attention=auto."
    )


def flash_attn_kernel() -> VarlenKernel | None:
    if find_spec("flash_attn") is None:
        return None
    try:
        return _flash_attn(import_module("flash_attn").flash_attn_varlen_func)
    except ImportError as error:  # built for another torch: torch's own kernel may still do
        log.warning("flash-attn is installed but cannot be imported: %s", error)
        return None


def _flash_attn(function: Callable[..., Any]) -> VarlenKernel:
    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        scaling: float,
        /,
    ) -> Tensor:
        limits = (cu_q, cu_k, max_q, max_k)
        made: Tensor = function(query, key, value, *limits, softmax_scale=scaling, causal=True)
        return made

    return call


def torch_kernel() -> VarlenKernel | None:
    """torch's `varlen_attn`, if it lets key heads be shared and takes a window, as causal is written there
    (both came after its first release; by name, because torch's versions say nothing about it)."""
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return _torch_varlen(varlen_attn)


def _torch_varlen(function: Callable[..., Any]) -> VarlenKernel | None:
    if not {"window_size", "scale", "enable_gqa"} <= inspect.signature(function).parameters.keys():
        return None

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        scaling: float,
        /,
    ) -> Tensor:
        made: Tensor = function(
            query,
            key,
            value,
            cu_q,
            cu_k,
            max_q,
            max_k,
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return made

    return call


def trial_error(
    kernel: VarlenKernel, device: torch.device | str, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Largest difference from plain attention in float32, of output and gradients, relative to the largest
    value of each: two segments, one with more keys than queries; each key head serves two query heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 4, 32), (8, 2, 32), (8, 2, 32))
    values = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    cu_q, cu_k = (torch.tensor(cut, dtype=torch.int32, device=device) for cut in ((0, 3, 5), (0, 3, 8)))
    found = []
    for attend, wide in ((plain_varlen, torch.float32), (kernel, dtype)):
        with torch.enable_grad():  # wherever it is tried first
            leaves = [each.detach().to(wide, copy=True).requires_grad_() for each in values]
            query, key, value = leaves
            out = attend(query, key, value, cu_q, cu_k, 3, 5, 0.25)
            weights = torch.cos(torch.arange(out.numel(), device=device)).view_as(out)
            grads = torch.autograd.grad((out.float() * weights).sum(), leaves)
        found.append([each.detach().float() for each in (out, *grads)])
    return max(float((b - a).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True))


def plain_varlen(
    query: Float[Tensor, "Q H d"],
    key: Float[Tensor, "K h d"],
    value: Float[Tensor, "K h d"],
    cu_q: Int[Tensor, " c"],
    cu_k: Int[Tensor, " c"],
    max_q: int,  # noqa: ARG001
    max_k: int,  # noqa: ARG001
    scaling: float,
    /,
) -> Float[Tensor, "Q H d"]:
    """What a kernel must answer, a segment at a time: any device and dtype, as slow as it looks."""
    shared = query.shape[1] // key.shape[1]
    found = []
    limits = [cut.tolist() for cut in (cu_q, cu_k)]
    for (q0, q1), (k0, k1) in zip(*(pairwise(cut) for cut in limits), strict=True):
        queries = query[q0:q1]
        keys, values = (each[k0:k1].repeat_interleave(shared, 1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", queries * scaling, keys)
        hidden = torch.ones(q1 - q0, k1 - k0, device=query.device).triu(k1 - k0 - (q1 - q0) + 1).bool()
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(found)
