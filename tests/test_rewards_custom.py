"""TRL-style and other user functions as rewards."""

# ruff: noqa: ARG001, ARG005 - scripted rewards take what they are passed
from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

from reflectvlm.rewards import Custom, RewardError, per_rollout
from reflectvlm.rewards.isolation import shared_worker
from reflectvlm.types import Prompt, Rollout, Sample, Text, Visual


@pytest.fixture
def untyped() -> Iterator[None]:
    """As a user runs it: tests check annotations at run time, which would hide the library's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def rollout(text: str = "a<back>b</back>", level: int = 3) -> Rollout:
    sample = Sample(id="s1", question="What?", answer="5", columns={"level": level})
    spans = (
        Text(ids=(1, 2), trained=True, logprobs=(-0.1, -0.1)),
        Visual(image=0, keep=(3,)),
        Text(ids=(9,)),
    )
    return Rollout(prompt=Prompt(sample=sample, spans=()), spans=spans, text=text, stop="eos")


def test_trl_signature_by_object() -> None:
    """What TRL passes must arrive under TRL's names, with all tags in the text."""
    seen: dict[str, Any] = {}

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [float(len(text)) for text in completions]

    assert Custom(function=reward)([rollout(), rollout("xy", level=4)]) == [15.0, 2.0]
    assert seen["completions"] == ["a<back>b</back>", "xy"]
    assert seen["prompts"] == ["What?", "What?"]
    assert seen["completion_ids"] == [[1, 2], [1, 2]]
    assert (seen["level"], seen["answer"], seen["sample_ids"]) == ([3, 4], ["5", "5"], ["s1", "s1"])
    assert not {"images", "group", "rollouts"} & set(seen)


def test_only_what_is_named_is_passed() -> None:
    """A function without **kwargs must not be called with columns it does not know."""
    ours = [rollout(), rollout("b")]

    def reward(
        texts: list[str],
        ids: list[list[int]],
        spans: Any,
        answers: list[str],
        questions: list[str],
        images: Any,
        rollouts: Any,
        group: Any,
        level: list[int],
    ) -> list[float]:
        assert (texts[1], ids[0], answers, questions) == ("b", [1, 2], ["5", "5"], ["What?", "What?"])
        assert spans[0][1] == {"type": "visual", "image": 0, "keep": [3]}
        assert rollouts == group == tuple(ours)
        assert images == [[], []]
        return [float(value) for value in level]

    assert Custom(function=reward)(ours) == [3.0, 3.0]


def test_conversational_messages() -> None:
    """TRL passes lists of messages for chat data; functions index completions[i][0]['content']."""
    reward = Custom(
        function=lambda prompts, completions: [
            float(p[0]["role"] == "user") + len(c[0]["content"])
            for p, c in zip(prompts, completions, strict=True)
        ],
        conversational=True,
    )
    assert reward([rollout("abc")]) == [4.0]


def test_async_and_none() -> None:
    """None means 'does not apply' and must reach the rubric as no value, not as 0."""

    async def reward(completions: list[str]) -> list[float | None]:
        await asyncio.sleep(0)
        return [1.0, None]

    assert Custom(function=reward)([rollout(), rollout()]) == [1.0, None]
    assert Custom(function=reward, timeout=None)([rollout(), rollout()])[0] == 1.0


def test_object_that_hangs_or_leaves() -> None:
    """The rubric must go on; the thread is a daemon and does not hold up the end of the run."""
    start = time.perf_counter()
    with pytest.raises(RewardError, match=r"sleeper gave no answer in 0.1 s"):
        Custom(function=sleeper, timeout=0.1)([rollout()])
    assert time.perf_counter() - start < 1.0
    with pytest.raises(SystemExit):
        Custom(function=lambda texts: exit_now())([rollout()])


def sleeper(texts: list[str]) -> list[float]:
    time.sleep(1.0)
    return [0.0 for _ in texts]


def exit_now() -> None:
    raise SystemExit(2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "import time\n"
        "from neighbour import BONUS\n"
        "def plain(completions, level, **kwargs):\n"
        "    return [len(c) + n + BONUS for c, n in zip(completions, level)]\n"
        "async def some(texts): return [None if t == 'b' else 1.5 for t in texts]\n"
        "def hang(texts): return 9**9**9**9\n"
        "def needs_group(rollouts): return [0.0]\n"
        "def needs_one(rollout): return 0.0\n"
        "def spans_too(spans): return [float(len(s)) for s in spans]\n"
    )
    (tmp_path / "neighbour.py").write_text("BONUS = 100\n")
    return path


def test_by_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's function runs in its own process, finds its neighbours, and survives a change of folder."""
    monkeypatch.chdir(file.parent)
    reward = Custom(function="my_rewards.py:plain")
    monkeypatch.chdir("/")
    assert reward([rollout("ab"), rollout("b", level=5)]) == [105.0, 106.0]
    assert Custom(function=f"{file}:some")([rollout("ab"), rollout("b")]) == [1.5, None]
    assert Custom(function=f"{file}:spans_too")([rollout()]) == [3.0]
    for name in ("plain", "some", "spans_too"):
        shared_worker(f"{file}:{name}").close()


def test_by_file_failures(file: Path) -> None:
    """A hang in C is killed by the clock, and a wrong signature says what there is to ask for."""
    with pytest.raises(RewardError, match=r"my_rewards.py:hang gave no answer in 0.3 s and was killed"):
        Custom(function=f"{file}:hang", timeout=0.3)([rollout()])
    with pytest.raises(ValueError, match=r"asks for 'rollout',.*Offered: .*texts.*needs @per_rollout"):
        Custom(function=f"{file}:needs_one")([rollout()])
    shared_worker(f"{file}:needs_one").close()


def test_our_own_forms_by_file(tmp_path: Path) -> None:
    """Bug: the reward of CONTRIBUTING's page works in a script and fails on every row of a recipe."""
    path = tmp_path / "five.py"
    path.write_text(
        "from reflectvlm.rewards import per_rollout\n"
        "@per_rollout\n"
        "def looks(rollout): return rollout.count('<back>') / 2\n"
        "def whole(group): return [len(group) + len(r.prompt.sample.answer) for r in group]\n"
    )
    rollouts = [rollout(), rollout("<back><back>")]
    assert Custom(function=f"{path}:looks")(rollouts) == [0.5, 1.0]
    # Two rollouts, and an answer of one character.
    assert Custom(function=f"{path}:whole")(rollouts) == [3, 3]
    for name in ("looks", "whole"):
        shared_worker(f"{path}:{name}").close()
    assert Custom(function=per_rollout(lambda one: float(len(one.text))))([rollout("abc")]) == [3.0]


def test_by_dotted_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker must see the trainer's import path."""
    monkeypatch.syspath_prepend(str(file.parent))
    assert Custom(function="my_rewards.plain")([rollout("ab")]) == [105.0]
    shared_worker("my_rewards.plain").close()


def test_what_cannot_be_found_is_told_at_once(file: Path) -> None:
    """Bug: a misspelt function fails on every rollout, and a run of days ends well having trained nothing."""
    with pytest.raises(
        ValueError, match=r"which cannot be loaded: .*No module named 'no_such_thing'.*Correct"
    ):
        Custom(function="no_such_thing.fn")
    with pytest.raises(ValueError, match=r"has no 'plian'; the nearest is 'plain'\. Correct"):
        Custom(function=f"{file}:plian")
    with pytest.raises(ValueError, match=r"has no 'zzz'; it has hang, needs_group, "):
        Custom(function=f"{file}:zzz")
    assert shared_worker(f"{file}:zzz").pid is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Custom(function="nowhere.py:fn"), r"no file .*nowhere.py"),
        (lambda: Custom(function="fn"), r"'fn'. Write 'my_pkg.mod.fn'"),
        (lambda: Custom(function="a b.c"), r"'a b.c'. Write"),
        (lambda: Custom(function=3), r"Custom.function is 3"),  # type: ignore[arg-type]
        (lambda: Custom(function="a.b", timeout=None), r"timeout is None"),
        (lambda: Custom(function=len, timeout=-1.0), r"timeout is -1.0.*positive"),
        (lambda: Custom(function=lambda hint: [0.0])([rollout()]), r"asks for 'hint'.*give a default"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_errors_name_the_remedy(make: Callable[[], object], message: str) -> None:
    """A wrong path must be told when the recipe is built, not after the first rollouts."""
    with pytest.raises(ValueError, match=message):
        make()
