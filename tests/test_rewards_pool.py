"""Several workers for one function: side by side, in order, and over with one interrupt."""

# ruff: noqa: ARG002 - scripted fakes take what they are passed

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from reflectvlm.rewards import Accuracy, Custom, RewardError, Rubric, TagFormat, WorkerPool
from reflectvlm.rewards import maths as maths_module
from reflectvlm.rewards.lanes import side_by_side
from reflectvlm.rewards.maths import Equal, math_pool, settle
from reflectvlm.rewards.pool import default_size, shared_pool
from reflectvlm.tags import grpo
from reflectvlm.types import Prompt, Rollout, Sample

FUNCTIONS = """
import os, time
calls = 0
def wait(seconds):
    time.sleep(seconds)
    return seconds
def count(value):
    global calls
    calls += 1
    time.sleep(0.02 * (value % 3))
    return [value, calls]
def die(value): return os._exit(value) if value == 2 else value
def hang(): return 9**9**9**9
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("pool") / "functions.py"
    file.write_text(FUNCTIONS)
    return str(file)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(3)
    yield pool
    pool.close()


def test_calls_run_side_by_side_and_come_by_place(pool: WorkerPool, path: str) -> None:
    """Bug: groups are scored one after another; or the value that is ready first goes to the first row."""
    waits = [1.0, 0.0, 0.5]
    pool.map(f"{path}:wait", [{"seconds": 0.0}] * 3, 20.0)
    start = time.perf_counter()
    assert pool.map(f"{path}:wait", [{"seconds": one} for one in waits], 20.0) == waits
    assert time.perf_counter() - start < 1.5  # their sum
    assert pool.map(f"{path}:wait", [], 1.0) == []


def test_a_function_that_counts_sees_the_same_calls_in_every_run(path: str) -> None:
    """Bug: which process gets a call depends on which is free, and so does what a stateful reward says."""
    seen = []
    for _ in range(2):
        pool = WorkerPool(3)
        seen.append(pool.map(f"{path}:count", [{"value": value} for value in range(9)], 20.0))
        pool.close()
    # Call i goes to worker i % 3, and is that worker's call number i // 3.
    assert seen[0] == seen[1] == [[value, value // 3 + 1] for value in range(9)]


def test_one_that_dies_costs_its_call(pool: WorkerPool, path: str) -> None:
    """Bug: a crash takes along what its process had still to do."""
    found = pool.map(f"{path}:die", [{"value": value} for value in range(9)], 20.0)
    assert isinstance(found[2], RewardError)
    assert found[:2] + found[3:] == [0, 1, 3, 4, 5, 6, 7, 8]
    assert [worker.starts for worker in pool.workers] == [1, 1, 2]


def test_an_interrupt_ends_all_calls(pool: WorkerPool, path: str) -> None:
    """Bug: Ctrl-C waits for the time-out of every call, or leaves processes behind that compute on."""
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        pool.map(f"{path}:hang", [{}] * 6, 60.0)
    pool.close()
    assert time.perf_counter() - start < 6.0
    assert pool.pids == ()


def test_one_process_for_one_call(path: str) -> None:
    """Bug: a single group starts four interpreters."""
    pool = WorkerPool(4)
    pool.call(f"{path}:wait", {"seconds": 0.0}, 20.0)
    assert len(pool.pids) == 1
    pool.close()
    assert pool.pids == ()
    with pytest.raises(ValueError, match=r"number of workers is 0\. It must be at least 1"):
        WorkerPool(0)
    assert 1 <= default_size() <= 4
    assert shared_pool("a.b") is shared_pool("a.b")
    assert shared_pool("a.b", 2) is not shared_pool("a.b")


def test_an_exception_of_a_lane_is_the_callers() -> None:
    """Bug: an exception in a thread is printed and forgotten, and a value is missing."""

    def boom() -> None:
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        side_by_side([lambda: 1, boom, lambda: 2], threads=2)
    assert side_by_side([lambda: 1, lambda: 2, lambda: 3], threads=2) == [1, 2, 3]


def test_equal_questions_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: eight equal answers of a group cost eight runs of sympy, in every step again."""
    asked: list[Any] = []

    class Scripted:
        def map(self, target: str, calls: list[dict[str, Any]], timeout: float, *, first: int) -> list[Any]:
            asked.extend(call["answer"] for call in calls)
            return [RewardError("timeout", "slow") if call["answer"] == "z" else True for call in calls]

    monkeypatch.setattr(maths_module, "math_pool", Scripted)
    questions = [Equal("math_equal", "once", answer) for answer in ("x", "z", "x")]
    for _ in range(2):
        first, failed, last = settle(questions, 1.0)
        assert (first, last) == (True, True)
        assert isinstance(failed, RewardError)
    assert asked == ["x", "z", "z"]  # a failure is no decision, and is not remembered


def group(name: str, answer: str, *texts: str) -> tuple[Rollout, ...]:
    prompt = Prompt(sample=Sample(id=name, question="?", answer=answer), spans=())
    return tuple(Rollout(prompt=prompt, spans=(), text=text, stop="eos") for text in texts)


def test_many_groups_are_scored_as_one_after_another() -> None:
    """Bug: scoring a step at once gives a row its neighbour's value."""
    rewards: dict[str, Any] = {"accuracy": Accuracy(), "format": TagFormat(layout=grpo())}
    rewards["length"] = Custom(function=lambda texts: [float(len(text)) for text in texts], workers=3)
    rewards["share"] = lambda group: [1.0 / len(group)] * len(group)
    together = Rubric(rewards=rewards, weights=dict.fromkeys(rewards, 0.5))
    groups = [
        group("a", r"2\sqrt{3}", r"\boxed{\sqrt{12}}", r"\boxed{\sqrt{13}}", r"<think>a</think>\boxed{3}"),
        group("b", "5", r"\boxed{5}"),
        group("c", "x^2", r"\boxed{x x}", "none"),
        group("none", "", r"\boxed{5}", "x"),
    ]
    single = Rubric(rewards=rewards, weights=dict.fromkeys(rewards, 0.5))
    at_once, alone = together.score(groups), [single(one) for one in groups]
    assert [one.rewards for one in at_once] == [one.rewards for one in alone]
    assert [one.scored for one in at_once] == [one.scored for one in alone]
    assert [one.parts["accuracy"] for one in at_once[:3]] == [(1.0, 0.0, 0.0), (1.0,), (1.0, 0.0)]
    assert at_once[3].scored == (False, False)  # an empty gold answer is its own row's fault alone
    assert together.score([]) == []
    math_pool().close()
