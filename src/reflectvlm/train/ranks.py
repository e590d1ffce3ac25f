"""The processes of a run, as seen from one of them: who they are, and how they agree.

Whoever started them (`reflectvlm train gpus=8`, torchrun, accelerate, deepspeed) says in the environment
which of how many this one is; accelerate joins them. Numbers and small objects go through a group of their
own on the CPU, so that they do not depend on a GPU that hangs.

What a process does by itself (reading rows, rollouts, rewards) runs in `together`: its result reaches all,
and an error or a wish to stop reaches all as well, so that none waits for one that has given up.
"""

from __future__ import annotations

import datetime
import functools
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from reflectvlm.interrupt import Abandoned, by_itself
from reflectvlm.pulse import LOST, TOLD, patience_minutes, waiting

T = TypeVar("T")


class LostRank(RuntimeError):
    """Another process has died or does not answer."""

    exit_code = LOST


class ElsewhereFailed(RuntimeError):
    """Another process told why it cannot go on."""

    exit_code = TOLD


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranks:
    """One process among `world`. With one, everything is the value itself.

    Example: `Ranks.joined().sum({"tokens": 12.0})`
    """

    rank: int = 0
    world: int = 1
    group: Any = None
    """Of torch.distributed, on the CPU."""

    @classmethod
    def joined(cls) -> Ranks:
        """The processes that were started together with this one."""
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is, tells of its search
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return cls() if world == 1 else _joined(world)

    @property
    def first(self) -> bool:
        """This is the one that talks and writes."""
        return self.rank == 0

    def mine(self, count: int) -> range:
        """The places of 0 to count - 1 that are this process's."""
        return range(self.rank, count, self.world)

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self.heard():
            torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def sum(self, values: Mapping[str, torch.Tensor | float]) -> dict[str, float]:
        """Each value added over ranks, in float64."""
        if not values:
            return {}
        added = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
        self._reduce(added, "SUM")
        return dict(zip(values, added.tolist(), strict=True))

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over ranks."""
        found = torch.tensor(list(values), dtype=torch.float64)
        self._reduce(found, "MAX")
        return [float(value) for value in found]

    def agree(self, wish: bool) -> bool:
        """Whether anybody wishes it."""
        return self.most([float(wish)])[0] > 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """Everybody's result of work that each does by itself. Results must be small and picklable.

        If it fails in one process, it fails in all; if one gives up, all do.
        """
        if self.world == 1:
            return [work()]
        outcome: Any = None
        error: BaseException | None = None
        try:
            with by_itself():
                outcome = work()
        except (Exception, Abandoned) as problem:  # noqa: BLE001 - told to all, and raised below
            error = problem
        told = self.gather((outcome, None if error is None else _told(error)))
        if error is not None and not isinstance(error, Abandoned):
            raise error
        for rank, (_, failed) in enumerate(told):
            if failed is not None and failed[0] != Abandoned.__name__:
                _raise_elsewhere(rank, failed)
        if any(failed is not None for _, failed in told):
            raise Abandoned
        return [result for result, _ in told]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them."""
        return self.together(lambda: make() if self.first else None)[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Until all are here."""
        self._reduce(torch.zeros(1), "SUM")

    def _reduce(self, values: torch.Tensor, how: str) -> None:
        if self.world > 1:
            with self.heard():
                operation = getattr(torch.distributed.ReduceOp, how)
                torch.distributed.all_reduce(values, op=operation, group=self.group)

    def heard(self) -> _Heard:
        """Within the block this process waits for others, and an error is that one of them is not there."""
        return _Heard(self)

    @contextmanager
    def known_lost(self) -> Iterator[None]:
        """Within the block an error of the connection is that another is not there, wherever it comes from:
        under ZeRO the layers themselves fetch weights from others."""
        try:
            yield
        except LostRank:
            raise
        except RuntimeError as error:
            if self.world > 1 and _CONNECTION.search(str(error)):
                raise _lost(self.rank, error) from error
            raise


_CONNECTION = re.compile(r"gloo|NCCL|Connection (closed|reset)|TCPStore", re.IGNORECASE)
"""What torch.distributed says when another process has gone."""


def _lost(rank: int, error: RuntimeError) -> LostRank:
    said = re.sub(r"^\[[^]]*\]\s*", "", (str(error).splitlines() or [type(error).__name__])[0])
    return LostRank(
        f"rank {rank} lost the other processes ({said.partition('. ')[0]}): one of them died or hangs. The "
        "launcher says which; resume=auto goes on from the last checkpoint."
    )


class _Heard:
    """Waits for others; what then fails is that one of them is not there."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        self._waiting = waiting()
        self._waiting.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._waiting.__exit__(kind, error, trace)
        if self.ranks.world > 1 and _of_the_network(error) and not isinstance(error, LostRank):
            assert isinstance(error, RuntimeError)
            raise _lost(self.ranks.rank, error) from error


def _of_the_network(error: BaseException | None) -> bool:
    """Gloo raises plain RuntimeErrors. Those with a type of their own, such as no memory left on a device,
    are this process's."""
    return type(error) is RuntimeError or isinstance(error, torch.distributed.DistError)


def _told(error: BaseException) -> tuple[str, str, bytes | None]:
    """An error as what can travel: its kind, its text, and itself if it can be pickled."""
    whole: bytes | None
    try:
        whole = pickle.dumps(error)
        pickle.loads(whole)  # noqa: S301 - our own bytes: some errors can be written and not read
    except Exception:  # noqa: BLE001 - any object may be inside of an error
        # What a user wrote wrong has one exit code everywhere.
        whole = pickle.dumps(ValueError(str(error))) if isinstance(error, ValueError) else None
    return type(error).__name__, str(error), whole


def _raise_elsewhere(rank: int, problem: tuple[str, str, bytes | None]) -> None:
    kind, text, whole = problem
    if whole is not None:
        error = pickle.loads(whole)  # noqa: S301 - from a process of this run
        if isinstance(error, ValueError):
            raise error
    raise ElsewhereFailed(f"rank {rank} failed: {kind}: {text}")


@functools.cache
def _joined(world: int) -> Ranks:
    """Joins once per process."""
    from accelerate import PartialState

    patience = datetime.timedelta(minutes=patience_minutes())
    state = PartialState(cpu=not _on_cuda(), timeout=patience)
    assert state.num_processes == world, f"{state.num_processes} processes joined, WORLD_SIZE is {world}"
    group = torch.distributed.new_group(backend="gloo", timeout=patience)
    return Ranks(rank=state.process_index, world=world, group=group)


@contextmanager
def leaving() -> Iterator[None]:
    """Ends behind the block what `Ranks.joined` began in it, once all are here; nothing for one process.

    A process that just exits does so while gloo's threads run on; one was seen to be aborted then (SIGABRT),
    when all its work was done. After an error none waits for the others, and NCCL, whose end needs them, is
    left to the exit. Raises: LostRank.
    """
    try:
        yield
    except BaseException:
        if not _on_cuda():
            _leave()
        raise
    if _joined.cache_info().currsize:
        _joined(int(os.environ["WORLD_SIZE"])).barrier()
        _leave()


def _on_cuda() -> bool:
    return torch.cuda.is_available() and os.environ.get("REFLECTVLM_CPU") != "1"


def _leave() -> None:
    _joined.cache_clear()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
