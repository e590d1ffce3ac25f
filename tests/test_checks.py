"""Checks at the start as a whole: sound runs pass and learn the same, and what fails stops the run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from checking import ASKED, BACK, Rows, found, small_distiller, sound_rl, states
from fixtures import make_prompt
from reflectvlm.data.rows import BadRow
from reflectvlm.models.tiny import random_tiny
from reflectvlm.reattention import VisualCopy
from reflectvlm.train.checks import CheckFailed, Result, check_start, lines, run_checks
from reflectvlm.train.checks_signal import NoSignal, NothingKept
from reflectvlm.train.row_rules import RowRules
from reflectvlm.types import Sample, SamplingParams
from training import rubric, small_rl, small_sft

# -- sound runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sound_rl, small_distiller])
def test_a_sound_run_passes(make: Any, tmp_path: Path) -> None:
    """Bug: a check that is wrong stops every run."""
    assert set(states(make(tmp_path)).values()) == {"ok"}


def test_a_sound_cold_start_passes(tmp_path: Path) -> None:
    """Bug: gold answers written out are held against the wrong layout. The evaluation's budget of 4
    tokens in `small_sft` is indeed too small for them."""
    trainer = small_sft(tmp_path, rubric=BACK, instruction=ASKED)
    assert states(trainer) == {
        "rows": "ok",
        "weights": "ok",
        "sight": "ok",
        "engine": "ok",
        "tags": "ok",
        "answer end": "warning",
        "gold answers": "ok",
    }
    assert "evaluation.max_tokens=4" in found(trainer)["answer end"].found


def test_a_trainer_of_ones_own_is_looked_at_as_far_as_it_is_known() -> None:
    """Bug: the checks know three classes and stop a run of any other."""
    policy = random_tiny()
    own = SimpleNamespace(policy=policy, canary_prompts=lambda: [make_prompt(policy)])
    assert states(own) == {
        "rows": "ok",
        "weights": "ok",
        "sight": "ok",
        "engine": "not applicable",
        "tags": "not applicable",
        "answer end": "not applicable",
        "gold answers": "not applicable",
    }


@pytest.mark.parametrize("make", [small_rl, small_sft])
def test_looking_changes_nothing_that_is_learned(make: Any, tmp_path: Path) -> None:
    """Bug: checks draw random numbers, take rows, count failures or leave a gradient behind, and a run with
    them is another one than without."""
    changes = {"rubric": rubric()} if make is small_sft else {}
    plain, looked = (make(tmp_path, **changes) for _ in range(2))
    looked.policy.module.train()
    looked.policy.model.model.visual.eval()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    state = looked.state()
    run_checks(looked)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert looked.state() == state
    assert looked.policy.module.training
    assert not looked.policy.model.model.visual.training
    assert all(parameter.grad is None for parameter in looked.policy.module.parameters())
    for number in range(2):
        one, other = (
            {key: value for key, value in trainer.step(number).metrics.items() if not key.startswith("time/")}
            for trainer in (plain, looked)
        )
        assert one == other


# -- rows -----------------------------------------------------------------------------------------


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """Bug: the row that ends a run is the first to be read after the model was loaded and evaluated."""

    def holes(number: int, sample: Sample) -> Sample:
        if number in gone:
            raise BadRow(f"rows.jsonl:{number}", "images", "image missing", "Put it back.")
        return sample

    gone: Sequence[int] = (4,)
    result = found(sound_rl(tmp_path, data=Rows(holes)))["rows"]
    assert result.status == "warning"
    assert "1 of the first 8 rows cannot be used: rows.jsonl:4: image missing" in result.found
    strict = {"row_rules": RowRules(on_bad="error")}
    assert found(sound_rl(tmp_path, data=Rows(holes), **strict))["rows"].status == "failed"
    # Of much that is left out the first rows may all be: as long as one can be used, the run goes on.
    gone = [number for number in range(12) if number != 5]
    result = found(sound_rl(tmp_path, data=Rows(holes)))["rows"]
    assert result.status == "warning"
    assert found(sound_rl(tmp_path, data=Rows(holes), **strict))["rows"].status == "failed"
    gone = range(12)
    results = states(sound_rl(tmp_path, data=Rows(holes)))
    assert (results.pop("rows"), results.pop("weights")) == ("failed", "ok")
    assert set(results.values()) == {"not applicable"}


def test_long_rows_are_named(tmp_path: Path) -> None:
    """Bug: a limit below every prompt is found out when the data has been gone through."""
    result = found(sound_rl(tmp_path, max_prompt_tokens=20))["rows"]
    assert result.status == "failed"
    assert "12 of the first 12" in result.found
    assert "max_prompt_tokens is 20" in result.found


def test_data_that_breaks_is_a_finding(tmp_path: Path) -> None:
    """Bug: a reader of the user's own with a bug hides what else is wrong."""

    def broken(number: int, sample: Sample) -> Sample:
        raise KeyError(number, sample.id)

    assert "KeyError: (" in found(sound_rl(tmp_path, data=Rows(broken)))["rows"].found


# -- before a run ---------------------------------------------------------------------------------


def test_a_failed_check_stops_the_run_with_one_line(tmp_path: Path) -> None:
    """Bug: a failed check is printed, and the run goes on for days."""
    said: list[str] = []
    with pytest.raises(
        CheckFailed, match=r"A check at the start failed\. answer end: .*output\.checks=false"
    ):
        check_start(sound_rl(tmp_path, sampling=SamplingParams(max_tokens=5)), said.append)
    assert said == []


def test_warnings_are_said_and_the_run_goes_on(tmp_path: Path) -> None:
    """Bug: a warning that nobody sees, or one that stops the run."""
    said: list[str] = []
    check_start(sound_rl(tmp_path, reattention=VisualCopy(trigger="<look>")), said.append)
    assert said[0].startswith("warning  tags  ")
    assert "name it in the instruction" in said[1]
    assert said[2].startswith("checks: 6 ok, 1 warning in ")


def test_lines_stand_below_each_other() -> None:
    """Bug: a remedy that cannot be told from the next check."""
    results = [Result("rows", "ok", "8 rows"), Result("gold answers", "failed", "none", "Repair it.")]
    assert lines(results) == [
        "ok      rows          8 rows",
        "FAILED  gold answers  none",
        "                      Repair it.",
    ]


# -- nothing to learn from ------------------------------------------------------------------------


def test_steps_without_any_signal_are_told_once() -> None:
    """Bug: RL runs for days on groups whose rewards are all equal; or says so at every step."""
    counter = NoSignal(patience=3)
    told = [counter.after(step, 0.0) for step in range(1, 8)]
    assert [step for step, text in enumerate(told, 1) if text] == [3]
    assert "up to step 3" in str(told[2])
    late = NoSignal(patience=3)
    assert [late.after(step, 0.1 * (step == 2)) for step in range(1, 9)] == [None] * 8


def test_batches_without_a_good_answer_are_told_once() -> None:
    """Bug: a distillation that copies the gold answers and asks the model in vain. Batches whose rows were
    all left out say nothing about the model."""
    counter = NothingKept(patience=2)
    told = [counter.after(1, 0, 0, 0), counter.after(2, 4, 0, 4), counter.after(3, 0, 0, 0)]
    assert told == [None] * 3
    assert "all rows are gold answers" in str(counter.after(4, 4, 0, 4))
    assert counter.after(5, 4, 0, 4) is None
    assert "there are no rows" in str(NothingKept(patience=1).after(1, 4, 0, 0))
    kept = NothingKept(patience=2)
    assert [kept.after(batch, 4, int(batch == 1), 3) for batch in (1, 2, 3)] == [None] * 3
