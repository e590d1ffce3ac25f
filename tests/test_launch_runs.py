"""Real runs of two processes of which one is killed, told to stop or stands still, in every phase of a step:
the run ends in time and says which and in what, nothing of it is left, and the same command goes on to the
very same end. A few in the normal suite; all of them by `make torture`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

import reflectvlm
from chains import write_chain
from held import WORK
from reflectvlm import stages
from reflectvlm.models.tiny import tiny_folder
from training import logged

HERE = Path(__file__).parent
IN_TIME = 60.0
"""Seconds from a signal to the end of the command. A few suffice on a machine that does nothing else."""
RECIPE = """
defaults: [_rl, policy: tiny_random, _self_]
name: held
data: {_target_: reflectvlm.data.digits.Digits, size: 12}
rubric: {_target_: held.rubric}
steps: 3
prompts_per_step: 2
group_size: 2
max_prompt_tokens: 512
keep_equal_groups: true
sampling: {_target_: reflectvlm.types.SamplingParams, max_tokens: 8}
optimizer: {_target_: reflectvlm.train.optim.AdamW, lr: 1.0e-3}
output: {root: runs, resume: auto, save_every: 1, keep: 9, checks: false}
"""
Record = Callable[[str, object], None]


def paths() -> dict[str, str]:
    source = str(Path(reflectvlm.__file__).parents[1])
    return {"PYTHONPATH": os.pathsep.join([str(HERE), source])}


class Launched:
    """A command of two processes, in a folder of its own."""

    def __init__(self, folder: Path, *words: str, held: str = "", **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.mark = folder, f"mark-{uuid.uuid4()}"
        self.at = folder / self.mark
        self.at.mkdir()
        (folder / "mine.yaml").write_text(RECIPE)
        environment |= {
            **paths(),
            "OMP_NUM_THREADS": "1",
            "HELD_AT": str(self.at),
        }
        if held:
            environment["HELD"] = held
        with (self.at / "out").open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "reflectvlm", "train", "recipe=./mine.yaml", "processes=2", *words],
                cwd=folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def held(self) -> int:
        """The number of the process that is held, once it is."""
        here = self.at / "here"
        until = time.monotonic() + 120
        while not here.exists():
            assert self.process.poll() is None, self.told()
            assert time.monotonic() < until, self.told()
            time.sleep(0.05)
        return int(here.read_text())

    def go(self) -> None:
        (self.at / "go").touch()

    def ended(self, seconds: float = 200.0) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"after {seconds} s it has not ended:\n{self.told()}") from None

    def told(self) -> str:
        return (self.at / "out").read_text()

    def left(self, seconds: float = 5.0) -> list[str]:
        """Processes of this command, or started by them, that are still there after so long."""
        until = time.monotonic() + seconds
        while (found := self._alive()) and time.monotonic() < until:
            time.sleep(0.1)
        return found

    def _alive(self) -> list[str]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue  # it has ended, or is another user's
        return found


def finished(folder: Path, *words: str, **environment: str) -> Path:
    """A run that has to come to its end. Its folder."""
    one = Launched(folder, *words, **environment)
    assert one.ended() == 0, one.told()
    assert not one.left()
    return folder / "runs" / "held"


def same(one: Path, other: Path) -> None:
    """All that two runs leave is the same to the last bit, but for times and what processes begin with at
    random: the generators of Python and numpy, of which nothing is drawn."""
    assert logged(one) == logged(other)
    last = "checkpoints/step-000003"
    for name in (f"{last}/model.safetensors", f"{last}/optimizer.safetensors", "model/model.safetensors"):
        mine, theirs = load_file(one / name), load_file(other / name)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert value.numpy().tobytes() == theirs[key].numpy().tobytes(), (name, key)
    mine, theirs = (json.loads((run / last / "state.json").read_text()) for run in (one, other))
    for state in (mine, theirs):
        del state["rng"], state["loop"]["logged"]  # sizes of files that hold times
    assert mine == theirs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The unbroken run of two processes, made once for each setting."""
    made: dict[tuple[str, ...], Path] = {}

    def find(*words: str) -> Path:
        if words not in made:
            made[words] = finished(tmp_path_factory.mktemp("whole"), *words)
        return made[words]

    return find


def killed(folder: Path, phase: str, rank: int, *words: str) -> None:
    """SIGKILL of one process, in the second step."""
    one = Launched(folder, *words, held=f"{phase}:{rank}:2")
    os.kill(one.held(), signal.SIGKILL)
    assert one.ended(IN_TIME) == 1
    told = re.search(
        r"error: rank (\d) was killed by SIGKILL in its phase '(.*)'; all are ended.", one.told()
    )
    assert told is not None, one.told()
    assert told[1] == str(rank)
    assert told[2] == phase or phase == "disk"  # which a thread writes to while training goes on
    assert "Traceback" not in one.told()
    assert not one.left()


def stopped(folder: Path, phase: str, rank: int, *words: str) -> None:
    """SIGTERM of one process, in the second step. A thread that is held at the disk lets training go on until
    the next save: held in the second step, all might be done before the signal comes."""
    one = Launched(folder, *words, held=f"{phase}:{rank}:{1 if phase == 'disk' else 2}")
    os.kill(one.held(), signal.SIGTERM)
    time.sleep(0.2)
    one.go()
    assert one.ended(IN_TIME) == 143
    done = 1 if phase in ("data", "rollout", "reward") else 2
    assert f"stopped by SIGTERM after step {done} of 3; saved in" in one.told() or phase == "disk"
    assert "error" not in one.told()
    assert not one.left()


# -- in the normal suite ----------------------------------------------------------------------------


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("cut", "phase"), [(killed, "reward"), (stopped, "rollout")])
def test_a_run_that_lost_a_process_goes_on_exactly(
    cut: Callable[..., None], phase: str, tmp_path: Path, whole: Callable[..., Path]
) -> None:
    """Bug: the other process waits for ever, or what it did after the last checkpoint is done twice."""
    cut(tmp_path, phase, 1)
    same(finished(tmp_path), whole())


@pytest.mark.timeout(300)
def test_an_error_of_one_process_is_one_line(tmp_path: Path) -> None:
    """Bug: a reward that fails in one process is told by none, or by each and with where it comes from."""
    one = Launched(tmp_path, FAILS_IN="1")
    assert one.ended() == 1
    told = [line for line in one.told().splitlines() if "error" in line.lower()]
    assert [line.partition(":")[0] for line in told] == ["error"], one.told()
    assert told[0].startswith("error: rank 1 failed: RewardFailure: ")
    assert "no reward today" in told[0]
    assert not one.left()


@pytest.mark.timeout(300)
def test_processes_end_with_their_launcher(tmp_path: Path) -> None:
    """Bug: a launcher that is killed leaves processes that train on, and hold the run's lock and the GPUs."""
    one = Launched(tmp_path, held="reward:1:2")
    one.held()
    one.process.kill()
    one.process.wait()
    time.sleep(0.5)  # until they know
    one.go()
    assert not one.left(IN_TIME)
    assert "stopped by SIGTERM after step 1 of 3; saved in" in one.told()


@pytest.mark.timeout(600)
def test_a_pipeline_in_two_processes(tmp_path: Path) -> None:
    """Bug: two processes write one table, or one of them begins a folder of its own."""
    folder, model = write_chain(tmp_path), tiny_folder(tmp_path / "tiny")
    words = ("pipeline", str(folder / "pipe.yaml"), f"policy.path='{model}'", f"root={folder / 'runs'}")
    done = subprocess.run(
        [sys.executable, "-m", "reflectvlm", *words, "processes=2"],
        env=os.environ | {**paths(), stages.VARIABLE: str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    assert len((run / "measured.jsonl").read_text().splitlines()) == 3
    assert done.stdout.count("| taught twice |") == 1
    made = [path.name.rpartition("-")[0] for path in (tmp_path / "cache" / "stages").iterdir()]
    assert sorted(made) == ["ask", "cold", "learn", "learn"]


# -- all of them ------------------------------------------------------------------------------------

COMPUTE = ("ddp", "zero3") if find_spec("deepspeed") else ("ddp",)
CASES = [(phase, rank) for phase in WORK for rank in (0, 1) if (phase, rank) != ("disk", 1)]


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("cut", [killed, stopped])
@pytest.mark.parametrize(("phase", "rank"), CASES)
def test_one_process_is_lost_in_every_phase(
    phase: str,
    rank: int,
    cut: Callable[..., None],
    compute: str,
    tmp_path: Path,
    whole: Callable[..., Path],
    record_property: Record,
) -> None:
    """Bug: a phase in which the others wait for ever, or after which the run goes on otherwise."""
    words = f"compute={compute}"
    cut(tmp_path, phase, rank, words)
    same(finished(tmp_path, words), whole(words))
    record_property("number", 1)


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("phase", ["data", "rollout", "update"])
def test_one_process_stands_still(
    phase: str, compute: str, tmp_path: Path, whole: Callable[..., Path], record_property: Record
) -> None:
    """Bug: a process that hangs lets the others wait for ever. 0.75 minutes are 45 s."""
    words = f"compute={compute}"
    one = Launched(tmp_path, words, held=f"{phase}:1:2", REFLECTVLM_TIMEOUT="0.75")
    os.kill(one.held(), signal.SIGSTOP)
    assert one.ended(45 + IN_TIME) == 1
    assert f"error: rank 1 hangs: in phase {phase!r} it has not got on for" in one.told()
    assert not one.left()
    same(finished(tmp_path, words), whole(words))
    record_property("number", 1)


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_launcher_is_told_to_stop(
    number: signal.Signals, code: int, tmp_path: Path, whole: Callable[..., Path], record_property: Record
) -> None:
    """Bug: Ctrl-C leaves nothing to go on from, or something that goes on otherwise."""
    one = Launched(tmp_path, held="rollout:1:2")
    one.held()
    one.process.send_signal(number)
    time.sleep(0.5)
    one.go()
    assert one.ended(IN_TIME) == code
    assert f"stopped by {number.name} after step 1 of 3; saved in" in one.told()
    assert "error" not in one.told()
    assert not one.left()
    same(finished(tmp_path), whole())
    record_property("number", 1)


@pytest.mark.torture
@pytest.mark.timeout(900)
def test_workers_end_with_their_process(tmp_path: Path, record_property: Record) -> None:
    """Bug: a process that is killed leaves those that read rows for it."""
    killed(tmp_path, "reward", 1, "workers=1")
    finished(tmp_path, "workers=1")
    record_property("number", 1)
