"""Section C: signals, time limits, closed terminals. The work is saved, the exit code says what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from reflectvlm.data.digits import Digits
from reflectvlm.interrupt import Abandoned, abandonable, committed, safe_point
from reflectvlm.models.decoder import Decoder
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.train.checkpoint import CheckpointStore
from reflectvlm.train.rl import RLTrainer
from reflectvlm.train.signals import OUT_OF_TIME, StopRequest, one_command
from test_reliability_b_resume import start, wait_for_steps
from training import at_call, logged, same_runs, small_brpo_copy, small_rl, small_sft

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
AUTO = {"resume": "auto"}


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    """No test may leave its own handler behind in the test process."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    after = {number: signal.getsignal(number) for number in before}
    assert after == before


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "SIGINT", 130), (signal.SIGHUP, "SIGHUP", 129)],
)
def test_c1_first_signal_only_asks(number: int, name: str, code: int) -> None:
    """Bug: a signal tears a step apart, or is forgotten. 143 = 128 + 15, 130 = 128 + 2, 129 = 128 + 1."""
    with StopRequest() as stop:
        assert (stop.requested, stop.reason, stop.exit_code) == (False, None, 0)
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.reason, stop.exit_code) == (True, name, code)


@pytest.mark.parametrize(
    ("second", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_c1_second_signal_stops_at_once(second: int, error: type[BaseException]) -> None:
    """Bug: a hung step makes a run unstoppable short of SIGKILL."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(error) as caught:
            os.kill(os.getpid(), second)
        assert second == signal.SIGINT or caught.value.code == 143
        assert stop.reason == "SIGTERM"


def test_c1_third_signal_does_not_even_clean_up() -> None:
    """Bug: a clean-up that hangs (a tracker that waits for its server) cannot be left."""
    code = """
import os, signal, time
from reflectvlm.train.signals import StopRequest
with StopRequest():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == 143


def test_c1_handlers_come_back_after_an_error() -> None:
    """Bug: a failed run in a notebook swallows every later Ctrl-C (see the fixture)."""
    with pytest.raises(RuntimeError, match="inside"), StopRequest():
        raise RuntimeError("inside")


def test_c1_other_threads_are_left_alone() -> None:
    """Bug: "signal only works in main thread" when a notebook trains in a thread."""
    seen: list[bool] = []

    def train() -> None:
        with StopRequest() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [False]


def test_c1_work_is_given_up_only_until_weights_change() -> None:
    """Bug: half an update is given up, or a rollout of minutes is not."""
    asked = False
    safe_point()  # nothing may be given up out here
    with abandonable(lambda: asked):
        safe_point()
        asked = True
        with pytest.raises(Abandoned):
            safe_point()
        committed()
        safe_point()
        with abandonable(lambda: True), pytest.raises(Abandoned):  # a block of its own
            safe_point()
        safe_point()
    safe_point()


# Where the signal comes (calls are counted from the first step on), and the steps that are saved then. A step
# of small_rl is 2 prompts, one generate, 2 groups and 4 updates; evaluations come after every second one.
POINTS = [
    (small_rl, QwenVL, "prompt", 4, {1}, "reading rows"),
    (small_rl, InProcessEngine, "groups", 2, {1}, "rollout"),
    (small_rl, Rubric, "score", 2, {1}, "reward"),
    (small_rl, RLTrainer, "update", 1, {0}, "before the first update: given up"),
    (small_rl, torch.optim.AdamW, "step", 2, {1}, "after an update: finished"),
    (small_rl, CheckpointStore, "save", 1, {2, 3}, "saving"),
    (small_sft, torch.optim.AdamW, "step", 3, {3}, "the only update: finished"),
    (small_brpo_copy, Decoder, "__call__", 30, {0, 1, 2, 3, 4}, "decoding with blocks"),
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("make", "owner", "name", "call", "done", "where"), POINTS, ids=[point[5] for point in POINTS]
)
def test_c1_a_signal_anywhere_saves_and_resumes_exactly(
    make,
    owner,
    name,
    call,
    done,
    where,  # noqa: ARG001
    number,
    tmp_path,
    monkeypatch,
    whole_of,
):
    """Bug: a preempted job loses more than the step at hand, or goes on otherwise than it would have."""
    fired = []

    def act():
        fired.append(1)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as hook:
        trainer = make(tmp_path)
        at_call(owner, name, call, act, hook, within=trainer)
        stopped = trainer.run()
    assert fired
    assert (stopped.finished, stopped.exit_code) == (False, 128 + number)
    saved = max((stopped.folder / "checkpoints").glob("step-*"))
    assert int(saved.name.removeprefix("step-")) in done
    same_runs(make(tmp_path, output=AUTO).run().folder, whole_of(make))


@pytest.fixture(scope="module")
def whole_of(tmp_path_factory):
    """The unbroken run of a kind, made once."""
    made = {}

    def find(make):
        if make not in made:
            made[make] = make(tmp_path_factory.mktemp("whole")).run().folder
        return made[make]

    return find


def test_c1_sigterm_of_a_process_saves_and_exits_with_its_code(tmp_path):
    """Bug: a preempted job loses its last steps, or looks as if it had ended well."""
    child = start(tmp_path, 500)
    wait_for_steps(tmp_path / "rl" / "metrics.jsonl", 2)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 128 + signal.SIGTERM
    saved = max((tmp_path / "rl" / "checkpoints").glob("step-*"))
    steps = [row["step"] for row in logged(tmp_path / "rl") if "loss" in row]
    assert int(saved.name.removeprefix("step-")) == steps[-1]
    assert not (tmp_path / "rl" / "summary.json").exists()


def test_c1_a_second_signal_waits_for_no_save(tmp_path, monkeypatch):
    """Bug: "stop at once" takes as long as the checkpoint of a large model that is just being written."""
    written = threading.Event()
    save = CheckpointStore.save

    def slowly(self, *arguments, **named):
        time.sleep(4)
        written.set()
        return save(self, *arguments, **named)

    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    trainer = small_rl(tmp_path, output={"save_every": 1})
    with monkeypatch.context() as hook:
        hook.setattr(CheckpointStore, "save", slowly)
        at_call(RLTrainer, "update", 2, twice, hook, within=trainer)
        with pytest.raises(SystemExit) as caught:
            trainer.run()
        assert not written.is_set()
        assert written.wait(20)
    assert caught.value.code == 143


def test_c1_a_second_signal_leaves_a_process_that_hangs(tmp_path):
    """Bug: a step that hangs (here in a data row) keeps the process until somebody finds `kill -9`."""
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from training import small_rl
from reflectvlm.models.qwen_vl import QwenVL
def hang(*_):
    print("hangs", flush=True)
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass
QwenVL.score = hang
small_rl({str(tmp_path)!r}).run()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    while "hangs" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=30) == 143
    child.stdout.close()


TRAIN = """
import sys
sys.path.insert(0, {here!r})
from training import small_rl
result = small_rl({root!r}, steps=4, output={{"save_every": 1, "print_every": 1}}).run()
print("after", file=sys.stderr)
sys.exit(result.exit_code)
"""


def test_c2_a_closed_pipe_does_not_stop_a_run(tmp_path):
    """Bug: `reflectvlm train … | head -1` ends the training with BrokenPipeError."""
    code = TRAIN.format(here=str(Path(__file__).parent), root=str(tmp_path))
    with (tmp_path / "stderr").open("w") as errors:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=errors)
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.wait(timeout=120) == 0
    told = (tmp_path / "stderr").read_text()
    assert "after" in told
    assert "BrokenPipe" not in told
    assert (tmp_path / "rl" / "summary.json").is_file()


def test_c2_no_standard_streams_at_all(tmp_path):
    """Bug: a job whose stdout, stderr and stdin are closed dies at its first line."""
    code = TRAIN.format(here=str(Path(__file__).parent), root=str(tmp_path))
    line = f'"{sys.executable}" -c "$CODE" <&- >&- 2>&-'
    done = subprocess.run(["bash", "-c", line], env=os.environ | {"CODE": code}, timeout=120, check=False)
    assert done.returncode == 0
    assert (tmp_path / "rl" / "summary.json").is_file()


def test_c2_a_hung_up_terminal_saves(tmp_path):
    """Bug: closing the terminal kills the run without a save; under nohup it must not stop it at all."""
    child = start(tmp_path / "a", 500)
    wait_for_steps(tmp_path / "a" / "rl" / "metrics.jsonl", 1)
    child.send_signal(signal.SIGHUP)
    assert child.wait(timeout=60) == 129
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, ignored)


def test_c3_the_time_limit_saves_before_it_is_over(tmp_path, monkeypatch, whole_of, capsys):
    """Bug: a job is killed by its queue in the middle of a step that a limit should have ended."""
    now = [0.0]
    real = StopRequest.__init__

    def with_clock(self, max_minutes=None):
        real(self, max_minutes, clock=lambda: now[0])

    with monkeypatch.context() as hook:
        hook.setattr(StopRequest, "__init__", with_clock)
        at_call(RLTrainer, "update", 2, lambda: now.__setitem__(0, 59.0), hook)
        stopped = small_rl(tmp_path, output={"max_minutes": 1}).run()
    assert (stopped.finished, stopped.exit_code) == (False, OUT_OF_TIME)
    assert "stopped by max_minutes=1 after step" in capsys.readouterr().out
    assert max((stopped.folder / "checkpoints").glob("step-*")).name == "step-000001"
    same_runs(small_rl(tmp_path, output=AUTO).run().folder, whole_of(small_rl))


def test_c3_minutes_count_from_the_start_of_the_command() -> None:
    """Bug: a run whose stages have used up the time begins to count anew, and is killed by the queue."""
    now = [100.0]
    with one_command(lambda: now[0]):
        now[0] += 50
        with StopRequest(1.0, clock=lambda: now[0]) as stop:
            assert stop.seconds_left() == pytest.approx(10)
            stop.reserve = 4
            now[0] += 5.9
            assert not stop.requested
            now[0] += 0.2
            assert stop.requested
            assert (stop.reason, stop.exit_code) == ("max_minutes=1", 75)
    with StopRequest(1.0, clock=lambda: now[0]) as stop:  # the next one, in a notebook
        assert stop.seconds_left() == pytest.approx(60)


def test_c4_reward_workers_die_with_the_run(tmp_path):
    """Bug: `kill -9` of the training leaves processes that hang in a reward for ever."""
    reward = tmp_path / "slow.py"
    reward.write_text(
        "import os, time\n"
        "def hang(texts):\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from training import small_rl
from reflectvlm.rewards.custom import Custom
from reflectvlm.rewards.rubric import Rubric
slow = Custom(function={f"{reward}:hang"!r}, timeout=600)
rubric = Rubric(rewards={{"slow": slow}}, weights={{"slow": 1.0}})
small_rl({str(tmp_path)!r}, rubric=rubric, test=None).run()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert child.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)
    worker = int((tmp_path / "pid").read_text())
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    limit = time.monotonic() + 30
    while _alive(worker):
        assert time.monotonic() < limit, "the worker outlived its run"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_c_data_of_a_stopped_run_is_whole(tmp_path, monkeypatch):
    """Bug: the cursor of a given-up step stays where it was, and its rows are never seen."""
    with monkeypatch.context() as hook:
        trainer = small_rl(tmp_path, data=Digits(size=12))
        at_call(
            InProcessEngine, "groups", 2, lambda: os.kill(os.getpid(), signal.SIGTERM), hook, within=trainer
        )
        trainer.run()
    assert trainer.position == 2  # one step of two rows is done; the second was given up
