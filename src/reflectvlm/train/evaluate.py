"""Held-out evaluation: greedy answers, scored as `reflectvlm eval` scores them and by the run's own rewards.

`accuracy`, and a benchmark's official figure, come from the scorers of `eval` (`eval/held_out.py`) over all
rows: one that cannot be asked, as when its image has gone, counts as wrong, and is named. `reward` and its
parts are what the run's rubric says of the answers that there are; where its accuracy follows another rule,
both stand in the table.

Looking changes nothing: what fails here is told and counted for this evaluation alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from reflectvlm.data.rows import BadRow
from reflectvlm.eval.held_out import held_out_figures
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
_LISTED = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Rows that no training step sees.

    Example: `Evaluation(data=Digits(split="test", size=400))`
    """

    data: Sequence[Sample]
    max_tokens: int = 512
    tag: str = DEFAULT_TAG
    """Whose rate is reported, and the number, length and place of its blocks."""
    missing: dict[int, str] = field(default_factory=dict, init=False, repr=False)
    """Why rows could not be asked the last time, by their place."""
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
        unusable: dict[int, str] = {}
        sampling = SamplingParams(max_tokens=self.max_tokens, temperature=0.0)
        apart = replace(rubric)  # with a tally of its own: nothing of the run's budget of failures is spent

        def answered() -> list[Placed]:
            prompts, found = self._prompts(policy, instruction, ranks.mine(len(self.data)))
            unusable.update(found)
            if not prompts and ranks.world == 1:
                raise ValueError(self._nothing(f" The last: {list(found.values())[-1]}"))
            groups = engine.generate(list(prompts.values()), 1, sampling, reattention, seed=0)
            return list(map(Placed, prompts, apart.score(groups)))

        groups, _ = shared(ranks, answered)
        if not groups:
            raise ValueError(self._nothing())
        everybody = (pair for some in ranks.together(lambda: unusable) for pair in some.items())
        self.missing.clear()
        self.missing.update(sorted(everybody))
        values = summarize(groups, self.tag)
        values.pop("accuracy", None)  # by the rubric, of the rows that were asked; see reward/accuracy
        values |= ranks.from_first(lambda: self._figures(groups, instruction))
        if self.missing:
            values["missing"] = float(len(self.missing))
        return values, groups

    def notes(self, values: Mapping[str, float]) -> list[str]:
        """What a table of these values has to say beside them: by which rule, and over which rows."""
        lines = []
        if "accuracy" in values:
            line = f"accuracy: by the strict scorer of `reflectvlm eval`, over all {len(self.data):,} rows"
            if left_out := values.get("strict/unscored"):
                line += f", of which {100 * left_out:.1f}% could not be graded and are left out"
            if values.get("reward/accuracy", values["accuracy"]) != values["accuracy"]:
                line += "; reward/accuracy: by the run's own rubric, over the rows that it has scored"
            lines.append(line)
        if any(key.startswith("official/") for key in values):
            lines.append(_official(values))
        if self.missing:
            some = "; ".join(list(self.missing.values())[:_LISTED])
            more = f"; … ({len(self.missing):,} in all)" if len(self.missing) > _LISTED else ""
            lines.append(f"not asked, and wrong: {some}{more}")
        return lines

    def _figures(self, groups: Sequence[ScoredGroup], instruction: Instruction) -> dict[str, float]:
        asked = [place for place in range(len(self.data)) if place not in self.missing]
        answers = {place: group.rollouts[0] for place, group in zip(asked, groups, strict=True)}
        return held_out_figures(self.data, answers, self.missing, instruction.text)

    def _nothing(self, last: str = "") -> str:
        return (
            f"None of the {len(self.data):,} rows of an evaluation can be used; the warnings say why.{last} "
            "Repair its data, or leave the evaluation out."
        )

    def _prompts(
        self, policy: Policy, instruction: Instruction, places: Iterable[int]
    ) -> tuple[dict[int, Prompt], dict[int, str]]:
        """The rows that can be used, as prompts by their place, and why others cannot."""
        prompts: dict[int, Prompt] = {}
        unusable: dict[int, str] = {}
        for place in places:
            safe_point()
            try:
                prompts[place] = read_prompt(policy, read_sample(self.data, place), instruction)
            except BadRow as error:
                unusable[place] = str(error)
                if place not in self._named:
                    self._named.add(place)
                    log.warning("row of an evaluation that counts as wrong: %s", error)
        return prompts, unusable


def _official(values: Mapping[str, float]) -> str:
    """Of a benchmark's own figures: by which rule they are."""
    line = "official/…: by the benchmark's own rule, without the language model that it may ask"
    if left_out := values.get("official/unscored"):
        line += f", so {100 * left_out:.1f}% of the rows could not be graded and are left out"
    same = [key for key in values if key.startswith("strict/") and key != "strict/unscored"]
    return line + "".join(f"; {key}: the same figure by the strict scorer" for key in same)


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
