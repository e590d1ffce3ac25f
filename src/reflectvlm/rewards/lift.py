"""`per_rollout`: a function of one rollout becomes a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from reflectvlm.types import Rollout


@dataclass(frozen=True)
class PerRollout:
    """See `per_rollout`."""

    function: Callable[[Rollout], float]
    rowwise: ClassVar[bool] = True
    """The rubric asks rowwise rewards about one rollout at a time, so one failure costs one rollout."""

    def __call__(self, group: Sequence[Rollout], /) -> list[float]:
        return [self.function(rollout) for rollout in group]


def per_rollout(function: Callable[[Rollout], float]) -> PerRollout:
    """Lifts `Rollout -> float` to a reward; also a decorator.

    Example:
        @per_rollout
        def short(rollout): return float(len(rollout.sampled_ids) < 100)
    """
    if not callable(function):
        raise ValueError(  # noqa: TRY004 - what a user wrote
            f"per_rollout needs a function of one rollout, got {function!r}. Pass the function itself."
        )
    return PerRollout(function)
