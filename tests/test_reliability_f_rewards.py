"""F1: a reward may do anything, and the step goes on. F2 to F4 are in `test_reliability_f_steps.py`."""

# ruff: noqa: ARG005 - scripted rewards take what they are passed
from __future__ import annotations

import dataclasses
import logging
import math
import re
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reflectvlm.advantages import GroupMean
from reflectvlm.data.digits import Digits
from reflectvlm.rewards import Custom, RewardFailure, Rubric, per_rollout
from reflectvlm.train.evaluate import Evaluation
from reflectvlm.types import Rollout
from rewarding import group, no_process_is_left
from training import small_rl

__all__ = ["no_process_is_left"]  # the fixture

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
