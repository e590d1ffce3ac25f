"""Trainers and broken parts for the tests of the checks at start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.data.instructions import instruction
from reflectvlm.models.tiny import random_tiny
from reflectvlm.rewards.back import look_back_rubric
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.tags import look_back
from reflectvlm.train.checks import Result, run_checks
from reflectvlm.train.distill import Distiller
from reflectvlm.types import Rollout, Sample, SamplingParams
from training import small_rl

BACK = look_back_rubric(look_back())
ASKED = instruction("brief_back")
HOT = SamplingParams(max_tokens=96, temperature=0.7)


def found(trainer: Any) -> dict[str, Result]:
    return {result.name: result for result in run_checks(trainer)}


def states(trainer: Any) -> dict[str, str]:
    return {name: result.status for name, result in found(trainer).items()}


def sound_rl(tmp_path: Path, **changes: Any) -> Any:
    return small_rl(tmp_path, **{"rubric": BACK, "instruction": ASKED, "sampling": HOT} | changes)


def small_distiller(tmp_path: Path, **changes: Any) -> Distiller:
    del tmp_path
    given = {"policy": random_tiny(), "data": DigitTraces(data=Digits(size=9)), "rubric": BACK}
    return Distiller(**given | {"instruction": ASKED, "sampling": HOT} | changes)


@dataclass(frozen=True)
class Changed:
    """An engine whose sampling or rollouts are changed on the way."""

    policy: Any
    sampling: Callable[[SamplingParams], SamplingParams] = lambda given: given
    rollout: Callable[[Rollout], Rollout] = lambda given: given

    def generate(self, prompts: Any, n: int, sampling: Any, reattention: Any, *, seed: int) -> Any:
        engine = InProcessEngine(policy=self.policy)
        groups = engine.generate(prompts, n, self.sampling(sampling), reattention, seed=seed)
        return [tuple(map(self.rollout, group)) for group in groups]


@dataclass(frozen=True)
class Rows(Sequence[Sample]):
    """`Digits` with some answers, columns or whole rows other than they should be."""

    change: Callable[[int, Sample], Sample]
    size: int = 12

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return self.change(index, DigitTraces(data=Digits(size=self.size))[index])


def answering(text: str) -> Rows:
    return Rows(lambda _, sample: dataclasses.replace(sample, answer=text))
