"""Where work may be given up when a stop was asked for.

A rollout of a large model takes minutes, and a preempted job has seconds. So the work of a step asks
at many places whether it should go on: between two tokens, two rewards, two micro-batches. Until the
first weight changes nothing is lost by giving up: the step is taken again after the resume, with the
same rows and the same random numbers. From then on it is finished.

    loop:      with abandonable(lambda: stop.requested): trainer.step(...)
    engine:    safe_point()          before every decode step
    updater:   committed()           just before the optimiser's first step

Process-wide, as signals are. Left out: threads that do their own work; they ask like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Abandoned(BaseException):
    """The work was given up at a safe point. Like KeyboardInterrupt no `Exception`: no boundary for
    errors of users' code may swallow it."""


_asked: list[Callable[[], bool]] = []
"""What the innermost `abandonable` asks; empty where nothing may be given up."""


def safe_point() -> None:
    """Raises `Abandoned` if a stop was asked for and the work so far may be given up."""
    if _asked and _asked[-1]():
        raise Abandoned


@contextmanager
def abandonable(asked: Callable[[], bool]) -> Iterator[None]:
    """Within the block `safe_point` gives up as soon as `asked()` is true, until `committed`."""
    depth = len(_asked)
    _asked.append(asked)
    try:
        yield
    finally:
        del _asked[depth:]


def committed() -> None:
    """From here to the end of the block the work must be finished: weights are about to change."""
    if _asked:
        _asked[-1] = _never


def _never() -> bool:
    return False
