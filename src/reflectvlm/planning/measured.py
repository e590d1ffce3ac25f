"""How many bytes of tensors were alive at most while something ran: what a prediction is held against.

On a GPU PyTorch counts them itself. On a CPU its profiler reports each allocation and release of its
allocator, temporary ones inside operators included; resident memory would also count libraries, Python and
what the C library has not given back. Left out: memory that PyTorch did not allocate (mapped files, NumPy),
and workspace that oneDNN allocates for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MEMORY = "[memory]"
"""The name of the profiler's events about allocations."""


def peak_bytes(call: Callable[[], Any], held: Iterable[Tensor] = ()) -> int:
    """The most that was alive during `call`: `held`, which was there before, and what it allocated."""
    before = storage_bytes(held)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    return before + max(0, *timeline(call))


def timeline(call: Callable[[], Any]) -> list[int]:
    """Bytes alive on the CPU after each allocation and release, from 0."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == MEMORY)
    alive, sums = 0, [0]
    for _, change in memory:
        alive += change
        sums.append(alive)
    return sums


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the tensors' memory, each piece once."""
    pieces = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(pieces.values())
