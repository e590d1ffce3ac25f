"""`reflectvlm doctor`: the checks of a recipe alone, its exit codes, and that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from chains import write_chain
from reflectvlm import stages
from reflectvlm.cli import main
from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.doctor_command import disk, machine
from reflectvlm.train.run import Output
from training import small_rl


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stages.VARIABLE, str(tmp_path / "cache"))


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["doctor", *words])
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    return code, said.out + "".join(f"{line}\n" for line in errors)


def test_a_sound_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the command makes the folder of a run, or trains the stage before it."""
    code, said = doctor(capsys, "recipe=lookback_rl", f"root={tmp_path / 'runs'}", "variant=solution")
    assert code == 0
    shown = said.splitlines()
    assert shown[0] == "doctor: lookback_rl-solution"
    assert shown[1].startswith("python 3.")
    assert shown[2].startswith("start_from: lookback_sft has not been made yet (`train` makes it first);")
    assert [line.split()[0] for line in shown[3:-1]] == ["ok"] * 8
    assert shown[-1] == "checks: 8 ok"
    assert not (tmp_path / "runs").exists()
    assert not any((tmp_path / "cache" / "stages").iterdir())


def test_a_broken_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the finding is printed and the exit code is 0, so a job script goes on."""
    code, said = doctor(capsys, "recipe=grpo", f"root={tmp_path}", "sampling.max_tokens=5")
    assert code == 1
    assert "FAILED  answer end" in said
    assert "raise sampling.max_tokens to" in said
    assert said.splitlines()[-1] == "checks: 7 ok, 1 failed"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["recipe=gpro"], "Did you mean 'grpo'?"),
        (["recipe=grpo", "stesp=3"], "Did you mean steps?"),
        (["grpo"], "doctor needs recipe=NAME. Write recipe=grpo"),
        (["recipe=grpo", "policy.path=./none"], "No model folder at './none'"),
        (["recipe=lookback_rl", "cold:steps=2"], "cold:… is told to a stage, but the stages here are"),
    ],
)
def test_wrong_words(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a misspelt key is a failed check, or a traceback."""
    code, said = doctor(capsys, *words)
    assert code == 2
    assert said.splitlines()[-1].startswith("error: ")
    assert says in said


def test_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a command that nobody finds."""
    assert main(["doctor", "--help"]) == 0
    assert "reflectvlm doctor recipe=" in capsys.readouterr().out


def test_stages_that_are_made_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the checks look at an untrained base, or at other rows, though the stages have been run."""
    folder = write_chain(tmp_path)
    words = (f"recipe={folder / 'learn.yaml'}", f"root={tmp_path / 'runs'}")
    _, before = doctor(capsys, *words)
    assert "data_from: ask has not been made yet" in before
    assert main(["train", *words, "steps=1"]) == 0
    capsys.readouterr()
    _, after = doctor(capsys, *words)
    assert "not been made" not in after
    assert "the first 5 have" in after  # ask makes five rows; the questions it is made of are many
    shutil.rmtree(tmp_path / "cache")
    assert "data_from: ask has not been made yet" in doctor(capsys, *words)[1]


@dataclasses.dataclass(frozen=True)
class Plain(DigitTraces):
    """Questions without gold answers written out."""

    def __getitem__(self, index: Any) -> Any:
        return self.data[index]


def test_rows_still_to_be_made_are_not_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the questions of a distillation have no gold answers, and the SFT behind it is called broken."""
    folder = write_chain(tmp_path)
    text = (folder / "ask.yaml").read_text().replace("repair", "drop")
    text += "data: {_target_: test_doctor.Plain}\n"
    (folder / "ask.yaml").write_text(text)
    code, said = doctor(capsys, f"recipe={folder / 'learn.yaml'}", f"root={tmp_path / 'runs'}")
    assert "made by ask, which has not run" in said
    assert code == 0
    assert len(Plain(data=Digits(size=3))) == 3


def test_room_and_rights_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a full or read-only disk is met at the first checkpoint. The tiny policy has 1.67 million numbers,
    each with two moments of AdamW: 3 * 4 * 1.67 = 20 MB = 19 MiB; two kept, one being written and a model
    take 4 times as much."""
    trainer = small_rl(tmp_path / "deep" / "runs")
    assert disk(trainer).status == "ok"
    assert "a checkpoint is about 19 MiB" in disk(trainer).found
    usage = shutil.disk_usage(tmp_path)
    for free, status in ((90e6, "ok"), (50e6, "warning"), (10e6, "failed")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=int(free)))
        assert disk(trainer).status == status
    monkeypatch.undo()
    trainer.output = Output(root="/proc/nowhere/runs")
    assert disk(trainer).status == "failed"
    assert "nothing can be written to /proc" in disk(trainer).found
    assert not (tmp_path / "deep").exists()


def test_the_machine_is_one_line() -> None:
    """Bug: a report without the versions that a bug depends on."""
    assert machine().startswith("python 3.")
    assert all(word in machine() for word in ("torch 2.", "transformers ", "threads on"))
    assert "\n" not in machine()
