"""How many bytes of tensors were alive at most while something ran: what a prediction is held against.

On a GPU PyTorch counts them itself. On a CPU its profiler reports each allocation and release of its
allocator, temporary ones inside operators included; resident memory would also count libraries, Python and
what the C library has not given back. Left out: memory that PyTorch did not allocate (mapped files, NumPy),
and workspace that oneDNN allocates for itself.

Example:
    watch = Watch(held=policy.module.parameters())
    with watch:
        with watch.phase("update"):
            trainer.update(groups, 0)
    watch.peaks["update"]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

MEMORY = "[memory]"
"""The name of the profiler's events about allocations."""
_PHASE = "reflectvlm phase "


@dataclass(kw_only=True, eq=False)
class Watch:
    """The most that was alive in each phase: `held`, which was there before, and what was allocated since."""

    held: Iterable[Tensor] = ()
    peaks: dict[str, int] = field(default_factory=dict, init=False)
    """Of phases of one name the largest; on a CPU known once the watch has ended."""
    _profile: Any = field(default=None, init=False, repr=False)
    _before: int = field(default=0, init=False, repr=False)

    def __enter__(self) -> Watch:
        if not torch.cuda.is_available():
            from torch.profiler import ProfilerActivity, profile

            self._before = storage_bytes(self.held)
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is None:
            return
        self._profile.__exit__(kind, error, trace)
        if error is None:
            self._read(self._profile.profiler.kineto_results.events())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._profile is not None:
            with torch.profiler.record_function(_PHASE + name):
                yield
            return
        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()
        self._see(name, int(torch.cuda.max_memory_allocated()))

    def _read(self, events: Iterable[Any]) -> None:
        memory, phases = [], []
        for event in events:
            if event.name() == MEMORY:
                memory.append((event.start_ns(), event.nbytes()))
            elif event.name().startswith(_PHASE):
                phases.append((event.start_ns(), event.end_ns(), event.name().removeprefix(_PHASE)))
        alive, at = self._before, 0
        memory.sort(key=lambda one: one[0])
        for begin, end, name in sorted(phases):
            while at < len(memory) and memory[at][0] < begin:
                alive, at = alive + memory[at][1], at + 1
            self._see(name, alive)
            while at < len(memory) and memory[at][0] <= end:
                alive, at = alive + memory[at][1], at + 1
                self._see(name, alive)

    def _see(self, name: str, alive: int) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0), alive)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the tensors' memory, each piece once."""
    pieces = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(pieces.values())
