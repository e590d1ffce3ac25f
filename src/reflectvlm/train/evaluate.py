"""Held-out evaluation: greedy answers, scored by the run's own rewards, so that training and
evaluation cannot disagree about what is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reflectvlm.protocols import Policy, Reattention, RolloutEngine
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.train.reflections import insertion_curves, tag_curves
from reflectvlm.types import Instruction, Sample, SamplingParams, ScoredGroup

DEFAULT_TAG = "<back>"
PLAIN_NAMES = {"reward/accuracy": "accuracy", "reward/format": "layout_rate"}
"""Parts of the reward that are rates, and what they are called as such."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Rows that no training step sees.

    Example: `Evaluation(data=Digits(split="test", size=400))`
    """

    data: Sequence[Sample]
    max_tokens: int = 512
    tag: str = DEFAULT_TAG
    """Whose rate is reported, and the number, length and place of its blocks."""

    def __post_init__(self) -> None:
        if len(self.data) == 0:
            raise ValueError("Evaluation.data has no rows. Check its path and its filters.")

    def __call__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        rubric: Rubric,
        instruction: Instruction,
        reattention: Reattention,
    ) -> tuple[dict[str, float], list[ScoredGroup]]:
        prompts = [policy.prompt(self.data[i], instruction) for i in range(len(self.data))]
        sampling = SamplingParams(max_tokens=self.max_tokens, temperature=0.0)
        groups = rubric.score(engine.generate(prompts, 1, sampling, reattention, seed=0))
        return summarize(groups, self.tag), groups


def summarize(groups: Sequence[ScoredGroup], tag: str) -> dict[str, float]:
    """Means over rollouts: reward and its parts, rate and blocks of the tag, lengths, how they ended.

    A reward without any value is NaN: it did not apply, or failed, everywhere.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scored = [keep for group in groups for keep in group.scored]
    rewards = [reward for group in groups for reward in group.rewards]
    lengths = np.array([len(rollout.sampled_ids) for rollout in rollouts])
    values: dict[str, float] = {
        "reward": _mean([reward for reward, keep in zip(rewards, scored, strict=True) if keep]),
        "back_rate": _mean([tag in rollout.text for rollout in rollouts]),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "truncated": _mean([rollout.stop == "length" for rollout in rollouts]),
        "unscored": 1.0 - _mean(scored),
    }
    for name in groups[0].parts:
        part = [value for group in groups for value in group.parts[name]]
        values[f"reward/{name}"] = _mean([value for value in part if np.isfinite(value)])
    values |= {plain: values[key] for key, plain in PLAIN_NAMES.items() if key in values}
    return values | tag_curves(rollouts, tag) | insertion_curves(rollouts)


def _mean(values: Sequence[float | bool]) -> float:
    """Mean; NaN for nothing."""
    return float(np.mean(values)) if len(values) else math.nan
