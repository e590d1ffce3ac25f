"""A run that was cut off ends exactly as the one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from training import logged, small_rl, small_sft


class Crash(Exception):
    pass


def crash_at(trainer, step):
    """The trainer, dying before it takes that step."""
    take = trainer.step

    def step_or_die(number):
        if number == step:
            raise Crash
        return take(number)

    trainer.step = step_or_die
    return trainer


def samples(folder):
    return (folder / "samples.jsonl").read_text()


@pytest.mark.parametrize("make", [small_rl, small_sft])
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_resumed_run_equals_unbroken_one(make, cut, tmp_path):
    """Bug: a resumed run repeats rows, forgets optimiser moments, or draws other tokens."""
    whole = make(tmp_path / "whole").run()
    with pytest.raises(Crash):
        crash_at(make(tmp_path / "cut"), cut).run()
    resumed = make(tmp_path / "cut", output={"resume": "auto"}).run()
    assert logged(resumed.folder) == logged(whole.folder)
    assert samples(resumed.folder) == samples(whole.folder)
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    weights = [load_file(run.model / "model.safetensors") for run in (whole, resumed)]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])


@pytest.mark.parametrize("forget", ["position", "updates", "optimizer", "model"])
def test_forgetting_any_part_of_the_state_shows(forget, tmp_path, monkeypatch):
    """Bug: the equality above holds because nothing depends on what is restored."""
    from reflectvlm.train import loop

    def restore(self):
        module, optimizer = self.trainer.policy.module, self.trainer.updater.optimizer
        kept = {
            "position": self.trainer.position,
            "updates": self.trainer.updates,
            "model": {name: value.clone() for name, value in module.state_dict().items()},
            "optimizer": optimizer.state_dict(),
        }
        found = genuine(self)
        if found and forget == "model":
            module.load_state_dict(kept["model"])
        elif found and forget == "optimizer":
            optimizer.load_state_dict(kept["optimizer"])
        elif found:
            setattr(self.trainer, forget, kept[forget])
        return found

    genuine = loop._Loop._restore
    often = {"samples_every": 1}
    whole = small_rl(tmp_path / "whole", output=often).run()
    with pytest.raises(Crash):
        crash_at(small_rl(tmp_path / "cut", output=often), 3).run()
    monkeypatch.setattr(loop._Loop, "_restore", restore)
    resumed = small_rl(tmp_path / "cut", output=often | {"resume": "auto"}).run()
    if forget == "updates":  # it labels rollouts and changes nothing learned
        assert logged(resumed.folder) == logged(whole.folder)
        assert samples(resumed.folder) != samples(whole.folder)
    else:
        assert logged(resumed.folder) != logged(whole.folder)


def test_evaluating_or_saving_more_often_changes_nothing_learned(tmp_path):
    """Bug: an evaluation in between moves the random numbers of training."""
    often = small_rl(tmp_path / "often", output={"eval_every": 1, "save_every": 1}).run()
    never = small_rl(tmp_path / "never", output={"eval_every": 0, "save_every": 100}).run()
    losses = [[row["loss"] for row in logged(run.folder) if "loss" in row] for run in (often, never)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_resuming_a_finished_run_does_nothing(tmp_path):
    """Bug: a second `resume=auto` trains on, or fails because there is nothing left to do."""
    first = small_rl(tmp_path).run()
    written = (first.folder / "metrics.jsonl").read_bytes()
    again = small_rl(tmp_path, output={"resume": "auto"}).run()
    assert again.finished
    assert again.after == first.after
    assert (first.folder / "metrics.jsonl").read_bytes() == written


def test_resume_takes_the_killed_run_not_the_finished_one(tmp_path):
    """Bug: after a finished run and a killed second one, auto says that nothing is left to do."""
    first = small_rl(tmp_path).run()
    with pytest.raises(Crash):
        crash_at(small_rl(tmp_path), 3).run()
    second = small_rl(tmp_path, output={"resume": "auto"}).run()
    assert second.folder == tmp_path / "rl-2"
    assert logged(second.folder) == logged(first.folder)


def test_resuming_reads_a_checkpoint_for_its_checksum_once(tmp_path, monkeypatch):
    """Bug: the bytes of a large checkpoint are hashed twice before the first step."""
    from reflectvlm.train import checkpoint

    with pytest.raises(Crash):
        crash_at(small_rl(tmp_path), 3).run()
    whole = []
    verify = checkpoint._verify

    def counted(path, *, content=True):
        whole.append(content)
        return verify(path, content=content)

    monkeypatch.setattr(checkpoint, "_verify", counted)
    with pytest.raises(Crash):
        crash_at(small_rl(tmp_path, output={"resume": "auto"}), 2).run()
    assert whole == [True, False]


def test_resume_by_path_and_its_error(tmp_path):
    """Bug: `resume=PATH` with a wrong path quietly starts from nothing."""
    with pytest.raises(Crash):
        crash_at(small_rl(tmp_path), 3).run()
    resumed = small_rl(tmp_path / "elsewhere", output={"resume": str(tmp_path / "rl")}).run()
    assert resumed.folder == tmp_path / "rl"
    with pytest.raises(ValueError, match="is no run folder"):
        small_rl(tmp_path, output={"resume": str(tmp_path / "missing")}).run()


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from training import small_rl
output = {{"resume": "auto", "save_every": 1}}
result = small_rl(Path(sys.argv[1]), steps=int(sys.argv[2]), output=output).run()
sys.exit(result.exit_code)
"""


def start(tmp_path: Path, steps: int) -> subprocess.Popen[str]:
    code = CHILD.format(here=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(steps)], text=True)


def wait_for_steps(metrics: Path, count: int) -> None:
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        if metrics.is_file() and sum('"loss"' in line for line in metrics.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {count} steps in {metrics}")


def test_killed_process_resumes_bit_for_bit(tmp_path):
    """Bug: after `kill -9` at any instant the run cannot go on, or goes on from a mixture."""
    steps = 8
    child = start(tmp_path / "cut", steps)
    wait_for_steps(tmp_path / "cut" / "rl" / "metrics.jsonl", 3)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert start(tmp_path / "cut", steps).wait() == 0
    assert start(tmp_path / "whole", steps).wait() == 0
    assert logged(tmp_path / "cut" / "rl") == logged(tmp_path / "whole" / "rl")
    assert json.loads((tmp_path / "cut" / "rl" / "summary.json").read_text())["steps"] == steps


def test_sigterm_saves_and_exits_with_its_code(tmp_path):
    """Bug: a preempted job loses its last steps, or looks as if it had ended well."""
    child = start(tmp_path, 500)
    wait_for_steps(tmp_path / "rl" / "metrics.jsonl", 2)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 128 + signal.SIGTERM
    saved = max((tmp_path / "rl" / "checkpoints").glob("step-*"))
    steps = [row["step"] for row in logged(tmp_path / "rl") if "loss" in row]
    assert int(saved.name.removeprefix("step-")) == steps[-1]
    assert not (tmp_path / "rl" / "summary.json").exists()
