"""One line of a comparison: which engine makes the answers, and what its seconds are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from fixtures import make_policy
from reflectvlm.data.digits import Digits
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.reattention import Implicit
from reflectvlm.rewards.lift import per_rollout
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.train import measure as measured
from reflectvlm.train.evaluate import Evaluation
from reflectvlm.train.ranks import Ranks
from reflectvlm.types import Instruction, Prompt, Rollout, SamplingParams
from training import remainder


@dataclass
class Clock:
    """Stands still unless it is told."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class Slow:
    """An engine whose first pass takes ten seconds, and any other one and a half."""

    clock: Clock
    asked: list[tuple[int, int]] = field(default_factory=list)
    policy: QwenVL | None = None

    def __call__(self, policy: QwenVL) -> Slow:
        self.policy = policy
        return self

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: SamplingParams,
        reattention: Reattention,
        *,
        seed: int,
    ) -> list[tuple[Rollout, ...]]:
        self.clock.now += 1.5 if self.asked else 10
        self.asked.append((len(prompts), sampling.max_tokens))
        assert self.policy is not None
        engine = InProcessEngine(policy=self.policy)
        return engine.generate(prompts, n, sampling, reattention, seed=seed)


def test_seconds_are_those_of_a_warm_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row of a table looks slower than all others, and the rows are made by another engine than
    the recipe's, which may be one that does not fit."""
    clock = Clock()
    engine = Slow(clock)
    monkeypatch.setattr(measured, "time", clock)
    rubric: Any = Rubric(rewards={"accuracy": per_rollout(remainder)}, weights={"accuracy": 1.0})
    held_out = Evaluation(data=Digits(split="test", size=3), max_tokens=6)
    figures = measured.measure(make_policy(), held_out, rubric, Instruction(), Implicit(), {}, engine)
    assert engine.asked == [(2, measured.WARM_UP), (3, 6)]
    assert figures.seconds == 1.5
    assert figures.answers == 3, "the warm-up is no answer"


@dataclass(frozen=True, kw_only=True, eq=False)
class Half(Ranks):
    """One of two processes. What it tells is kept; what the other has told is given."""

    world: int = 2
    told: list[Any] = field(default_factory=list)
    theirs: Any = None

    def gather(self, value: Any) -> list[Any]:
        self.told.append(value)
        both = {self.rank: value, 1 - self.rank: self.theirs or ((), None)}
        return [both[0], both[1]]

    def most(self, values: Sequence[float]) -> list[float]:
        return [max(7.0, *values)]


def test_processes_share_the_questions() -> None:
    """Bug: the first process asks all questions while the others wait, until they take it for dead; or rows
    are asked twice, or put together in another order."""
    rubric: Any = Rubric(rewards={"accuracy": per_rollout(remainder)}, weights={"accuracy": 1.0})
    held_out = Evaluation(data=Digits(split="test", size=5), max_tokens=6)

    def ask(ranks: Ranks | None) -> measured.Figures:
        policy = make_policy()
        return measured.measure(
            policy, held_out, rubric, Instruction(), Implicit(), {}, InProcessEngine, ranks
        )

    one, other = Half(rank=0), ask(None)
    assert ask(one).answers == 3
    (theirs,) = one.told
    both = ask(Half(rank=1, theirs=theirs))
    assert both.seconds == 7.0, "the slowest process gives the time"
    assert (both.processes, other.processes) == (2, 1)
    assert replace(both, seconds=0.0, processes=1) == replace(other, seconds=0.0)
    assert other.answers == 5
