"""Section F of the reliability cases: rewards and judges may do anything, and the step goes on.

F1 what a reward does, F2 where it is called, F3 judges, F4 hostile answers.
"""

# ruff: noqa: ARG001, ARG005 - scripted rewards take what they are passed
from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reflectvlm.advantages import GroupMean
from reflectvlm.data.digits import Digits
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.rewards import (
    Accuracy,
    BackReward,
    Custom,
    Judged,
    RecordedJudge,
    ReflectionBalance,
    RewardFailure,
    Rubric,
    TagFormat,
    Verdict,
    answers,
    per_rollout,
)
from reflectvlm.rewards.reflection import closed_blocks
from reflectvlm.tags import grpo, look_back, parse, qwen_la
from reflectvlm.train.evaluate import Evaluation
from reflectvlm.types import Prompt, Rollout, Sample, ScoredGroup, Text
from training import small_rl

FUNCTIONS = r'''
import ctypes, os, signal, subprocess, sys, threading, time
import math

def good(texts): return [float(len(text)) for text in texts]

def does(action):
    """`action` in every call that has the text "bad" among its own; else the lengths."""
    def reward(texts):
        value = action(texts) if "bad" in texts else good(texts)
        return value
    return reward

def boom(texts): raise KeyError("missing column")
class Rude(Exception):
    def __str__(self): raise RuntimeError("no text")
def rude_error(texts): raise Rude()
def endless(texts):
    while True: pass
def flood(texts):
    for _ in range(2000): print("x" * 100_000)
    return [math.nan for _ in texts]
def own_pipes(texts):
    os.closerange(3, 100)
    return good(texts)
def stop_itself(texts): os.kill(os.getpid(), signal.SIGSTOP)
def daemon(texts):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(300)
        os._exit(0)
    os.wait()
    os._exit(3)
def program(texts):
    subprocess.Popen(["sleep", "300"])
    time.sleep(300)
def sympy_hang(texts):
    import sympy
    return [float(sympy.sympify("9**9**9**9")) for _ in texts]

raises = does(boom)
rude = does(rude_error)
recurses = does(lambda texts: (lambda f: f(f))(lambda f: f(f)))
memory_error = does(lambda texts: bytearray(1 << 62))
sleeps = does(lambda texts: time.sleep(300))
loops = does(endless)
hangs_in_c = does(lambda texts: 9**9**9**9)
hangs_in_sympy = does(sympy_hang)
never_ends = does(lambda texts: iter(int, 1))
nan = does(lambda texts: [math.nan for _ in texts])
infinite = does(lambda texts: [-math.inf for _ in texts])
nothing = does(lambda texts: None)
text = does(lambda texts: "1" * len(texts))
texts_ = does(lambda texts: ["1.0" for _ in texts])
mapping = does(lambda texts: dict.fromkeys(range(len(texts)), 1.0))
too_few = does(lambda texts: [1.0] * (len(texts) - 1))
too_many = does(lambda texts: [1.0] * 3_000_000)
one_bool = does(lambda texts: True)
huge_number = does(lambda texts: [10**400 for _ in texts])
an_object = does(lambda texts: [object() for _ in texts])
leaves = does(lambda texts: sys.exit(3))
leaves_at_once = does(lambda texts: os._exit(7))
interrupts = does(lambda texts: os.kill(os.getpid(), signal.SIGINT))
segfaults = does(lambda texts: ctypes.string_at(0))
aborts = does(lambda texts: os.abort())
stops = does(stop_itself)
floods = does(flood)
closes_pipes = does(own_pipes)
leaves_a_daemon = does(daemon)
starts_a_program = does(program)
'''

HARMLESS = r"""
import os, sys, time

def mutates(texts, answers, group):
    texts[:] = []
    answers.clear()
    group[0].prompt.sample.columns.clear()
    return [1.0 for _ in group]
def prints(texts):
    print("a line", flush=True); print("another", file=sys.stderr); os.write(1, b"and one more\n")
    return [1.0 for _ in texts]
def closes(texts):
    for fd in (0, 1, 2):
        try: os.close(fd)
        except OSError: pass
    return [1.0 for _ in texts]
def forks(texts):
    os.fork()
    return [1.0 for _ in texts]
def forgets(texts):
    globals().pop("forgets", None)
    sys.modules.clear()
    return [1.0 for _ in texts]
def booleans(texts): return [True for _ in texts]
def generates(texts): return (1.0 for _ in texts)
def fractions(texts):
    from fractions import Fraction
    return [Fraction(1) for _ in texts]
async def waits(texts): return [1.0 for _ in texts]
def time_bomb(texts):
    import threading
    threading.Timer(0.1, os._exit, (9,)).start()
    return [1.0 for _ in texts]
"""

FAILS = re.findall(r"^(\w+) = does", FUNCTIONS, re.M)
LASTS = re.findall(r"^(?:async )?def (\w+)", HARMLESS, re.M)
TIMED_OUT = {
    "sleeps",
    "loops",
    "hangs_in_c",
    "hangs_in_sympy",
    "stops",
    "starts_a_program",
    "leaves_a_daemon",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("f1")
    (folder / "fails.py").write_text(FUNCTIONS)
    (folder / "harmless.py").write_text(HARMLESS)
    return folder


def group(*texts: str, name: str = "row", answer: str = "5") -> tuple[Rollout, ...]:
    prompt = Prompt(sample=Sample(id=name, question="2 + 3?", answer=answer, columns={"n": 1}), spans=())
    spans = (Text(ids=(1,), trained=True, logprobs=(-0.1,)),)
    return tuple(Rollout(prompt=prompt, spans=spans, text=text, stop="eos", offsets=(0,)) for text in texts)


def marked() -> list[int]:
    """Processes that were started by a worker of ours, workers included, whoever their parent is now."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"REFLECTVLM_WORKER=" in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def zombies() -> list[int]:
    """Children of this process that have ended and that nobody has waited for."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except (OSError, ValueError):
            continue
        if state == "Z" and int(parent) == os.getpid():
            found.append(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(marked())
    yield
    end = time.monotonic() + 3.0
    while (left := [pid for pid in marked() if pid not in before]) and time.monotonic() < end:
        time.sleep(0.05)
    assert (left, zombies()) == ([], [])


@pytest.mark.parametrize("name", FAILS)
def test_f1_a_reward_that_misbehaves_costs_its_rows(
    name: str, folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bug: one reward that raises, hangs, crashes or gives nonsense ends a run of days, or poisons it."""
    timeout = {"hangs_in_sympy": 2.0}.get(name, 0.5 if name in TIMED_OUT else 10.0)
    custom = Custom(function=f"{folder}/fails.py:{name}", timeout=timeout, workers=2, memory_gib=2.0)
    rubric = Rubric(rewards={"x": custom}, weights={"x": 1.0})
    groups = [group("a", "bb", name="first"), group("bad", "c", name="second"), group("dd", name="third")]
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING, logger="reflectvlm"):
        scored = rubric.score(groups)
    assert time.perf_counter() - start < 12.0
    assert [one.scored for one in scored] == [(True, True), (False, False), (True,)]
    assert [one.rewards for one in scored] == [(1.0, 2.0), (0.0, 0.0), (2.0,)]
    assert GroupMean()(scored[1]).tolist() == [0.0, 0.0]
    warnings = [text for text in caplog.messages if "Reward 'x' failed" in text]
    assert len(warnings) == 1
    assert "on sample 'second'" in warnings[0]
    assert "2 rollouts" in warnings[0]
    # The pool recovers: the same groups without the bad text are all scored.
    assert [one.scored for one in rubric.score([groups[0], groups[2]])] == [(True, True), (True,)]
    assert len(capfd.readouterr().err) < 200_000  # what it printed was bounded
    custom.close()


@pytest.mark.parametrize("name", LASTS)
def test_f1_what_a_reward_does_beside_its_values_changes_nothing(name: str, folder: Path) -> None:
    """Bug: a reward that prints, forks or closes a file spoils the next reply, or the row it was given."""
    custom = Custom(function=f"{folder}/harmless.py:{name}", timeout=20.0, workers=1)
    rubric = Rubric(rewards={"x": custom}, weights={"x": 1.0})
    one = group("a", "b")
    for _ in range(4):
        assert rubric(one).rewards == (1.0, 1.0)
        if name == "time_bomb":
            time.sleep(0.4)  # it dies between two calls, which is no fault of the next
    assert (one[0].text, one[0].prompt.sample.columns) == ("a", {"n": 1})
    custom.close()


def test_f1_a_number_too_large_to_train_on_is_a_failure() -> None:
    """Bug: 1e300 is finite, its square in a deviation is not: the advantages vanish, or the run ends."""
    large = per_rollout(lambda one: float(one.text))
    scored = Rubric(rewards={"x": large}, weights={"x": 1.0})(group("1e300", "1.0", "0.0"))
    assert scored.scored == (False, True, True)
    assert GroupMean(scale="none")(scored).tolist() == [0.0, 0.5, -0.5]


VALUES: list[tuple[Any, bool]] = [
    (torch.ones(2), True),
    (torch.ones(2, dtype=torch.bfloat16), True),
    (np.ones(2, dtype=np.float16), True),
    ([np.float32(1.0), torch.tensor(1.0)], True),
    ([True, Fraction(1)], True),
    (torch.ones(2, 1), False),
    (np.array([1.0, np.nan]), False),
    (torch.tensor(1.0), False),
    ({1.0, 2.0}, False),
    ([1 + 0j, 1 + 0j], False),
    (b"12", False),
]


@pytest.mark.parametrize(("value", "sound"), VALUES)
@pytest.mark.parametrize("timeout", [None, 20.0])
def test_f1_values_are_read_alike_here_and_there(value: Any, sound: bool, timeout: float | None) -> None:
    """Bug: a tensor of shape [n, 1] counted in this process and failed in a worker."""
    custom = Custom(function=lambda texts: value, timeout=timeout)
    scored = Rubric(rewards={"x": custom}, weights={"x": 1.0})(group("a", "b"))
    assert scored.scored[1] is sound
    assert all(map(math.isfinite, scored.rewards))


def test_f1_a_reward_that_leaks_gets_a_fresh_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a reward that keeps what it saw takes the machine's memory within days."""
    monkeypatch.setattr("reflectvlm.rewards.isolation._MAX_GROWTH_BYTES", 100 << 20)
    (folder / "leak.py").write_text(
        "kept = []\ndef leaks(texts):\n    kept.append(b'x' * (60 << 20))\n    return [1.0 for _ in texts]\n"
    )
    custom = Custom(function=f"{folder}/leak.py:leaks", workers=1)
    rubric = Rubric(rewards={"x": custom}, weights={"x": 1.0})
    assert all(rubric(group("a")).scored == (True,) for _ in range(7))
    assert custom._pool is not None
    # A process that grew by 60 MiB a call since its first one ends after its third.
    assert custom._pool.workers[0].starts == 3
    custom.close()


def test_f1_a_reward_that_fails_on_half_of_all_rows_ends_the_run() -> None:
    """Bug: the half of the rows on which it works trains on for days, and nobody reads the warnings."""
    rubric = Rubric(rewards={"x": per_rollout(lambda one: 1 / int(one.text))}, weights={"x": 1.0})
    step = [group(*"0101", name=f"row-{i}") for i in range(16)]
    for _ in range(3):
        rubric.score(step)  # 3 * 64 = 192 values are too few to tell
    with pytest.raises(RewardFailure, match=r"failed on 50% of its latest 256 values.*max_failed_share=0.25"):
        rubric.score(step)
    patient = Rubric(rewards=rubric.rewards, weights=rubric.weights, max_failed_share=0.5)
    for _ in range(40):
        patient.score(step)


def test_f1_the_budget_survives_a_restart() -> None:
    """Bug: a run that is stopped and resumed every hour never uses its budget up."""
    rewards: dict[str, Any] = {"x": per_rollout(lambda one: 1 / int(one.text))}
    straight = Rubric(rewards=rewards, weights={"x": 1.0}, max_failures=5)
    straight(group("0", "0", "0"))
    resumed = Rubric(rewards=rewards, weights={"x": 1.0}, max_failures=5)
    resumed.load_state(straight.state())
    assert resumed.state() == straight.state() == {"failed": 3, "recent": {"x": [[3, 3]]}}
    with pytest.raises(RewardFailure, match="6 failures so far, max_failures=5"):
        resumed(group("0", "0", "0"))


def test_f1_a_reward_that_always_fails_writes_a_line_a_step(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a million equal warnings fill the disk and hide the one that matters."""

    def boom(one: Rollout) -> float:
        raise KeyError(f"no column {one.text!r} in row {one.prompt.sample.id}")

    rubric = Rubric(rewards={"x": per_rollout(boom)}, weights={"x": 1.0}, max_failed_share=None)
    for step in range(10):
        rubric.score([group(*"abcdefgh", name=f"row-{step}-{i}") for i in range(16)])
    assert len(caplog.messages) == 10
    assert "failed on sample 'row-0-0', 'row-0-1'" in caplog.messages[0]
    assert "(128 rollouts; on_error='drop')" in caplog.messages[0]
    assert "failed again on sample 'row-9-0'" in caplog.messages[9]
    assert "1,280 failures so far" in caplog.messages[9]
    assert max(map(len, caplog.messages)) < 1000


def test_f1_different_reasons_without_end_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: an error text that holds the row's content is new on every row."""

    def boom(one: Rollout) -> float:
        raise ValueError(f"cannot read {one.text}" + "x" * 10_000)

    rubric = Rubric(rewards={"x": per_rollout(boom)}, weights={"x": 1.0}, max_failed_share=None)
    letters = [chr(97 + a) + chr(97 + b) for a in range(20) for b in range(20)]
    for at in range(0, 400, 10):
        rubric.score([group(*letters[at : at + 10])])
    # 20 reasons in full, and one line for each of the 38 steps that have more.
    assert len(caplog.messages) == 20 + 38


def test_f1_an_evaluation_spends_nothing_of_the_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: with max_failures=5 a run that looks at its validation rows ends; one that does not goes on."""

    def fails_held_out(one: Rollout) -> float:
        if not one.prompt.sample.id.startswith("digits-train"):
            raise KeyError("no such column")
        return float(sum(one.sampled_ids) % 7)

    found = []
    for every in (0, 1):
        rubric = Rubric(rewards={"x": per_rollout(fails_held_out)}, weights={"x": 1.0}, max_failures=5)
        held_out = Evaluation(data=Digits(split="validation", size=3), max_tokens=4)
        trainer = small_rl(
            tmp_path / str(every),
            rubric=rubric,
            evaluation=held_out,
            test=None,
            output={"checks": False, "eval_every": every},
        )
        # Six evaluations of three rows each fail 18 times.
        found.append((trainer.run().finished, rubric.state()["failed"]))
    assert found == [(True, 0)] * 2
    assert any("'digits-validation-0'" in text for text in caplog.messages)
    with pytest.raises(RewardFailure, match="max_failures=2"):  # of one evaluation alone
        dataclasses.replace(trainer, rubric=dataclasses.replace(rubric, max_failures=2)).evaluate(held_out)


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


def close_all(*customs: Custom) -> None:
    from reflectvlm.rewards.maths import math_pool

    for custom in customs:
        custom.close()
    math_pool().close()


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
