"""TRL-style and other user functions as rewards."""

# ruff: noqa: ARG001, ARG005 - scripted rewards take what they are passed
from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

from reflectvlm.rewards import Custom, RewardError, Rubric, per_rollout
from reflectvlm.rewards.pool import shared_pool
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

    # Called here, so that the test can look at what it got.
    assert Custom(function=reward, timeout=None)([rollout(), rollout("xy", level=4)]) == [15.0, 2.0]
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
    """Bug: an object ran in a thread, which nothing can kill: a hang inside C stopped the whole run."""
    start = time.perf_counter()
    with pytest.raises(RewardError, match=r"forever gave no answer in 0.3 s and was killed"):
        Custom(function=forever(), timeout=0.3)([rollout()])
    assert time.perf_counter() - start < 15.0
    with pytest.raises(RewardError, match="SystemExit: 2"):
        Custom(function=lambda texts: sys.exit(2))([rollout()])
    with pytest.raises(SystemExit):
        Custom(function=lambda texts: sys.exit(2), timeout=None)([rollout()])


def forever() -> Callable[..., Any]:
    def forever(texts: list[str]) -> Any:
        return 9**9**9**9

    return forever


def test_an_object_travels_as_it_is() -> None:
    """Bug: what a notebook defines cannot be imported by another process, closures and classes included."""
    bonus = 2.0

    class Counts:
        def __init__(self, letter: str) -> None:
            self.letter = letter

        def __call__(self, texts: list[str]) -> list[float]:
            return [bonus + text.count(self.letter) for text in texts]

    assert Custom(function=Counts("b"))([rollout("abba")]) == [4.0]


def test_what_an_object_changes_stays_in_its_process() -> None:
    """A reward that mutates its input must not change the row that trains."""
    columns = {"marks": [1, 2]}
    sample = Sample(id="s", question="?", answer="5", columns=columns)
    one = Rollout(prompt=Prompt(sample=sample, spans=()), spans=(), text="x", stop="eos")

    def spoils(marks: list[list[int]], group: Any) -> list[float]:
        marks[0].clear()
        group[0].prompt.sample.columns["marks"] = "gone"
        return [1.0]

    assert Custom(function=spoils)([one]) == [1.0]
    assert columns == {"marks": [1, 2]}


def test_an_object_that_cannot_travel_is_refused_at_once() -> None:
    """Bug: it would fail on every row, or run in a thread without being asked."""
    lock = threading.Lock()

    def holds(texts: list[str]) -> list[float]:
        with lock:
            return [1.0 for _ in texts]

    with pytest.raises(ValueError, match=r"holds cannot be sent to a process.*lock.*pass timeout=None"):
        Custom(function=holds)
    assert Custom(function=holds, timeout=None)([rollout()]) == [1.0]


def test_processes_end_with_the_reward() -> None:
    """Bug: a notebook that makes a reward anew in every cell keeps a process of each."""
    reward = Custom(function=lambda texts: [1.0 for _ in texts], workers=2)
    assert reward.many([[rollout()], [rollout()]]) == [[1.0], [1.0]]
    pids = reward._pool.pids if reward._pool else ()
    assert len(pids) == 2
    del reward
    gc.collect()
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_rowwise_costs_one_row() -> None:
    """Bug: a TRL-style function that fails on one text takes the whole group with it."""

    def reads(texts: list[str]) -> list[float]:
        return [1 / int(text) for text in texts]

    rollouts = [rollout("0"), rollout("2")]
    rubric = Rubric(rewards={"x": Custom(function=reads, rowwise=True)}, weights={"x": 1.0})
    assert rubric(rollouts).scored == (False, True)
    rubric = Rubric(rewards={"x": Custom(function=reads)}, weights={"x": 1.0})
    assert rubric(rollouts).scored == (False, False)


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
        shared_pool(f"{file}:{name}").close()


def test_by_file_failures(file: Path) -> None:
    """A hang in C is killed by the clock, and a wrong signature says what there is to ask for."""
    with pytest.raises(RewardError, match=r"my_rewards.py:hang gave no answer in 0.3 s and was killed"):
        Custom(function=f"{file}:hang", timeout=0.3)([rollout()])
    with pytest.raises(ValueError, match=r"asks for 'rollout',.*Offered: .*texts.*needs @per_rollout"):
        Custom(function=f"{file}:needs_one")([rollout()])
    shared_pool(f"{file}:needs_one").close()


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
        shared_pool(f"{path}:{name}").close()
    assert Custom(function=per_rollout(lambda one: float(len(one.text))))([rollout("abc")]) == [3.0]


def test_by_dotted_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker must see the trainer's import path."""
    monkeypatch.syspath_prepend(str(file.parent))
    assert Custom(function="my_rewards.plain")([rollout("ab")]) == [105.0]
    shared_pool("my_rewards.plain").close()


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
    assert shared_pool(f"{file}:zzz").pids == ()


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
