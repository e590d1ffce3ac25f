"""The loop around the steps: what it says, keeps and survives. test_reliability_b_resume.py: resuming."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from types import SimpleNamespace

import pytest

from reflectvlm.data.filtered import Report, Skipped
from reflectvlm.train import loop
from reflectvlm.train.keeper import Keeper
from reflectvlm.train.run import Output
from reflectvlm.train.update import NonFinite
from training import logged, small_rl, small_sft

QUIET = {"evaluation": None, "test": None}
"""No evaluations: a run of a second."""


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("save_every", -1, 0),
        ("eval_every", -1, 0),
        ("samples_every", -5, 0),
        ("keep", 0, 1),
        ("print_every", 0, 1),
    ],
)
def test_output_is_checked(name, value, least):
    """Bug: a wrong interval ends the run at its first step, after the model was loaded."""
    with pytest.raises(ValueError, match=rf"output\.{name} is {value}\. It must be at least {least};"):
        Output(**{name: value})
    Output(**{name: least})


@pytest.mark.parametrize("value", [True, None, "", 3])
def test_resume_is_checked(value):
    """Bug: `resume=true` looks for a folder of that name."""
    with pytest.raises(ValueError, match=r"output\.resume is .*auto, never, or the folder of a run"):
        Output(resume=value)


def test_never_is_zero(tmp_path):
    """Bug: 0 divides by zero, or the end of the run is not saved."""
    output = {"save_every": 0, "eval_every": 0, "samples_every": 0}
    run = small_rl(tmp_path, steps=2, output=output, test=None).run()
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-000002"]
    assert not (run.folder / "samples.jsonl").exists()
    assert not any(key.startswith("eval/") for row in logged(run.folder) for key in row)


def test_a_failing_picture_does_not_fail_the_run(tmp_path, monkeypatch, caplog):
    """Bug: days of training end in an error, without a summary, because of a plot."""

    def broken(_, picture):
        assert not (picture.parent / "summary.json").exists()  # which says that the run is finished
        raise RuntimeError("no font")

    monkeypatch.setattr(loop, "curves", broken)
    run = small_sft(tmp_path, steps=1, **QUIET).run()
    assert run.finished
    assert run.model.is_dir()
    assert (run.folder / "summary.json").is_file()
    assert "curves.png could not be drawn, all else is there: RuntimeError: no font" in caplog.text


def test_a_signal_before_the_first_step_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    """Bug: "saved in" is said and nothing is there: the table's first column is measured again."""
    trainer = small_rl(tmp_path, steps=2, evaluation=None)
    evaluate = trainer.evaluate

    def interrupted(evaluation):
        found = evaluate(evaluation)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    stopped = trainer.run()
    assert (stopped.finished, stopped.exit_code) == (False, 143)
    assert "stopped by SIGTERM after step 0 of 2; saved in" in capsys.readouterr().out
    assert [path.name for path in (stopped.folder / "checkpoints").iterdir()] == ["step-000000"]
    resumed = small_rl(tmp_path, steps=2, evaluation=None, output={"resume": "auto"}).run()
    whole = small_rl(tmp_path / "whole", steps=2, evaluation=None).run()
    assert resumed.before == stopped.before == whole.before
    assert logged(resumed.folder) == logged(whole.folder)


def test_a_signal_after_a_save_saves_no_second_time(tmp_path, monkeypatch):
    """Bug: a preempted job writes its checkpoint twice, and is killed in the second. The step in which the
    signal comes is given up, and the one before it is saved already."""
    trainer = small_sft(tmp_path, output={"save_every": 1}, **QUIET)
    take, save, saves = trainer.step, Keeper.save, []

    def step(number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(number)

    def counted(self):
        saves.append(self.progress.done)
        save(self)

    monkeypatch.setattr(trainer, "step", step)
    monkeypatch.setattr(Keeper, "save", counted)
    assert not trainer.run().finished
    assert saves == [1]


def test_a_broken_batch_is_kept_with_the_names_of_its_rows(tmp_path, monkeypatch):
    """Bug: a NaN is reported with token ids only, and nobody finds the row that caused it."""
    trainer = small_sft(tmp_path, **QUIET)
    ids = ("left-1", "right-ü")

    def step(_):
        monkeypatch.setattr(trainer, "row_ids", ids, raising=False)
        batch = dataclasses.replace(trainer.policy.batch(trainer.sequences([0])), row_ids=())
        raise NonFinite("The loss (nan)", batch)

    monkeypatch.setattr(trainer, "step", step)
    with pytest.raises(NonFinite, match=r"Step 1, batch saved in .*nonfinite-step-1: The loss \(nan\)"):
        trainer.run()
    about = json.loads((tmp_path / "sft" / "nonfinite-step-1" / "batch.json").read_text(encoding="utf-8"))
    assert about["row_ids"] == list(ids)


def test_the_start_says_what_trains(tmp_path, monkeypatch, capsys):
    """Bug: a frozen part that should train, or the reverse, shows only in the result."""
    from reflectvlm.models.freezing import freeze

    trainer = small_sft(tmp_path, steps=1, **QUIET)
    freeze(trainer.policy.model, ("vision",))
    parts = {"vision": 0, "projector": 0, "language": 0}
    for name, parameter in trainer.policy.model.named_parameters():
        inside = "projector" if "merger" in name else "vision" if "visual" in name else "language"
        parts[inside] += parameter.numel()
    take, said = trainer.step, []

    def step(number):
        said.append(capsys.readouterr().out)
        return take(number)

    monkeypatch.setattr(trainer, "step", step)
    trainer.run()
    for part, total in parts.items():
        trains = 0 if part == "vision" else total
        (line,) = [line for line in said[0].splitlines() if line.startswith(f"| {part} ")]
        assert [cell.strip() for cell in line.split("|")[2:4]] == [f"{total:,}", f"{trains:,}"]


class Reported(list):
    """Rows with a report."""

    def __init__(self, rows, report):
        super().__init__(rows)
        self.report = report


def test_rows_left_out_are_listed(tmp_path, capsys):
    """Bug: which rows were skipped is said once in a log that nobody kept."""
    trainer = small_sft(tmp_path, steps=1, **QUIET)
    skipped = (Skipped("rows.jsonl:3", "missing image", "rows.jsonl:3: missing image."),)
    report = Report(total=11, kept=10, skipped=skipped)
    trainer.data = Reported(trainer.data, report)
    run = trainer.run()
    assert "rows.jsonl:3" in (run.folder / "rows.txt").read_text()
    said = capsys.readouterr().out
    assert f"{report}; the list is in {run.folder / 'rows.txt'}" in said
    trainer = small_sft(tmp_path, steps=1, **QUIET)
    trainer.data = Reported(trainer.data, SimpleNamespace(lines=lambda: ["one", "two"]))
    assert (trainer.run().folder / "rows.txt").read_text() == "one\ntwo\n"


def test_the_last_table_s_title_names_a_stage_without_its_digest(tmp_path, capsys):
    """Bug: the table of a cold start is headed by sixteen hexadecimal digits."""
    settings = QUIET | {"test": small_sft(tmp_path).test, "steps": 1}
    run = small_sft(tmp_path, name="lookback_sft-0123456789abcdef", **settings).run()
    assert "### lookback_sft: held-out rows, greedy\n" in capsys.readouterr().out
    summary = (run.folder / "summary.md").read_text()
    assert summary.startswith("### lookback_sft: held-out rows, greedy\n")
    rows = len(settings["test"].data)
    assert summary.endswith(
        f"\n- accuracy: by the strict scorer of `reflectvlm eval`, over all {rows} rows\n"
    )
