"""Rewards of one group -> advantages.

`GroupMean` is GRPO's (arXiv 2402.03300, sec. 4.1.2), without the scale that of Dr. GRPO
(arXiv 2503.20783); `LeaveOneOut` is RLOO's (arXiv 2402.14740).
In all of them an unscored rollout gets exactly 0 and moves no baseline, and a group whose scored
rewards are all equal, or that has a single one, gets exactly 0 everywhere.
Left out: statistics over the whole batch; an `Advantage` sees one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reflectvlm.types import ScoredGroup

LARGEST = 1e30
"""Largest reward: squares of larger ones leave the range of floats, and a deviation of infinity would
make every advantage 0."""


@dataclass(frozen=True, kw_only=True)
class GroupMean:
    """A_i = (r_i - mean(r)) / (std(r) + eps), or A_i = r_i - mean(r) with `scale="none"`.

    The deviation divides by n - 1, n the scored rollouts, as TRL 1.16 does (which adds eps = 1e-4).
    """

    scale: Literal["group", "none"] = "group"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.scale not in ("group", "none"):
            raise ValueError(
                f"GroupMean.scale is {self.scale!r}. It must be 'group' (divide by the group's deviation) "
                "or 'none'."
            )
        if not (0 < self.eps < math.inf):
            raise ValueError(
                f"GroupMean.eps is {self.eps}. It keeps a division finite; give one above 0, e.g. 1e-6."
            )

    def __call__(self, group: ScoredGroup) -> Float[Tensor, " G"]:
        def centred(rewards: Tensor) -> Tensor:
            difference = rewards - rewards.mean()
            return (
                difference / (rewards.std(correction=1) + self.eps) if self.scale == "group" else difference
            )

        return _over_scored(group, centred)


@dataclass(frozen=True)
class LeaveOneOut:
    """A_i = r_i - mean of the other scored rewards = n / (n - 1) * (r_i - mean(r))."""

    def __call__(self, group: ScoredGroup) -> Float[Tensor, " G"]:
        def against_others(rewards: Tensor) -> Tensor:
            return (rewards - rewards.mean()) * (len(rewards) / (len(rewards) - 1))

        return _over_scored(group, against_others)


def _over_scored(group: ScoredGroup, formula: Callable[[Tensor], Tensor]) -> Float[Tensor, " G"]:
    """`formula` of the scored rewards, which then are two or more, at their places; 0 elsewhere."""
    if wrong := [reward for reward in group.rewards if not abs(reward) <= LARGEST]:
        sample = group.rollouts[0].prompt.sample.id
        raise ValueError(
            f"A rollout of sample {sample!r} has the reward {wrong[0]}. It must lie between -{LARGEST:g} and "
            f"{LARGEST:g}: scale or bound the reward, or lower its weight."
        )
    advantages = torch.zeros(len(group.rewards), dtype=torch.float64)
    if group.has_signal:  # else exactly 0: the mean of equal floats need not equal them
        scored = torch.tensor(group.scored, dtype=torch.bool)
        advantages[scored] = formula(torch.tensor(group.rewards, dtype=torch.float64)[scored])
    return advantages.float()
