"""The killable worker: every way a function can misbehave ends as a value with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reflectvlm.rewards.isolation import RewardError, Worker

FUNCTIONS = """
import os, sys, time

def add(a, b): return a + b
def echo(value): return value
async def later(a): return a + 1
def hang_in_c(): return 9**9**9**9
def hang_in_sleep(): time.sleep(60)
def leave(): sys.exit(3)
def die(): os._exit(7)
def segfault(): os.kill(os.getpid(), 11)
def boom(): raise KeyError("missing column")
def talk(): print("noise on stdout"); sys.stdout.flush(); os.write(1, b"more"); return 5
def read_stdin(): return sys.stdin.read()
def strange(): return object()
def fork_and_return():
    os.fork()
    return os.getpid()
def leave_a_child(path):
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    open(path, "w").write(str(pid))
    os._exit(1)
def eat(): return len(bytearray(2 * 2**30))
def modules(): return sorted(name for name in sys.modules if name in ("torch", "reflectvlm", "numpy"))
def exact(b, a=1, *, c=2, **rest): return 0
def flood():
    for _ in range(300): print("x" * 10_000)
    return 1
def daemon(path):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            open(path, "w").write(str(os.getpid()))
            time.sleep(60)
        os._exit(0)
    os.wait()
    time.sleep(60)
def close_requests():
    os.closerange(3, 64)
def close_one(): os.close(3); return 1  # the pipe that the next request comes through
def rude():
    class Rude(Exception):
        def __str__(self): raise ValueError("no text")
    raise Rude()
def bomb():
    import threading
    threading.Timer(0.05, os._exit, (9,)).start()
    return 1
def core(): import resource; return resource.getrlimit(resource.RLIMIT_CORE)
class Array:
    def tolist(self): return [1.0, 2.0]
def array(): return Array()
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("functions") / "functions.py"
    file.write_text(FUNCTIONS)
    return str(file)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def gone(pid: int, within: float = 5.0) -> bool:
    """True once the process does not exist or is only waiting to be reaped by somebody else."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_values_come_back(worker: Worker, path: str) -> None:
    """One process serves all calls: plain, async, by dotted name, big arguments, printing, arrays."""
    assert worker.call(f"{path}:add", {"a": 1, "b": 2}, 5.0) == 3
    assert worker.call(f"{path}:later", {"a": 1}, 5.0) == 2
    assert worker.call("operator:neg", {}, 5.0).kind == "error"  # wants a positional argument
    assert worker.call("json.loads", {"s": "[1, null, NaN]"}, 5.0)[:2] == [1, None]
    assert len(worker.call(f"{path}:echo", {"value": "x" * 3_000_000}, 20.0)) == 3_000_000
    assert worker.call(f"{path}:talk", {}, 5.0) == 5
    assert worker.call(f"{path}:read_stdin", {}, 5.0) == ""
    assert worker.call(f"{path}:array", {}, 5.0) == [1.0, 2.0]
    assert worker.call(f"{path}:modules", {}, 5.0) == []
    assert worker.starts == 1


def test_parameters_are_found_without_importing_here(worker: Worker, path: str) -> None:
    """Reading the signature here would import a user's module into the trainer."""
    assert worker.parameters(f"{path}:exact") == (("b",), ("a", "c"), True)
    assert "functions" not in sys.modules


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("hang_in_sleep", "timeout", "gave no answer in 0.3 s"),
        ("leave", "error", "SystemExit: 3"),
        ("die", "crash", "exit status 7"),
        ("segfault", "crash", "SIGSEGV"),
        ("boom", "error", "KeyError: 'missing column'"),
        ("strange", "error", "not JSON serializable"),
        ("missing", "load", "has no 'missing'; it has"),
    ],
)
def test_misbehaviour_is_a_value(worker: Worker, path: str, name: str, kind: str, reason: str) -> None:
    """No behaviour of a reward may raise here, hang, or break the next call."""
    error = worker.call(f"{path}:{name}", {}, 0.3)
    assert isinstance(error, RewardError)
    assert error.kind == kind
    assert reason in str(error)
    assert worker.call(f"{path}:add", {"a": 1, "b": 2}, 5.0) == 3
    assert worker.starts == (2 if kind in ("timeout", "crash") else 1)


def test_hang_inside_c_is_killed(worker: Worker, path: str) -> None:
    """9**9**9**9 holds the interpreter lock for hours: no thread and no signal handler can end it."""
    assert worker.call(f"{path}:add", {"a": 1, "b": 2}, 5.0) == 3
    pid, start = worker.pid, time.perf_counter()
    error = worker.call(f"{path}:hang_in_c", {}, 0.5)
    assert isinstance(error, RewardError)
    assert error.kind == "timeout"
    assert time.perf_counter() - start < 15.0
    assert pid is not None
    assert not Path(f"/proc/{pid}").exists()  # not even a zombie


def test_children_of_a_reward_do_not_outlive_it(worker: Worker, path: str, tmp_path: Path) -> None:
    """A child that keeps the pipe open once made a crashed worker look busy, and stayed behind."""
    error = worker.call(f"{path}:leave_a_child", {"path": str(tmp_path / "pid")}, 5.0)
    assert isinstance(error, RewardError)
    assert error.kind == "crash"
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_forked_copy_does_not_answer_twice(worker: Worker, path: str) -> None:
    """Two copies on one pipe would give the next caller somebody else's value."""
    worker.call(f"{path}:fork_and_return", {}, 5.0)
    time.sleep(0.1)
    assert [worker.call(f"{path}:add", {"a": i, "b": 0}, 5.0) for i in range(3)] == [0, 1, 2]


def test_a_daemon_does_not_outlive_its_reward(worker: Worker, path: str, tmp_path: Path) -> None:
    """Bug: what left the process group by `setsid` goes on for ever after the time-out."""
    error = worker.call(f"{path}:daemon", {"path": str(tmp_path / "pid")}, 1.0)
    assert isinstance(error, RewardError)
    assert error.kind == "timeout"
    assert gone(int((tmp_path / "pid").read_text()))


def test_what_is_printed_is_passed_on_and_bounded(
    worker: Worker, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: 3 MB of prints a call fill the log, or the pipe, and then the reward hangs."""
    assert worker.call(f"{path}:talk", {}, 5.0) == 5
    assert "noise on stdout" in capsys.readouterr().err
    assert worker.call(f"{path}:flood", {}, 20.0) == 1
    said = capsys.readouterr().err
    assert 10_000 < len(said) < 200_000
    assert "is dropped" in said


def test_a_death_between_two_calls_costs_no_call(worker: Worker, path: str) -> None:
    """Bug: a reward's leftover ends the process, and the next row, which is sound, is unscored."""
    for start in (1, 2, 3):
        assert worker.call(f"{path}:bomb", {}, 5.0) == 1
        assert worker.starts == start
        time.sleep(0.3)
    for _ in range(10):
        assert worker.call(f"{path}:close_one", {}, 5.0) == 1
        assert worker.call(f"{path}:add", {"a": 1, "b": 2}, 5.0) == 3  # at once: it is only just dying
    assert worker.call(f"{path}:close_requests", {}, 5.0).kind == "crash"
    assert worker.call(f"{path}:add", {"a": 1, "b": 2}, 5.0) == 3


def test_an_exception_that_cannot_be_printed(worker: Worker, path: str) -> None:
    """Bug: an exception class whose text raises takes the process down with it."""
    error = worker.call(f"{path}:rude", {}, 5.0)
    assert isinstance(error, RewardError)
    assert (error.kind, worker.starts) == ("error", 1)


def test_a_crash_leaves_no_core_file(worker: Worker, path: str) -> None:
    """Bug: a reward that crashes at every row fills the disk with cores."""
    assert worker.call(f"{path}:core", {}, 5.0) == [0, 0]


def test_memory_limit(path: str) -> None:
    """A reward that allocates without end must not take the trainer's machine down."""
    worker = Worker(memory_gib=1.0)
    error = worker.call(f"{path}:eat", {}, 10.0)
    worker.close()
    assert isinstance(error, RewardError)
    assert "MemoryError" in str(error)


def test_restarts_leak_nothing(path: str) -> None:
    """Every restart once left two pipes open: a long run ended with 'too many open files'."""
    worker = Worker(max_calls=2)
    worker.call(f"{path}:add", {"a": 1, "b": 2}, 5.0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        worker.call(f"{path}:die", {}, 5.0)
    for i in range(5):
        assert worker.call(f"{path}:add", {"a": i, "b": 0}, 5.0) == i
    # The first add shares its process with the first die; three more die; then 5 calls, 2 a process.
    assert worker.starts == 4 + 3
    assert len(os.listdir("/proc/self/fd")) == before
    worker.close()
    assert len(os.listdir("/proc/self/fd")) < before


def test_threads_share_a_worker(worker: Worker, path: str) -> None:
    """Without a lock two threads read each other's replies."""
    seen: dict[int, object] = {}

    def ask(i: int) -> None:
        for _ in range(10):
            seen[i] = worker.call(f"{path}:add", {"a": i, "b": 0}, 10.0)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {i: i for i in range(4)}
    assert worker.starts == 1


def test_arguments_that_cannot_travel(worker: Worker, path: str) -> None:
    """An unpicklable column is the row's fault and must not kill the run."""
    error = worker.call(f"{path}:echo", {"value": lambda: 0}, 5.0)
    assert isinstance(error, RewardError)
    assert "cannot be pickled" in str(error)


@pytest.mark.parametrize(("name", "end"), [("add", "kill"), ("hang_in_c", "kill"), ("add", "return")])
def test_no_orphans(path: str, name: str, end: str) -> None:
    """`kill -9` of a trainer leaves nobody to clean up; its workers must notice, hanging or not."""
    script = f"""
import os, signal, threading, time
from reflectvlm.rewards.isolation import Worker
worker = Worker()
worker.call({path!r} + ":add", dict(a=1, b=2), 20.0)
print(worker.pid, flush=True)
if {name == "hang_in_c"}:
    threading.Thread(target=worker.call, args=({path!r} + ":hang_in_c", {{}}, 1.0), daemon=True).start()
    time.sleep(0.3)
if {end == "kill"}:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False, timeout=60)
    assert gone(int(done.stdout), within=8.0)
