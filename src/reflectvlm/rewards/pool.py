"""Several workers for one function, so that several groups are scored at once.

Call number i of a `map` always goes to worker i modulo the number of workers, whichever is done first:
values come by place, and even a function that keeps something between its calls sees the same calls in
the same order every time. A worker's process starts when it is first needed; a single call needs one.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from reflectvlm.rewards.isolation import Code, Parameters, RewardError, Worker
from reflectvlm.rewards.lanes import side_by_side

_MOST = 4


class WorkerPool:
    """Example: `WorkerPool(2).map("json:loads", [{"s": "3"}, {"s": "x"}], timeout=5.0)` is `[3,
    RewardError(...)]`.
    """

    def __init__(self, size: int | None = None, *, memory_gib: float | None = None) -> None:
        if size is not None and size < 1:
            raise ValueError(
                f"The number of workers is {size}. It must be at least 1, or None for the default."
            )
        self.workers = tuple(Worker(memory_gib=memory_gib) for _ in range(size or default_size()))
        self._parameters: dict[str, Parameters] = {}
        self._asking = threading.Lock()
        self._owner = os.getpid()

    def call(self, target: str | Code, arguments: Mapping[str, Any], timeout: float) -> Any:
        """As `Worker.call`."""
        return self.map(target, [arguments], timeout)[0]

    def map(
        self, target: str | Code, calls: Sequence[Mapping[str, Any]], timeout: float, *, first: int = 0
    ) -> list[Any]:
        """A value or a `RewardError` for each of the calls, in their order; `timeout` is for one call, and
        `first` is the number of the first among calls that come one by one."""
        size = len(self.workers)
        lanes = min(size, len(calls))
        asked = [
            partial(self.workers[(first + place % lanes) % size].call, target, arguments, timeout)
            for place, arguments in enumerate(calls)
        ]
        return side_by_side(asked, lanes, stop=self.abort)

    def parameters(self, target: str | Code) -> Parameters | RewardError:
        """As `Worker.parameters`; asked once."""
        key = target if isinstance(target, str) else target.digest
        with self._asking:
            if key not in self._parameters:
                found = self.workers[0].parameters(target)
                if isinstance(found, RewardError):
                    return found
                self._parameters[key] = found
            return self._parameters[key]

    @property
    def owned(self) -> bool:
        """False in a process that was forked from the one that made it."""
        return self._owner == os.getpid()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes there are now."""
        return tuple(worker.pid for worker in self.workers if worker.pid is not None)

    def abort(self) -> None:
        """Kills what runs now; who waits for it gets a `RewardError`."""
        for worker in self.workers:
            worker.abort()

    def close(self) -> None:
        """Ends all processes and waits for them. A later call starts fresh ones."""
        for worker in self.workers:
            worker.close()


def default_size() -> int:
    """As many as there are cores for this process, at most 4: each holds what the function imports."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST, cores)


_named: dict[tuple[int, str, int | None, float | None], WorkerPool] = {}
_by_code: weakref.WeakValueDictionary[tuple[int, str, int | None, float | None], WorkerPool] = (
    weakref.WeakValueDictionary()
)
_lock = threading.Lock()


def shared_pool(target: str | Code, size: int | None = None, memory_gib: float | None = None) -> WorkerPool:
    """The pool of this function in this process, made at the first use.

    That of a function given by name stays; that of an object ends when nobody holds it any more.
    """
    with _lock:
        if isinstance(target, str):
            key = (os.getpid(), target, size, memory_gib)
            if key not in _named:
                _named[key] = WorkerPool(size, memory_gib=memory_gib)
            return _named[key]
        key = (os.getpid(), target.digest, size, memory_gib)
        pool = _by_code.get(key)
        if pool is None:
            pool = _by_code[key] = WorkerPool(size, memory_gib=memory_gib)
        return pool
