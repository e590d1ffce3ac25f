"""Where work may be given up when a stop was asked for.

A rollout of a large model takes minutes, and a preempted job has seconds. So the work of a step asks
at many places whether it should go on: between two tokens, two rewards, two micro-batches. Until the
first weight changes nothing is lost by giving up: the step is taken again after the resume, with the
same rows and the same random numbers. From then on it is finished.

    loop:      with abandonable(lambda: stop.requested): trainer.step(...)
    engine:    safe_point()          before every decode step
    updater:   committed()           just before the optimiser's first step

With several processes one of them must not give up alone: the others would wait for it. There only the
parts of a step that a process does by itself can be given up (`by_itself`), and `ranks.py` tells the others.

Process-wide, as signals are. Left out: threads that do their own work; they ask like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from reflectvlm.pulse import beat


class Abandoned(BaseException):
    """The work was given up at a safe point. Like KeyboardInterrupt no `Exception`: no boundary for
    errors of users' code may swallow it."""


_asked: list[Callable[[], bool]] = []
"""What the innermost block asks; empty where nothing may be given up."""
_by_itself: list[Callable[[], bool]] = []
"""What each `abandonable` was given."""
_alone: list[bool] = []
"""One for each block of `by_itself` that is entered."""


def safe_point() -> None:
    """Raises `Abandoned` if a stop was asked for and the work so far may be given up."""
    beat()
    if _asked and _asked[-1]():
        raise Abandoned


@contextmanager
def abandonable(asked: Callable[[], bool], *, alone: bool = True) -> Iterator[None]:
    """Within the block `safe_point` gives up as soon as `asked()` is true, until `committed`. With
    `alone=False` it does so only `by_itself`."""
    depth = len(_asked)
    _asked.append(asked if alone else _never)
    _by_itself.append(asked)
    try:
        yield
    finally:
        del _asked[depth:]
        _by_itself.pop()


@contextmanager
def by_itself() -> Iterator[None]:
    """Within the block nobody waits for this process, so its work can be given up."""
    depth = len(_asked)
    _asked.append(_by_itself[-1] if _by_itself else _never)
    _alone.append(True)
    try:
        yield
    finally:
        del _asked[depth:]
        _alone.pop()


def works_by_itself() -> bool:
    """Whether what happens now happens in this process only, of several."""
    return bool(_alone)


def committed() -> None:
    """From here to the end of the block the work must be finished: weights are about to change."""
    if _asked:
        _asked[-1] = _never
    if _by_itself:
        _by_itself[-1] = _never


def _never() -> bool:
    return False
