"""Rewards that wait are asked while other groups are still decoded, and nothing else is other than before."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures import make_policy, make_prompt
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.reattention import Implicit
from reflectvlm.rewards import Accuracy, Custom, Judged, Rubric, Verdict, per_rollout
from reflectvlm.rewards.early import Early
from reflectvlm.rewards.lanes import Lanes, pause
from reflectvlm.rewards.rubric import RewardFailure
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.scripted import ScriptedEngine
from reflectvlm.types import Prompt, Rollout, Sample, SamplingParams
from training import logged, small_rl


def group(*texts: str, name: str = "row", answer: str = "5") -> tuple[Rollout, ...]:
    prompt = Prompt(sample=Sample(id=name, question="2 + 3?", answer=answer), spans=())
    return tuple(Rollout(prompt=prompt, spans=(), text=text, stop="eos") for text in texts)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reward-")]


@dataclass
class Slow:
    """A judge: the share of `e` in an answer; some it cannot decide, and with some it fails."""

    seconds: float = 0.0
    asked: list[str] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)

    def __call__(self, question: str, gold: str, answer: str, images: Any = (), /) -> Verdict:
        del question, gold, images
        self.asked.append(answer)
        self.begun.set()
        pause(self.seconds)
        if "q" in answer:
            raise OSError("the judge hung up")
        return Verdict(score=None if "z" in answer else answer.count("e") / max(len(answer), 1))


def by_length(texts: list[str]) -> list[float | None]:
    """Runs in a process."""
    if any("x" in text for text in texts):
        raise ValueError(f"a text with an x of {len(texts)}")
    return [None if "n" in text else len(text) / 10 for text in texts]


def rubric(judge: Slow, **settings: Any) -> Rubric:
    rewards: dict[str, Any] = {
        "plain": per_rollout(lambda rollout: len(rollout.text) % 3),
        "judge": Judged(judge=judge),
        "process": Custom(function=by_length, workers=2),
        "rowwise": Custom(function=lambda texts: [1.0 / len(texts[0])] * len(texts), rowwise=True, workers=2),
        "accuracy": Accuracy(kind="math"),
    }
    return Rubric(rewards=rewards, weights=dict.fromkeys(rewards, 1.0), **settings)


GROUPS = [
    group("five e", "", "four", name="a"),
    group("xe", "e", "eee", name="b"),
    group(r"\boxed{\frac{10}{2}}", r"\boxed{4+1}", r"\boxed{6}", name="c"),
    group("q here", "zz", "five e", name="d"),
    group("none", "e", "xx", name="e"),
]


def told(scored: Any) -> list[Any]:
    """Everything in scored groups; NaN, which is unlike itself, as text."""
    return [
        (one.rewards, one.scored, repr(dict(one.parts)), tuple(r.text for r in one.rollouts))
        for one in scored
    ]


@pytest.mark.parametrize("order", [range(5), (4, 2, 0, 3, 1), ()], ids=["in order", "mixed", "none early"])
def test_the_same_values_counts_and_warnings(order: Sequence[int], caplog: Any) -> None:
    """Bug: a group gets another group's values, a failure is counted twice, or is told in another order."""
    caplog.set_level(logging.WARNING, "reflectvlm")
    plain = rubric(Slow())
    wanted = told(plain.score(GROUPS))
    warnings = list(caplog.messages)
    assert len(warnings) == 4  # the judge, twice, and both processes
    caplog.clear()
    overlapped = rubric(Slow())
    with Early(overlapped) as early:
        for number in order:
            early.take(number, GROUPS[number])
        assert told(early.score(GROUPS)) == wanted
    assert caplog.messages == warnings
    assert overlapped.state() == plain.state()
    assert overlapped.lost == plain.lost
    assert not threads()
    # The same with other numbers, some of which have gone.
    with Early(rubric(Slow())) as early:
        for number in order:
            early.take(2 * number, GROUPS[number])
        some = [0, 3, 4]
        found = told(early.score([GROUPS[i] for i in some], [2 * i for i in some]))
    assert found == told(rubric(Slow()).score([GROUPS[i] for i in some]))


def test_the_comparison_sees_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values taken in the order in which they came, not by the group's number."""
    wanted = told(rubric(Slow()).score(GROUPS))
    real = Early.take
    order = iter(range(5))
    monkeypatch.setattr(Early, "take", lambda self, _, rows: real(self, next(order), rows))
    with Early(rubric(Slow())) as early:
        for number in (4, 2, 0, 3, 1):
            early.take(number, GROUPS[number])
        assert told(early.score(GROUPS)) != wanted


def test_a_reward_begins_before_the_last_group_is_there() -> None:
    """Bug: it looks like overlap, but everything waits for the last group."""
    judge = Slow()
    with Early(Rubric(rewards={"judge": Judged(judge=judge)}, weights={"judge": 1.0})) as early:
        early.take(1, GROUPS[1])
        assert judge.begun.wait(10)
        early.take(0, GROUPS[0])
        early.score(GROUPS[:2])
    off = Slow()
    with Early(Rubric(rewards={"judge": Judged(judge=off)}, weights={"judge": 1.0}), on=False) as early:
        early.take(1, GROUPS[1])
        assert not off.begun.wait(0.2)
        early.score(GROUPS[:2])
    assert sorted(off.asked) == sorted(judge.asked)


def test_each_different_answer_is_judged_once() -> None:
    """Bug: eight equal answers are eight requests, because they are asked about one by one."""
    judge = Slow()
    same = [group("e", "e", "ee", name="a"), group("ee", "e", "e", name="b")]
    with Early(Rubric(rewards={"judge": Judged(judge=judge)}, weights={"judge": 1.0})) as early:
        for number, rows in enumerate(same):
            early.take(number, rows)
        scored = early.score(same)
    assert sorted(judge.asked) == ["e", "ee"]
    assert [one.rewards for one in scored] == [(1.0,) * 3] * 2


def test_calls_go_to_the_same_workers_as_ever() -> None:
    """Bug: calls that come one by one all wait for the first worker."""
    groups = [group(f"{i}") for i in range(6)]

    def who(texts: list[str]) -> list[float]:
        return [float(os.getpid())] * len(texts)

    reward = Custom(function=who, workers=3)
    scored = Rubric(rewards={"pid": reward}, weights={"pid": 1.0})
    plain = [one.rewards for one in scored.score(groups)]
    with Early(scored) as early:
        for number in (5, 0, 3, 1, 4, 2):
            early.take(number, groups[number])
        found = [one.rewards for one in early.score(groups)]
    assert found == plain
    assert len({*found}) == 3
    reward.close()


def test_plain_rewards_and_a_user_s_many_are_asked_as_ever() -> None:
    """Bug: a Python function runs in a thread beside the decoding; a `many` that compares groups sees one."""
    seen: list[Any] = []

    class Own:
        def many(self, groups: Sequence[Sequence[Rollout]], /) -> list[Any]:
            seen.append(len(groups))
            return [[1.0] * len(rows) for rows in groups]

        def __call__(self, rows: Sequence[Rollout], /) -> Sequence[float]:
            return [1.0] * len(rows)

    def plain(rows: Sequence[Rollout]) -> list[float]:
        seen.append(threading.current_thread() is threading.main_thread())
        return [0.0] * len(rows)

    here = Custom(function=lambda texts: [0.0] * len(texts), timeout=None)
    rewards: dict[str, Any] = {"plain": plain, "own": Own(), "here": here}
    with Early(Rubric(rewards=rewards, weights=dict.fromkeys(rewards, 1.0))) as early:
        for number, rows in enumerate(GROUPS):
            early.take(number, rows)
        assert not seen
        assert not threads()
        early.score(GROUPS)
    assert seen == [True] * 5 + [5]


# -- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["decoding", "waiting"])
@pytest.mark.parametrize("kind", ["judge", "process"])
def test_a_step_given_up_leaves_no_thread(where: str, kind: str) -> None:
    """Bug: a stop waits for a judge that is down, or for a function that sleeps."""
    stopped: list[float] = []

    def sleeps(texts: list[str]) -> list[float]:
        time.sleep(60)
        return [0.0] * len(texts)

    waits: Any = Judged(judge=Slow(seconds=60)) if kind == "judge" else Custom(function=sleeps, timeout=90)
    slow = Rubric(rewards={"slow": waits}, weights={"slow": 1.0})

    def act() -> None:
        with abandonable(lambda: bool(stopped)), Early(slow) as early:
            for number, rows in enumerate(GROUPS):
                early.take(number, rows)
            time.sleep(0.5)
            stopped.append(1.0)
            if where == "decoding":
                raise Abandoned
            early.score(GROUPS)

    begun = time.perf_counter()
    with pytest.raises(Abandoned):
        act()
    assert time.perf_counter() - begun < 5
    assert not threads()


def test_what_a_reward_raises_surfaces() -> None:
    """Bug: an exception stays in its thread, and its rollouts count as something."""

    def act(scored: Rubric, number: int) -> None:
        with Early(scored) as early:
            early.take(0, GROUPS[number])
            early.score([GROUPS[number]])

    with pytest.raises(RewardFailure, match=r"Reward 'judge' failed.*hung up.*on_error='raise'"):
        act(rubric(Slow(), on_error="raise"), 3)
    assert not threads()

    class Odd(BaseException):
        """What no boundary may swallow."""

    def fails(*_: Any) -> Verdict:
        raise Odd

    with pytest.raises(Odd):
        act(Rubric(rewards={"judge": Judged(judge=fails)}, weights={"judge": 1.0}), 0)
    assert not threads()


def test_lanes_keep_their_order() -> None:
    """Bug: two calls of one lane run at one time or change places; numbers are mixed up."""
    seen: list[int] = []

    def call(number: int) -> Callable[[], int]:
        def act() -> int:
            time.sleep(0.01 * (3 - number % 3))
            seen.append(number)
            return number * 10

        return act

    lanes = Lanes(2)
    numbers = [lanes.put(place, call(place)) for place in range(7)]
    lanes.wait()
    assert numbers == list(range(7))
    assert lanes.done == {number: number * 10 for number in range(7)}
    assert [number for number in seen if number % 2 == 0] == [0, 2, 4, 6]
    assert [number for number in seen if number % 2 == 1] == [1, 3, 5]
    lanes.leave()
    assert not threads()


# -- engine and trainer ---------------------------------------------------------------------------


def test_groups_come_as_they_are_complete() -> None:
    """Bug: groups are handed out in the order of the prompts, or only at the end, or are other ones."""
    policy = make_policy(dtype=torch.float64)
    prompts = [make_prompt(policy, seed) for seed in range(4)]
    sampling = SamplingParams(max_tokens=24, stop=("e",))
    engine = InProcessEngine(policy=policy)
    asked = (prompts, 2, sampling, Implicit())
    wanted = engine.generate(*asked, seed=3)
    longest = [max(len(rollout.sampled_ids) for rollout in rows) for rows in wanted]
    assert longest != sorted(longest)
    found = list(engine.groups(*asked, seed=3))
    assert [longest[place] for place, _ in found] == sorted(longest)
    assert [rows for _, rows in sorted(found, key=lambda one: one[0])] == wanted


@dataclass(frozen=True, eq=False)
class Plain:
    """A user's engine that has nothing but `generate`."""

    inner: InProcessEngine

    def generate(self, *asked: Any, **named: Any) -> list[tuple[Rollout, ...]]:
        return self.inner.generate(*asked, **named)


def plain_engine(policy: Any) -> Plain:
    return Plain(InProcessEngine(policy=policy))


OFF = {"overlap_rewards": False}


def runs(tmp_path: Path, name: str, caplog: Any, **changes: Any) -> tuple[Any, ...]:
    """Metrics, warnings and weights of three steps with rewards that wait."""
    caplog.clear()
    judge = Slow()
    settings: dict[str, Any] = {
        "rubric": rubric(judge),
        "prompts_per_step": 4,
        "sampling": SamplingParams(max_tokens=8, stop=("e",)),
        "steps": 3,
        "evaluation": None,
        "test": None,
        "output": {"checks": False},
    }
    trainer = small_rl(tmp_path / name, **settings | changes)
    folder = trainer.run().folder
    weights = [parameter.detach().clone() for parameter in trainer.policy.module.parameters()]
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return logged(folder), messages, sorted(judge.asked), weights


@pytest.mark.parametrize("other", ["off", "plain engine", "few rows"])
def test_a_run_is_the_same_bit_for_bit(tmp_path: Path, caplog: Any, other: str) -> None:
    """Bug: with overlap a run learns something else."""
    changes: dict[str, Any] = {"engine": plain_engine} if other == "plain engine" else OFF
    rows: dict[str, Any] = {}
    if other == "few rows":  # groups come one after another
        rows = {"engine": lambda policy: InProcessEngine(policy=policy, max_rows=3)}
    *one, weights = runs(tmp_path, "on", caplog, **rows)
    *two, others = runs(tmp_path, "off", caplog, **rows | changes)
    assert one == two
    assert any(line.get("reward/judge", 0) > 0 for line in one[0])
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert not threads()


def test_scripted_engines_still_train(tmp_path: Path) -> None:
    """Bug: the trainer needs an engine that hands out groups one by one."""
    trainer = small_rl(tmp_path, engine=lambda policy: ScriptedEngine(policy=policy, texts=("a", "bb", "c")))
    assert [one.text for one in trainer.step(0).groups[0].rollouts] == ["a", "bb", "c"]


def test_an_engine_that_fails_leaves_no_thread(tmp_path: Path) -> None:
    """Bug: after an error in the middle of a step a judge is asked for ever."""

    @dataclass(frozen=True, eq=False)
    class Breaks:
        inner: InProcessEngine

        def generate(self, *asked: Any, **named: Any) -> list[tuple[Rollout, ...]]:
            return self.inner.generate(*asked, **named)

        def groups(self, *asked: Any, **named: Any) -> Iterator[tuple[int, tuple[Rollout, ...]]]:
            yield next(iter(self.inner.groups(*asked, **named)))
            raise RuntimeError("out of memory")

    slow = Rubric(rewards={"judge": Judged(judge=Slow(seconds=60))}, weights={"judge": 1.0})
    trainer = small_rl(
        tmp_path,
        rubric=slow,
        engine=lambda policy: Breaks(InProcessEngine(policy=policy)),
        prompts_per_step=2,
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.step(0)
    assert not threads()


def test_rewards_see_which_policy_wrote(tmp_path: Path) -> None:
    """Bug: asked early, a reward sees a rollout without its policy version."""
    seen: list[int] = []

    class Looks(Judged):
        """Judged, looking at whole rollouts."""

        def early(self, rows: Sequence[Rollout], place: int, /) -> Any:
            seen.extend(one.policy_version for one in rows)
            return super().early(rows, place)

    looks = Looks(judge=Slow())
    trainer = small_rl(tmp_path, rubric=Rubric(rewards={"judge": looks}, weights={"judge": 1.0}))
    trainer.updates = 7
    groups = trainer.step(0).groups
    assert {*seen} == {7}
    assert all(one.policy_version == 7 for rows in groups for one in rows.rollouts)
    assert dataclasses.is_dataclass(looks)
