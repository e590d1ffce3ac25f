"""Held-out evaluation: greedy answers, scored by the run's own rewards, so that training and
evaluation cannot disagree about what is right.

Looking changes nothing: what fails here is told and counted for this evaluation alone, and a row that
cannot be used, as when its image has gone, is left out and said so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from reflectvlm.data.rows import BadRow
from reflectvlm.interrupt import safe_point
from reflectvlm.protocols import Policy, Reattention, RolloutEngine
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.train.ranks import Ranks
from reflectvlm.train.reading import read_prompt, read_sample
from reflectvlm.train.reflections import insertion_curves, tag_curves
from reflectvlm.train.sharing import Placed, shared
from reflectvlm.types import Instruction, Prompt, Sample, SamplingParams, ScoredGroup

log = logging.getLogger("reflectvlm")

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
    _named: set[int] = field(default_factory=set, init=False, repr=False)
    """Places of rows that a warning was given for; one says enough."""

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
        ranks: Ranks | None = None,
    ) -> tuple[dict[str, float], list[ScoredGroup]]:
        """`ranks`: the processes that share the rows; each answers its own, and all learn all answers."""
        ranks = ranks or Ranks()
        sampling = SamplingParams(max_tokens=self.max_tokens, temperature=0.0)
        apart = replace(rubric)  # with a tally of its own: nothing of the run's budget of failures is spent

        def answered() -> list[Placed]:
            prompts, unusable = self._prompts(policy, instruction, ranks.mine(len(self.data)))
            if not prompts and ranks.world == 1:
                raise ValueError(self._nothing(f" The last: {unusable}"))
            groups = engine.generate(list(prompts.values()), 1, sampling, reattention, seed=0)
            return list(map(Placed, prompts, apart.score(groups)))

        groups, _ = shared(ranks, answered)
        if not groups:
            raise ValueError(self._nothing())
        values = summarize(groups, self.tag)
        if len(groups) < len(self.data):
            values["rows"] = float(len(groups))
        return values, groups

    def _nothing(self, last: str = "") -> str:
        return (
            f"None of the {len(self.data):,} rows of an evaluation can be used; the warnings say why.{last} "
            "Repair its data, or leave the evaluation out."
        )

    def _prompts(
        self, policy: Policy, instruction: Instruction, places: Iterable[int]
    ) -> tuple[dict[int, Prompt], BadRow | None]:
        """The rows that can be used, as prompts by their place, and the last that cannot."""
        prompts = {}
        last: BadRow | None = None
        for place in places:
            safe_point()
            try:
                prompts[place] = read_prompt(policy, read_sample(self.data, place), instruction)
            except BadRow as error:
                last = error
                if place not in self._named:
                    self._named.add(place)
                    log.warning("row left out of the evaluation: %s", error)
        return prompts, last


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
        "truncated": _mean([rollout.truncated for rollout in rollouts]),
        "unscored": 1.0 - _mean(scored),
    }
    if cut := _mean([rollout.stop == "cut" for rollout in rollouts]):
        values["cut"] = cut
    for name in groups[0].parts:
        part = [value for group in groups for value in group.parts[name]]
        values[f"reward/{name}"] = _mean([value for value in part if np.isfinite(value)])
    values |= {plain: values[key] for key, plain in PLAIN_NAMES.items() if key in values}
    return values | tag_curves(rollouts, tag) | insertion_curves(rollouts)


def _mean(values: Sequence[float | bool]) -> float:
    """Mean; NaN for nothing."""
    return float(np.mean(values)) if len(values) else math.nan
