"""The launcher: its words, the signs of life it reads, and what it does when one of its processes dies, hangs
or is told to stop. Processes here are a few lines of Python; real runs are in test_launch_runs.py."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reflectvlm
from reflectvlm import pulse
from reflectvlm.cli import main
from reflectvlm.interrupt import Abandoned, abandonable, safe_point
from reflectvlm.pulse import LOST, TOLD
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train import group
from reflectvlm.train.launch import Launch
from reflectvlm.train.ranks import ElsewhereFailed, LostRank, Ranks
from reflectvlm.train.signals import StopRequest, agreed

STARTED = ("RANK", "WORLD_SIZE", pulse.VARIABLE)


@pytest.fixture(autouse=True)
def _of_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pulse, "_own", pulse._Own())


def with_paths() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(reflectvlm.__file__).parents[1])}


# -- words ------------------------------------------------------------------------------------------


def test_words_of_the_launcher_are_taken_out() -> None:
    """Bug: a word of the launcher reaches the recipe, which has no such key; or one of the recipe is lost."""
    assert Launch.read(["recipe=grpo", "steps=3"]) == (None, ["recipe=grpo", "steps=3"])
    assert Launch.read(["recipe=grpo", "processes=2", "output.keep=1"]) == (
        Launch(processes=2, on_gpu=False),
        ["recipe=grpo", "output.keep=1"],
    )
    far = ["processes=2", "nodes=3", "node_rank=1", "main_address=node-a", "main_port=29500"]
    assert Launch.read(far)[0] == Launch(
        processes=2, on_gpu=False, nodes=3, node_rank=1, main_address="node-a", main_port=29500
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["processes=two"], "processes is 'two'. It must be a whole number"),
        (["processes=0"], "processes=0. It must be at least 1"),
        (["nodes=2"], "Give gpus=N, or processes=N on a machine without GPUs"),
        (["gpus=2", "processes=2"], "one of the two"),
        (["processes=1", "nodes=2", "node_rank=2"], "Machines count from 0 to nodes - 1"),
        (["processes=1", "nodes=0"], "node_rank=0 with nodes=0"),
        (["processes=1", "nodes=2", "main_address=node-a"], "needs main_address=… and main_port=…"),
        (["processes=1", "nodes=2", "main_port=29500"], "needs main_address=… and main_port=…"),
        (["processes=1", "main_port=many"], "main_port is 'many'"),
    ],
)
def test_words_that_start_nothing_are_refused(words: list[str], told: str) -> None:
    """Bug: a misspelt number starts another number of processes, or machines that never meet."""
    with pytest.raises(RecipeError, match=told):
        Launch.read(words)


@pytest.mark.parametrize(
    ("there", "told"), [(0, "no GPU that torch can use. On its cores: processes=3"), (2, "at most gpus=2")]
)
def test_gpus_that_are_not_there_are_refused(there: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: two processes share a GPU, or one trains on the CPU, without a word."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(RecipeError, match=told):
        Launch.read(["gpus=3"])


def test_a_process_that_was_started_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: torchrun with gpus=8 starts 64 processes."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(RecipeError, match=r"processes=… starts processes, but this is one of 8"):
        Launch.read(["processes=8"])


def test_the_launcher_needs_no_torch() -> None:
    """Bug: beside its processes the launcher takes seconds and hundreds of megabytes; and whoever is one of
    them has imported torch before it was told how to share the cores."""
    code = "import sys, reflectvlm.train.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=with_paths(), check=False).returncode == 0


@pytest.mark.parametrize("given", ["an hour", "0", "-1", "inf", "nan"])
def test_a_patience_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a run that ends all its processes at once, or never."""
    monkeypatch.setenv(pulse.TIMEOUT, given)
    with pytest.raises(ValueError, match=f"REFLECTVLM_TIMEOUT is '{given}'. It must be a number of minutes"):
        pulse.patience_minutes()


@pytest.mark.parametrize("word", ["processes=2", "gpus=8", "nodes=2"])
def test_doctor_refuses_what_it_has_no_use_for(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: "Recipe 'grpo' has no key 'processes'", of a word that train takes."""
    assert main(["doctor", "recipe=grpo", word]) == 2
    assert capsys.readouterr().err == f"error: doctor looks at a recipe in one process. Leave {word} out.\n"


# -- signs of life ----------------------------------------------------------------------------------


def test_a_process_without_launcher_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a plain run leaves files about, or fails for want of one."""
    monkeypatch.chdir(tmp_path)
    assert not pulse.begin()
    with pulse.phase("data"), pulse.waiting():
        pulse.beat()
    assert list(tmp_path.iterdir()) == []


def test_a_pulse_tells_time_phase_and_whether_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a process that waits is taken for one that hangs, or a death is told of another phase."""
    file, now = tmp_path / "pulse", [100.0]
    monkeypatch.setattr(pulse, "clock", lambda: now[0])
    monkeypatch.setenv(pulse.VARIABLE, str(file))
    pulse.create(file)
    assert pulse.read(file) == (100.0, False, "start")
    now[0] = 101.0
    assert pulse.begin()
    assert pulse.VARIABLE not in os.environ, "what this process starts would write into its file"
    assert pulse.read(file) == (101.0, False, "start")
    with pulse.phase("rollout"):
        now[0] = 102.0
        with pulse.phase("reward"):
            assert pulse.read(file) == (102.0, False, "reward")
        assert pulse.read(file).phase == "rollout"
        with pulse.waiting():
            assert pulse.read(file) == (102.0, True, "rollout")
        now[0] = 103.0
        safe_point()
        assert pulse.read(file) == (103.0, False, "rollout")
    assert pulse.read(file).phase == "start"


WRITES = """
from reflectvlm import pulse

pulse.begin()
with pulse.phase("rollout"):
    while True:
        with pulse.phase("rollout"), pulse.waiting():
            pass
"""


def test_a_file_without_any_pulse_is_told(tmp_path: Path) -> None:
    """Bug: a launcher looks for ever at a file that was emptied, and notices nothing else any more."""
    (tmp_path / "pulse").write_bytes(b"")
    with pytest.raises(RuntimeError, match="holds no sign of life"):
        pulse.read(tmp_path / "pulse")


def test_a_pulse_is_whole_whenever_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a launcher looks while a process writes, reads a time of 0 and ends a run that is well."""
    file = tmp_path / "pulse"
    pulse.create(file)
    monkeypatch.setenv(pulse.VARIABLE, str(file))
    began = pulse.clock()
    writer = subprocess.Popen([sys.executable, "-c", WRITES])
    while pulse.read(file).phase == "start":
        time.sleep(0.01)
    try:
        seen = {(one.phase, one.at < began - 1) for one in (pulse.read(file) for _ in range(40_000))}
        assert writer.poll() is None, "it has written all the time"
    finally:
        writer.kill()
        writer.wait()
    assert seen <= {("start", False), ("rollout", False)}
    assert ("rollout", False) in seen


def test_a_process_that_died_while_it_wrote_has_a_pulse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: half a beat is read as one, or nothing is."""
    file = tmp_path / "pulse"
    pulse.create(file)
    monkeypatch.setenv(pulse.VARIABLE, str(file))
    pulse.begin()
    pulse.beat()
    before, whole = pulse.read(file), file.read_bytes()
    pulse.beat()
    after = file.read_bytes()
    changed = [place for place, (one, other) in enumerate(zip(whole, after, strict=True)) if one != other]
    for place in range(changed[0] + 1, changed[-1]):
        file.write_bytes(after[:place] + whole[place:])
        assert pulse.read(file) == before, place


def test_the_phase_of_an_error_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: whoever dies of an error in the update is said to have died in its start."""
    file = tmp_path / "pulse"
    pulse.create(file)
    monkeypatch.setenv(pulse.VARIABLE, str(file))
    pulse.begin()
    with pytest.raises(OSError, match="no memory"), pulse.phase("step"), pulse.phase("update"):
        raise OSError("no memory")
    pulse.beat()
    assert pulse.read(file).phase == "update"


# -- together ---------------------------------------------------------------------------------------


def among(others: list[Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Ranks, list[Any]]:
    """The first of several processes whose others say what they are told to; and what it says itself."""
    said: list[Any] = []

    def gather(_: Ranks, value: Any) -> list[Any]:
        said.append(value)
        return [value, *others]

    monkeypatch.setattr(Ranks, "gather", gather)
    return Ranks(rank=0, world=1 + len(others)), said


def failing(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


class Odd(Exception):
    """Cannot be made from what pickle keeps of it."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def told_by(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a process says whose work fails, after a journey."""
    ranks, said = among([(None, None)], monkeypatch)
    with pytest.raises(type(error)):
        ranks.together(failing(error))
    return pickle.loads(pickle.dumps(said[0]))


def test_results_of_all_come_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a process takes another's result for its own."""
    ranks, said = among([("b", None), ("c", None)], monkeypatch)
    assert ranks.together(lambda: "a") == ["a", "b", "c"]
    assert said == [("a", None)]
    assert ranks.from_first(lambda: "a") == "a"


@pytest.mark.parametrize(
    ("error", "raised", "text", "code"),
    [
        (OSError("the disk is full"), ElsewhereFailed, "rank 1 failed: OSError: the disk is full", TOLD),
        (Odd(1, 2), ElsewhereFailed, "rank 1 failed: Odd: 1 and 2", TOLD),
        (ValueError("steps is 0"), ValueError, "^steps is 0$", None),
        (RecipeError("no such key"), RecipeError, "^no such key$", None),
    ],
)
def test_an_error_of_one_is_one_of_all(
    error: Exception,
    raised: type[Exception],
    text: str,
    code: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bug: others wait for ever for one that has failed, or do not tell what it failed of; what a user wrote
    wrong ends them with different exit codes."""
    ranks, _ = among([told_by(error, monkeypatch)], monkeypatch)
    with pytest.raises(raised, match=text) as caught:
        ranks.together(lambda: None)
    assert getattr(caught.value, "exit_code", None) == code


def test_giving_up_of_one_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the step is given up by one and finished by another."""
    ranks, _ = among([told_by(Abandoned(), monkeypatch)], monkeypatch)
    with pytest.raises(Abandoned):
        ranks.together(lambda: None)
    with pytest.raises(ValueError, match="mine"):
        ranks.together(failing(ValueError("mine")))
    ranks, _ = among([told_by(OSError("gone"), monkeypatch)], monkeypatch)
    with pytest.raises(ElsewhereFailed, match="gone"):
        ranks.together(failing(Abandoned()))


def test_only_what_is_done_alone_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: one of several leaves an update amid the others, who wait for its gradients."""
    ranks, _ = among([(None, None)], monkeypatch)
    with abandonable(lambda: True, alone=False):
        safe_point()
        with pytest.raises(Abandoned):
            ranks.together(safe_point)
        safe_point()


def test_a_lost_connection_is_told_as_one() -> None:
    """Bug: "Connection closed by peer" is all that a user reads, or another error is taken for it."""
    closed = "[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:39060. Logs."
    of_rank = r"^rank 3 lost the other processes \(Connection closed by peer \[127"
    with pytest.raises(LostRank, match=of_rank), Ranks(rank=3, world=4).known_lost():
        raise RuntimeError(closed)
    with pytest.raises(LostRank, match="rank 3 lost"), Ranks(rank=3, world=4).heard():
        raise RuntimeError("Timed out waiting 6000ms")
    with pytest.raises(RuntimeError, match="out of memory"), Ranks(rank=3, world=4).known_lost():
        raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match=r"^Connection"), Ranks().known_lost():
        raise RuntimeError("Connection closed")
    assert LostRank.exit_code == LOST


def test_who_was_not_asked_to_stop_learns_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: SIGTERM of one process lets the others wait for its next step, or they exit with 0."""
    with StopRequest() as stop:
        ranks, _ = among([None], monkeypatch)
        assert not agreed(ranks, stop)
        assert not stop.requested
        ranks, _ = among([None, ("SIGTERM", 143)], monkeypatch)
        assert agreed(ranks, stop)
        assert (stop.reason, stop.exit_code) == ("SIGTERM", 143)
        ranks, said = among([("SIGINT", 130)], monkeypatch)
        assert agreed(ranks, stop)
        assert (stop.reason, said) == ("SIGTERM", [("SIGTERM", 143)])


# -- processes --------------------------------------------------------------------------------------

MAIN = """
import os, signal, sys, time
from reflectvlm import pulse
pulse.begin()
rank = int(os.environ["RANK"])
def tell(text):
    print(text, file=sys.stderr, flush=True)
def until(name):
    end = time.monotonic() + 30
    while not os.path.exists(name) and time.monotonic() < end:
        time.sleep(0.01)
        pulse.beat()
exec(sys.argv[1])
"""


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs a few lines of Python in processes of the launcher; its exit code and what was told."""
    package = tmp_path / "scripted" / "reflectvlm"
    package.mkdir(parents=True)
    real = str(Path(reflectvlm.__file__).parent)
    (package / "__init__.py").write_text(f"__path__.append({real!r})\n")
    (package / "__main__.py").write_text(MAIN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setattr(group, "GRACE", 2.0)
    monkeypatch.chdir(tmp_path)

    def start(code: str, **launch: Any) -> tuple[int, str]:
        given: dict[str, Any] = {"processes": 2, "on_gpu": False} | launch
        ended = Launch(**given).run([code])
        return ended, capfd.readouterr().err

    return start


def test_all_know_who_they_are(run: Callable[..., tuple[int, str]]) -> None:
    """Bug: two processes of one number; machines that count alike."""
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    code = (
        "assert os.getsid(0) == os.getpid(), 'Ctrl-C would come twice'\n"
        f"open(f'rank-{{rank}}', 'w').write(' '.join(os.environ[name] for name in {names}))"
    )
    assert run(code, nodes=2, node_rank=1, main_address="node-a", main_port=29500) == (0, "")
    assert Path("rank-2").read_text() == "2 0 4 2 node-a 29500"
    assert Path("rank-3").read_text() == "3 1 4 2 node-a 29500"


def test_a_killed_process_ends_the_others_and_is_named(run: Callable[..., tuple[int, str]]) -> None:
    """Bug: the others wait for ever; or what only lost it is told as the cause."""
    code, told = run(
        "with pulse.phase('reward'):\n"
        "    if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    time.sleep(0.1); sys.exit(69)"
    )
    assert code == 1
    assert told == (
        "error: rank 1 was killed by SIGKILL in its phase 'reward'; all are ended. "
        "resume=auto goes on from the last checkpoint.\n"
    )


def test_processes_that_do_not_end_are_ended(run: Callable[..., tuple[int, str]]) -> None:
    """Bug: one that waits where no signal reaches it holds its GPU until somebody looks."""
    started = time.monotonic()
    code, told = run(
        "if rank == 1: until('pid-0'); until('pid-2'); sys.exit(3)\n"
        "def clean(*_): open('cleaned', 'w').close(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, clean if rank else signal.SIG_IGN)\n"
        "open(f'pid-{rank}', 'w').write(str(os.getpid()))\n"
        "time.sleep(600)",
        processes=3,
    )
    # 2 s to end by themselves, 0.5 s after SIGTERM, 0.5 s after SIGKILL; the rest is the start of Python.
    assert time.monotonic() - started < 30
    assert (code, "rank 1 ended with exit code 3" in told) == (3, True)
    assert Path("cleaned").exists(), "one that would have ended by itself was not asked to"
    for rank in (0, 2):
        assert not Path(f"/proc/{Path(f'pid-{rank}').read_text()}").exists()


def test_last_words_of_another_rank_are_told(run: Callable[..., tuple[int, str]]) -> None:
    """Bug: only the first process has the terminal, and the one that failed was another."""
    code, told = run(
        "if rank: tell('one'); tell('warning: rank 1: row left out'); tell('two'); tell('out of memory')\n"
        "sys.exit(3 if rank else 69)"
    )
    assert code == 3
    assert told.splitlines() == [
        "warning: rank 1: row left out",
        "error: rank 1 ended with exit code 3 in its phase 'start'; all are ended. resume=auto goes on from "
        "the last checkpoint.",
        "rank 1: one",
        "rank 1: two",
        "rank 1: out of memory",
    ]


@pytest.mark.parametrize("told_others", [70, 2])
def test_an_error_that_reached_all_is_told_once(
    told_others: int, run: Callable[..., tuple[int, str]]
) -> None:
    """Bug: one mistake, four lines. The first process has told what was told to it."""
    own = 1 if told_others == 70 else 2
    code, told = run(
        f"tell(f'error: of rank 1') if rank == 0 else None; sys.exit({own} if rank else {told_others})"
    )
    assert (code, told) == (own, "error: of rank 1\n")


def test_a_run_that_was_stopped_keeps_its_code(run: Callable[..., tuple[int, str]]) -> None:
    """Bug: a scheduler takes a run that has saved itself for one that failed."""
    assert run("sys.exit(143)") == (143, "")
    # Longer than what others have once one has failed: 3 s of 2 s.
    assert run("time.sleep(0 if rank else 3); sys.exit(143)") == (143, "")


def test_one_that_hangs_is_named_and_ended(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a process that stands still stops a node until somebody looks. 0.02 minutes are 1.2 s."""
    monkeypatch.setenv("REFLECTVLM_TIMEOUT", "0.02")
    code, told = run(
        "until('there') if rank == 0 else open('there', 'w').close()\n"
        "with pulse.phase('data' if rank else 'rollout'):\n"
        "    while rank == 0: time.sleep(0.05); pulse.beat()\n"
        "    time.sleep(600)"
    )
    assert code == 1
    assert "error: rank 1 hangs: in phase 'data' it has not got on for 1 s (REFLECTVLM_TIMEOUT=0.02" in told
    assert told.count("\n") == 1


def test_waiting_is_not_hanging(run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: who waits for a slow one is ended as if it were the one that hangs."""
    monkeypatch.setenv("REFLECTVLM_TIMEOUT", "0.02")
    code, told = run(
        "open(f'there-{rank}', 'w').close(); until(f'there-{1 - rank}')\n"
        "if rank:\n    with pulse.waiting(): time.sleep(2.5)\n"
        "else:\n    for _ in range(50): time.sleep(0.05); pulse.beat()"
    )
    assert (code, told) == (0, "")


def test_who_was_waited_for_in_vain_is_named(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: of one that stands still while it waits, only the others' complaint is told."""
    monkeypatch.setenv("REFLECTVLM_TIMEOUT", "0.05")
    code, told = run(
        "open(f'there-{rank}', 'w').close(); until(f'there-{1 - rank}')\n"
        "with pulse.phase('update'), pulse.waiting():\n"
        "    time.sleep(600 if rank else 0.5); sys.exit(69)"
    )
    assert code == 1
    assert "error: rank 1 hangs: in phase 'update' it has not got on for" in told


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_to_the_launcher_reaches_all_once(
    number: int, code: int, run: Callable[..., tuple[int, str]]
) -> None:
    """Bug: Ctrl-C ends the launcher and leaves its processes, or comes to them twice, which stops unsaved."""
    ended, told = run(
        "seen = []\n"
        f"signal.signal({number}, lambda *_: seen.append(1))\n"
        "open(f'there-{rank}', 'w').close(); until(f'there-{1 - rank}')\n"
        f"if rank == 0: os.kill(os.getppid(), {number})\n"
        "while not seen: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "open(f'seen-{rank}', 'w').write(str(len(seen)))\n"
        f"sys.exit({code})"
    )
    assert (ended, told) == (code, "")
    assert [Path(f"seen-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_a_signal_while_the_last_process_starts_reaches_it(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the launcher is told to stop after it has started a process and before it counts it among its own;
    that one is never told, and nothing ends."""
    start = group.Group._start

    def slowly(self: group.Group, local: int) -> Any:
        rank = start(self, local)
        while local and not Path("sent").exists():
            time.sleep(0.01)
        return rank

    monkeypatch.setattr(group.Group, "_start", slowly)
    ended, told = run(
        "seen = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: seen.append(1))\n"
        "open(f'there-{rank}', 'w').close(); until(f'there-{1 - rank}')\n"
        "if rank == 0: os.kill(os.getppid(), signal.SIGTERM); open('sent', 'w').close()\n"
        "end = time.monotonic() + 10\n"
        "while not seen and time.monotonic() < end: time.sleep(0.01)\n"
        "sys.exit(143 if seen else 5)"
    )
    assert (ended, told) == (143, "")


def test_a_signal_before_anything_has_begun(run: Callable[..., tuple[int, str]]) -> None:
    """Bug: a job that is stopped while Python still starts looks as if a process had died of itself."""
    ended, told = run("os.kill(os.getppid(), signal.SIGTERM) if rank == 0 else None; time.sleep(600)")
    assert (ended, told) == (143, "error: stopped by SIGTERM before the run had begun\n")
