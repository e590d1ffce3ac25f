"""F2 to F4: the step goes on wherever rewards are called, without a judge's word, and on hostile answers."""

# ruff: noqa: ARG001, ARG005 - scripted rewards take what they are passed
from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reflectvlm.advantages import GroupMean
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.rewards import (
    Accuracy,
    BackReward,
    Custom,
    Judged,
    RecordedJudge,
    ReflectionBalance,
    Rubric,
    TagFormat,
    Verdict,
    answers,
)
from reflectvlm.rewards.reflection import closed_blocks
from reflectvlm.tags import grpo, look_back, parse, qwen_la
from reflectvlm.types import Rollout, ScoredGroup
from rewarding import group, no_process_is_left

__all__ = ["no_process_is_left"]  # the fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("f2")


def close_all(*customs: Custom) -> None:
    from reflectvlm.rewards.maths import math_pool

    for custom in customs:
        custom.close()
    math_pool().close()


def given_up(ask: Callable[[], Any], after: float = 0.5) -> float:
    """Seconds from the request to stop until the caller has left."""
    asked: list[float] = []
    timer = threading.Timer(after, lambda: asked.append(time.perf_counter()))
    timer.start()
    with pytest.raises(Abandoned), abandonable(lambda: bool(asked)):
        ask()
    return time.perf_counter() - asked[0]


def sleeping_judge(question: str, gold: str, answer: str, images: Any = (), /) -> Verdict:
    if answer == "slow":
        time.sleep(5.0)
    return Verdict(score=1.0)


SLOW = """
import time
def slow(texts):
    if texts[0] == "slow": time.sleep(30.0)
    return [1.0 for _ in texts]
"""


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", ["plain", "here", "process", "two processes", "judge", "judge of one"])
def test_f2_a_step_with_a_slow_reward_can_be_given_up(kind: str, beside: bool, tmp_path: Path) -> None:
    """Bug: after SIGTERM all rewards of the step are still asked, and the job is killed unsaved."""
    (tmp_path / "slow.py").write_text(SLOW)

    def nap(texts: Sequence[str]) -> list[float]:
        time.sleep(0.3 if texts[0] == "slow" else 0.0)
        return [1.0 for _ in texts]

    slow: dict[str, Any] = {
        "plain": lambda rows: nap([one.text for one in rows]),
        "here": Custom(function=nap, timeout=None),
        "process": Custom(function=f"{tmp_path}/slow.py:slow", timeout=60.0, workers=1),
        "two processes": Custom(function=f"{tmp_path}/slow.py:slow", timeout=60.0, workers=2),
        "judge": Judged(judge=sleeping_judge),
        "judge of one": Judged(judge=sleeping_judge, at_once=1),
    }
    rewards = {"slow": slow[kind]}
    if beside:  # rewards that wait are asked side by side: the slow one is then in a thread of its own
        rewards |= {
            "other": Custom(function=f"{tmp_path}/slow.py:slow", timeout=60.0),
            "quick": Judged(judge=lambda *case: Verdict(score=1.0)),
        }
    rubric = Rubric(rewards=rewards, weights=dict.fromkeys(rewards, 1.0))
    ten = [group("slow", "other", name=str(at)) for at in range(10)]
    assert given_up(lambda: rubric.score(ten)) < 1.0
    for _ in range(2):
        scored = rubric.score([group("a", "b"), group("c")])
        assert [one.scored for one in scored] == [(True, True), (True,)]
    close_all(*(one for one in [*slow.values(), *rewards.values()] if isinstance(one, Custom)))


def score_in(place: str, rubric: Rubric, groups: Sequence[tuple[Rollout, ...]]) -> list[ScoredGroup]:
    if place == "here":
        return rubric.score(groups)
    if place == "one by one":
        return [rubric(one) for one in groups]
    if place == "thread":
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(rubric.score, groups).result()

    if place == "forked process":
        rubric.score(groups)  # the parent's workers are there, and must be left alone
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        child = context.Process(target=lambda: theirs.send(rubric.score(groups)))
        child.start()
        assert ours.poll(60)
        found: list[ScoredGroup] = ours.recv()
        child.join()
        return found

    async def inside() -> list[ScoredGroup]:
        return rubric.score(groups)

    return asyncio.run(inside())


@pytest.mark.parametrize("place", ["here", "one by one", "thread", "async", "forked process"])
def test_f2_the_same_rewards_wherever_they_are_called(place: str, folder: Path) -> None:
    """Bug: signal-based time-outs fail in threads, asyncio.run inside a loop, and every answer counts 0."""
    (folder / "f2.py").write_text(
        "async def later(texts): return [float(len(text)) for text in texts]\n"
        "def none(texts): return [None if text == 'x' else 2.0 for text in texts]\n"
    )

    async def later(texts: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(text)) for text in texts]

    customs = [
        Custom(function=later, timeout=None),
        Custom(function=later, workers=2),
        Custom(function=f"{folder}/f2.py:later", workers=2),
        Custom(function=f"{folder}/f2.py:none"),
    ]
    rewards: dict[str, Any] = {"math": Accuracy(kind="math"), "format": TagFormat(layout=grpo())}
    rewards |= {f"custom{i}": custom for i, custom in enumerate(customs)}
    rubric = Rubric(rewards=rewards, weights=dict.fromkeys(rewards, 1.0))
    groups = [
        group(
            rf"\boxed{{\frac{{{n}}}{{2}}}}", "x", rf"<think>a</think>\boxed{{{n}/2}}", answer=r"\frac{6}{4}"
        )
        for n in (3, 4, 5)
    ]
    found = score_in(place, rubric, groups)
    lengths = [tuple(float(len(one.text)) for one in rows) for rows in groups]
    assert [one.parts["math"] for one in found] == [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)]
    assert [one.parts["format"] for one in found] == [(0.0, 0.0, 1.0)] * 3
    for at in range(3):
        assert [one.parts[f"custom{at}"] for one in found] == lengths
    assert [[math.isnan(value) for value in one.parts["custom3"]] for one in found] == [
        [False, True, False]
    ] * 3
    assert all(all(one.scored) for one in found)
    close_all(*customs)


def test_f3_a_judge_that_cannot_decide_leaves_its_row_unscored(tmp_path: Path) -> None:
    """Bug: an answer nobody judged counts as wrong. What a server can do wrong is in test_judges.py."""
    line = {"question": "2 + 3?", "gold": "5", "answer": "five"}
    path = tmp_path / "judge.jsonl"
    path.write_text(json.dumps(line | {"score": 1}) + "\n" + json.dumps(line | {"answer": "six", "score": 0}))
    judged = Judged(judge=RecordedJudge(path=str(path)))
    rubric = Rubric(
        rewards={"x": judged, "one": lambda rows: [1.0] * len(rows)}, weights={"x": 1.0, "one": 1.0}
    )
    scored = rubric(group("five", "six", "blurred"))
    assert (scored.rewards, scored.scored) == ((2.0, 1.0, 0.0), (True, True, False))
    assert GroupMean(scale="none")(scored).tolist() == [0.5, -0.5, 0.0]


# fmt: off
UNITS = [
    "(", "{", "[", "\\", "\\{", "\\boxed{", "\\boxed", "\\boxed ", "9**", "9", "\\frac{", "\\frac{1}{",
    "\\sqrt[", "$", "__import__('os').system('false')", "<C>", "</C>", "<C", "<REFLECTION>",
    "<REFLECTION></REFLECTION>", "<think>", "</think>", "\\text{", "\\text{a}", " ", "\n", "\u2028", "\0",
    "\ud800", "e\u0301\u0316", "\u0301\u0316", "1,", "1,000", "1/", "(A) or ", "A. ", "\"'*", ".!", "-",
    "\u2212", "\U0001d7d9", "\ufb03", "\u017f", "\\left(", "x^{", "x_", "&", "\\begin{matrix}",
]
# fmt: on
WHOLE = [
    "\\boxed{" * 10_000 + "5" + "}" * 10_000,
    "\\frac{" * 5_000 + "1" + "}{2}" * 5_000,
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "1e999999999",
    "1e-999999999",
    "1E+999",
    "9" * 100_000,
    "0." + "9" * 100_000,
    "9" * 50_000 + "/" + "9" * 50_000,
    "__import__('os')",
    "().__class__.__bases__[0].__subclasses__()",
    "a" + "\u0301\u0316" * 50_000,
    "<C>" * 30_000 + "5" + "</C>" * 30_000,
    "\\int_{" * 300 + "}" * 300,
]
PURE: list[tuple[str, Callable[[str], Any]]] = [
    *(
        (f"{kind} {gold}", lambda text, kind=kind, gold=gold: Accuracy(kind=kind).is_right(text, gold))
        for kind, gold in [("number", "7"), ("choice", "A"), ("text", "yes"), ("text", "été"), ("auto", "7")]
    ),
    ("tag", lambda text: Accuracy(answer_from="C", kind="number").is_right(text, "7")),
    ("kind_of", answers.kind_of),
    ("number", answers.extract_number),
    ("letter", answers.extract_letter),
    ("normalise", answers.normalise),
    ("look_back", lambda text: parse(look_back(), text)),
    ("qwen_la", lambda text: parse(qwen_la(), text)),
    ("blocks", lambda text: closed_blocks(text, "REFLECTION")),
    ("balance", lambda text: ReflectionBalance()(group(text))),
    ("back", lambda text: BackReward(layout=look_back(), accuracy=Accuracy(kind="number"))(group(text))),
    ("format", lambda text: TagFormat(layout=qwen_la())(group(text))),
]


def hostile() -> Iterator[str]:
    for unit in UNITS:
        yield unit * (100_000 // len(unit))
    yield from WHOLE


@pytest.mark.parametrize(("name", "ask"), PURE, ids=[name for name, _ in PURE])
def test_f4_our_own_parsers_are_quick_on_hostile_answers(name: str, ask: Callable[[str], Any]) -> None:
    """Bug: 100 kB of brackets or of combining accents keep a step busy for minutes."""
    slow = []
    for text in hostile():
        for whole in (text, f"\\boxed{{{text}}}", f"<C>{text}</C>"):
            start = time.perf_counter()
            ask(whole)
            if (took := time.perf_counter() - start) > 0.5:
                slow.append((text[:20], took))
    assert slow == []


def test_f4_math_and_the_published_rule_are_bounded(tmp_path: Path) -> None:
    """Bug: sympy works on 9**9**9**9 until somebody looks; eval of an answer runs what it says."""
    touched = tmp_path / "touched"
    attack = f"__import__('pathlib').Path({str(touched)!r}).touch()"
    texts = [attack, f"\\text{{{attack}}}", *WHOLE, *(unit * (1900 // len(unit)) for unit in UNITS)]
    for accuracy in (Accuracy(kind="math", timeout=2.0), Accuracy(rule="lookback", timeout=2.0)):
        rubric = Rubric(rewards={"x": accuracy}, weights={"x": 1.0}, max_failed_share=None)
        groups = [
            group(f"\\boxed{{{text}}}", name=str(at), answer=r"2\sqrt{3}") for at, text in enumerate(texts)
        ]
        start = time.perf_counter()
        scored = rubric.score(groups)
        assert time.perf_counter() - start < 45.0
        assert sum(sum(one.rewards) for one in scored) == 0.0
    assert not touched.exists()
    close_all()


def test_f4_nothing_of_ours_evaluates_text() -> None:
    """Bug: eval of a model's answer is remote code execution by whoever writes the questions."""
    package = Path(answers.__file__).parents[1]
    found = [
        f"{file.relative_to(package)}:{number}: {line.strip()}"
        for file in sorted(package.rglob("*.py"))
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if re.search(r"(?<![\w.`])(?:eval|exec|compile|sympify|parse_expr|literal_eval)\(", line)
    ]
    assert found == []
