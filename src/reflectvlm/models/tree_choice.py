"""Which kind of attention packed rows get where the setting is `auto`.

On an accelerator the kinds that are there are timed, once per process and shape of heads, on the first
packed batch: forwards and backwards, the attention function alone, with random queries, keys and values.
On a CPU a rule decides by the size of the mask. Timing would there make two equal runs choose differently
and differ in the last bit, and with it a resumed run from an unbroken one, which on a CPU is exact.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch

from reflectvlm.models.prefix import branch_mask, mask_elements
from reflectvlm.models.tree import Line, beside
from reflectvlm.models.tree_attention import Kind, sdpa, tree

PrefixAttention: TypeAlias = Literal["auto", "dense", "split", "varlen", "flex"]

DENSE_ELEMENTS = 40_000
"""Mask elements up to which dense attention is the faster one on a CPU: measured on one thread by
`benchmarks/speed/tree_attention.py`, see `benchmarks/results/tree_attention.md`."""
REPEATS = 5

log = logging.getLogger("reflectvlm")


class Heads(NamedTuple):
    """The shape of a layer's attention, for which the choice is made once."""

    query: int
    key: int
    size: int
    dtype: torch.dtype
    device: torch.device


_chosen: dict[Heads, Kind] = {}


def check_prefix_attention(wanted: str, attention: str) -> None:
    """Raises ValueError for a kind there is not, or one that the model's own attention has no place for."""
    kinds = get_args(PrefixAttention)
    if wanted not in kinds:
        raise ValueError(f"prefix_attention is {wanted!r}. It must be one of {', '.join(kinds)}.")
    if attention == "eager" and wanted not in ("auto", "dense"):
        raise ValueError(
            f"prefix_attention={wanted!r} needs attention=sdpa (the default), and the policy has "
            "attention=eager, which takes dense masks only. Change one of the two."
        )


def choose(wanted: PrefixAttention, attention: str, heads: Heads, line: Line) -> Kind:
    """The kind for this line. `attention` is what the model was loaded with."""
    check_prefix_attention(wanted, attention)
    halves = (torch.bfloat16, torch.float16)
    if wanted == "varlen" and heads.device.type != "cpu" and heads.dtype not in halves:
        raise ValueError(
            "prefix_attention='varlen' needs bfloat16 or float16 products, and the policy computes in "
            f"{str(heads.dtype).removeprefix('torch.')}. Set compute=bfloat16, or use auto or split."
        )
    if wanted != "auto":
        return wanted
    if attention == "eager":
        return "dense"
    if heads.device.type == "cpu":
        return "dense" if mask_elements(line) <= DENSE_ELEMENTS else "split"
    if heads not in _chosen:
        _chosen[heads] = fastest(timed(heads, line, accelerator_kinds(heads)), heads)
    return _chosen[heads]


def accelerator_kinds(heads: Heads) -> tuple[Kind, ...]:
    """Kinds worth a trial on this device and in this dtype."""
    half: tuple[Kind, ...] = ("varlen",) if heads.dtype in (torch.bfloat16, torch.float16) else ()
    return ("dense", "split", *half, "flex")


def fastest(seconds: Mapping[Kind, float], heads: Heads) -> Kind:
    """The kind that took the least time; tells how much longer the others took."""
    best = min(seconds, key=lambda kind: seconds[kind])
    ratios = ", ".join(f"{kind} {took / seconds[best]:.2f}" for kind, took in seconds.items())
    log.info(
        "attention of packed rows: %s, by time relative to the fastest: %s (%d heads of %d, %s)",
        best,
        ratios,
        heads.query,
        heads.size,
        str(heads.dtype).removeprefix("torch."),
    )
    return best


def timed(heads: Heads, line: Line, kinds: tuple[Kind, ...]) -> dict[Kind, float]:
    """Seconds forwards and backwards, the median of some runs, of each kind that runs."""
    found: dict[Kind, float] = {}
    for kind in kinds:
        try:
            found[kind] = _median(attention_call(kind, heads, line), heads.device)
        # A kernel that is missing, does not compile or does not fit is no error here: others are there.
        except (ValueError, RuntimeError, ImportError) as error:
            log.info("attention of packed rows: %s left out: %s", kind, str(error).split("\n")[0])
    if not found:
        raise RuntimeError(
            f"None of {', '.join(kinds)} runs on packed rows of {len(line)} tokens. Lower micro_tokens."
        )
    return found


def attention_call(kind: Kind, heads: Heads, line: Line) -> Callable[[], None]:
    """One layer's attention over the line, there and back, on random numbers."""
    generator = torch.Generator(heads.device).manual_seed(0)  # the run's own is left alone
    settings: dict[str, Any] = {"generator": generator, "device": heads.device, "dtype": heads.dtype}
    branch = torch.from_numpy(beside(line).branch)
    rows, length = branch.shape if kind == "dense" else (1, len(line))
    query, key, value = (
        torch.randn(rows, number, length, heads.size, **settings).requires_grad_()
        for number in (heads.query, heads.key, heads.key)
    )
    scaling = heads.size**-0.5
    if kind == "dense":
        mask = branch_mask(branch.to(heads.device))
        attend = functools.partial(sdpa, mask=mask, scaling=scaling)
    else:
        attend = functools.partial(tree(kind, line, heads.device), scaling=scaling)

    def call() -> None:
        with torch.enable_grad():  # the first packed batch may be scored without gradients
            out = attend(query, key, value)
            torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

    return call


def _median(call: Callable[[], None], device: torch.device) -> float:
    for _ in range(2):  # compiles, and warms caches
        call()
    seconds = []
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[REPEATS // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def heads_of(language_model: Any, dtype: torch.dtype) -> Heads:
    """Raises ValueError if a layer does not attend to all that comes before."""
    attention = language_model.layers[0].self_attn
    config = language_model.config
    for number, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind != "full_attention":
            raise ValueError(
                f"Rows that share a prompt need full attention, and layer {number} has {kind} (layer_types "
                "in the model's config). Use dataclasses.replace(policy, share_prefix=False)."
            )
    return Heads(
        query=config.num_attention_heads,
        key=config.num_key_value_heads,
        size=attention.head_dim,
        dtype=dtype,
        device=next(language_model.parameters()).device,
    )
