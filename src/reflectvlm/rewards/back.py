"""The reward of Look-Back's second stage (arXiv 2507.03019): accuracy and a format that demands `<back>`.

    R = (1 - w) * accuracy + w * format,    w = 0.1

The paper gives the two terms, not the weight; 0.1 is EasyR1's default, on which it was built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from reflectvlm.protocols import Reward
from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.rewards.layout import TagFormat
from reflectvlm.rewards.rubric import MAX_FAILED_SHARE, OnError, Rubric, with_extras
from reflectvlm.tags import Layout
from reflectvlm.types import Rollout


@dataclass(frozen=True, kw_only=True)
class BackReward:
    """R as one number. Recipes use `look_back_rubric`, which logs the two parts."""

    layout: Layout
    w: float = 0.1
    accuracy: Reward = field(default_factory=Accuracy)
    rowwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_weight("BackReward", self.w)

    def __call__(self, group: Sequence[Rollout], /) -> list[float]:
        accuracy, layout = self.accuracy(group), TagFormat(layout=self.layout)(group)
        # An accuracy may say None, "does not apply", as in a rubric: the format alone then counts.
        values: list[float | None] = list(accuracy)
        return [
            (0.0 if a is None else (1 - self.w) * a) + self.w * f for a, f in zip(values, layout, strict=True)
        ]


def look_back_rubric(
    layout: Layout,
    w: float = 0.1,
    accuracy: Reward | None = None,
    *,
    extra: Mapping[str, Reward] | None = None,
    extra_weights: Mapping[str, float] | None = None,
    on_error: OnError = "drop",
    max_failures: int | None = None,
    max_failed_share: float | None = MAX_FAILED_SHARE,
) -> Rubric:
    """R as a rubric with the parts `accuracy` (weight 1 - w) and `format` (weight w).

    `extra` are further rewards by name, added with `extra_weights`; the two weights of R stay as they are.
    `on_error`, `max_failures` and `max_failed_share` are those of `Rubric`.
    """
    _check_weight("look_back_rubric", w)
    rewards: dict[str, Reward] = {"accuracy": accuracy or Accuracy(), "format": TagFormat(layout=layout)}
    weights = {"accuracy": 1 - w, "format": w}
    return with_extras(
        "look_back_rubric",
        rewards,
        weights,
        extra,
        extra_weights,
        on_error=on_error,
        max_failures=max_failures,
        max_failed_share=max_failed_share,
    )


def _check_weight(owner: str, w: float) -> None:
    if not 0 <= w <= 1:
        raise ValueError(
            f"{owner} has w={w}. The weight of the format must be in [0, 1]; accuracy gets 1 - w."
        )
