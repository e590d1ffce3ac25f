"""`reflectvlm inspect`: a dumped batch, a run and a checkpoint on the screen, whatever is in them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures import make_policy, make_prompt
from reflectvlm.batch import Batch
from reflectvlm.cli import main
from reflectvlm.cli_help import help_of
from reflectvlm.inspect_command import Asked
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.dump import ABOUT, dump_batch
from reflectvlm.train.run import RunResult
from reflectvlm.train.table import Table, say, visible
from reflectvlm.types import Text
from training import small_sft

QUIET = {"evaluation": None, "test": None}
CODES = "\x1b[2J\x9b31m\x07\u202e"
"""Clears a screen, colours it, rings, and turns the line around."""


def a_batch() -> Batch:
    policy = make_policy()
    rows = [
        (make_prompt(policy, i, f"Question {i}?"), (Text(ids=(100 + i, 50), trained=True),)) for i in range(3)
    ]
    return dataclasses.replace(policy.batch(rows), advantages=torch.tensor([0.5, float("nan"), -0.25]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return small_sft(tmp_path_factory.mktemp("runs"), steps=4, **QUIET).run()


def shown(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["inspect", *map(str, words)]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out


# -- a dumped batch ---------------------------------------------------------------------------------


def test_a_dump_says_why_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a folder of tensors, and nobody knows in which row the NaN is."""
    policy, batch = make_policy(), dataclasses.replace(a_batch(), row_ids=("a", "b", "c"))
    folder = dump_batch(tmp_path / "d", batch, "The loss (nan)", step=7, decode=policy.decode)
    out = shown(capsys, folder)
    assert f"{folder}: a batch of step 7\nwhy: The loss (nan)\n3 rows; 6 trained tokens" in out
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    # The smallest and largest number beside the one NaN.
    assert ["advantages", "3", "float32", "-0.25", "0.5", "1", "0"] in cells
    (row,) = (one for one in cells if one[:2] == ["1", "b"])
    assert row[2:6] == ["1", *[str(int(n)) for n in (batch.attention[1].sum(), batch.prompt_tokens[1])], "2"]
    assert row[-1] == "advantages"
    # What is not finite comes first.
    assert out.index("row 1, b, advantage nan, not finite: advantages") < out.index("row 0, a, advantage 0.5")
    assert "    <|im_start|>user\n" in out
    assert "[16 visual tokens]" in out
    assert "Question 2?" in out


def test_few_texts_and_whose_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: pages of text for one question; a dump without text that says nothing."""
    unnamed = dataclasses.replace(a_batch(), row_ids=())
    folder = dump_batch(tmp_path / "d", unnamed, "why", row_ids=("p", "q"))
    out = shown(capsys, folder / ABOUT)
    assert "model=PATH, a folder with the run's tokenizer" in out
    assert "samples of the step, in no known order: p, q" in out
    out = shown(capsys, folder, "model=tiny", "rows=1")
    assert "Question 1?" in out
    assert "Question 0?" not in out
    assert "2 more rows; rows=3 shows their text too." in out
    make_policy().save(tmp_path / "model")
    assert "Question 0?" in shown(capsys, f"path={folder}")


def test_a_batch_of_numbers_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: one looks for a NaN in the batch that arose in the model."""
    batch = dataclasses.replace(a_batch(), advantages=torch.zeros(3))
    folder = dump_batch(tmp_path / "d", batch, "why", limit=1)
    out = shown(capsys, folder)
    assert "every value of the batch is finite" in out
    assert "left out of the dump because it would have been too large" in out


def test_what_a_model_wrote_does_not_drive_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: an escape sequence in an answer, an id or a reason clears the screen or hides what follows."""
    hostile = f"<back>{CODES}</back>"
    folder = dump_batch(
        tmp_path / "d", a_batch(), hostile, row_ids=[hostile] * 3, decode=lambda _: f"{hostile}\r\n\ud800"
    )
    out = shown(capsys, folder)
    assert not {c for c in out if not c.isprintable()} - {"\n"}
    assert "<back>\\x1b[2J\\x9b31m\\x07\\u202e</back>" in out
    assert "\\ud800" in out
    run = tmp_path / "run"
    (run / CODES).mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"step": CODES, "loss": CODES}) + "\n")
    (run / "overrides.txt").write_text(CODES)
    (run / CODES / ABOUT).write_text(json.dumps({"reason": CODES}))
    assert not {c for c in shown(capsys, run) if not c.isprintable()} - {"\n"}


def test_a_stream_that_lacks_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a UnicodeEncodeError in the C locale, from a dash in a table or a character of an answer."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    say("ü\n")
    Table("–", ("a", "b")).add("–", "\x1b").show()
    assert raw.getvalue().startswith(b"?\\n\n### ?\n\n| a   |    b |\n")
    assert visible("tab\tü 图\u200b") == "tab\\tü 图\\u200b"


def test_long_texts_are_cut_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: 100 kB of one letter scroll everything else away."""
    folder = dump_batch(tmp_path / "d", a_batch(), "why", decode=lambda _: "x" * 100_000)
    out = shown(capsys, folder, "rows=1")
    assert "x" * 4000 in out
    assert "x" * 4001 not in out
    assert "more characters]" in out


# -- a run and its checkpoints ----------------------------------------------------------------------


def test_a_run(run: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: one has to read four files to know whether a run can go on."""
    for path in (run.folder, run.folder / "checkpoints", run.folder / "metrics.jsonl"):
        out = shown(capsys, path)
        assert out.startswith(f"{run.folder}: finished\n")
        assert "step-000002" in out
        assert out.count("| valid |") == 2
        last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert f"| 4    | {last['loss']:.4g} |" in out
        assert "Dumped batches (reflectvlm inspect FOLDER): none" in out


def test_an_unfinished_run_with_harm(
    run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a checkpoint that cannot be loaded is counted on; a dump that is not found."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "summary.json").unlink()
    newest = folder / "checkpoints" / "step-000004"
    (newest / "model.safetensors").write_bytes(b"x")
    (folder / "checkpoints" / ".tmp-step-000005-1").mkdir()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": null}\n{"step": 6, "lo')
    dump_batch(folder / "nonfinite-step-5", a_batch(), "The loss (nan)", step=5)
    out = shown(capsys, folder)
    assert f"{folder}: unfinished, and no process is at it; resume=auto goes on" in out
    assert "model.safetensors has 1 bytes" in out
    assert len(re.findall(r"\| +valid \|", out)) == 1
    assert "a save that was cut off, or is being written" in out
    assert "| nonfinite-step-5 |    5 | The loss (nan) |" in out
    assert "not finite" in out
    assert "| 6 " not in out
    # The test's own parent is alive, and is not this process.
    holder = {"pid": os.getppid(), "host": socket.gethostname(), "born": None}
    (folder / "lock.json").write_text(json.dumps(holder))
    assert f"unfinished; process {os.getppid()} on {socket.gethostname()} is at it" in shown(capsys, folder)


def test_a_checkpoint(run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: broken weights that one finds only by loading them; a script that takes a broken one for whole."""
    whole = run.folder / "checkpoints" / "step-000004"
    out = shown(capsys, whole)
    assert out.startswith(f"{whole}: valid\n")
    values = sum(tensor.numel() for tensor in load_file(whole / "model.safetensors").values())
    (line,) = (line for line in out.splitlines() if "model.safetensors" in line)
    assert f"{values:,} |          0 |" in line
    harmed = tmp_path / "step-000004"
    shutil.copytree(whole, harmed)
    weights = load_file(harmed / "model.safetensors")
    next(one for one in weights.values() if one.dim() == 1)[0] = float("nan")
    save_file(weights, harmed / "model.safetensors")
    out = shown(capsys, harmed / "manifest.json", code=1)
    assert "not valid: " in out
    assert "model.safetensors has" in out
    (line,) = (line for line in out.splitlines() if line.startswith("| model.safetensors"))
    assert line.endswith(" 1 |")
    (harmed / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    assert "unreadable" in shown(capsys, harmed, code=1)


# -- words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "inspect needs a path: a dumped batch, a run's folder or a checkpoint."),
        (["here/rum"], "'here/rum' does not exist. Did you mean 'here/run'?"),
        (["none/at/all"], "'none/at/all' does not exist."),
        (["here/a.txt/x"], "'here/a.txt/x' does not exist. here/a.txt is a file."),
        (["here"], "'here' holds several runs: here/run. Name one of them."),
        (["here/a.txt"], "'here/a.txt' is no dumped batch, no run's folder and no checkpoint."),
        (["here/model"], "'here/model' is a model. `reflectvlm generate model=here/model` asks it"),
        (["here/run", "here/run"], "path is given twice: 'here/run' and 'here/run'. Give it once."),
        (["here/run", "row=3"], "inspect has no key 'row'. Did you mean rows?"),
        (["here/run", "rows=-1"], "rows is -1. It must be a whole number, 0 or more."),
        (["here/run", "--rows=1"], "there are no dashes"),
        (["here/dump", "model=here/none"], "here/dump is no whole dump: batch.safetensors is missing."),
    ],
)
def test_wrong_words_are_one_line_and_exit_code_2(
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bug: a traceback, or an empty table for a folder that is no run."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "model", "dump"):
        (tmp_path / "here" / name).mkdir(parents=True)
    (tmp_path / "here" / "a.txt").touch()
    (tmp_path / "here" / "run" / "metrics.jsonl").touch()
    (tmp_path / "here" / "model" / "config.json").touch()
    (tmp_path / "here" / "dump" / ABOUT).write_text('{"images_kept": true}')
    assert main(["inspect", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_a_path_with_an_equals_sign(tmp_path: Path) -> None:
    """Bug: the folder of a run named steps=2 cannot be inspected."""
    (tmp_path / "steps=2").mkdir()
    assert Asked.read([str(tmp_path / "steps=2")]).path == tmp_path / "steps=2"
    with pytest.raises(RecipeError, match="inspect has no key"):
        Asked.read([str(tmp_path / "steps=3")])
    assert "inspect runs/NAME" in help_of("inspect")


def test_a_model_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: half of the output, and then a traceback of transformers."""
    folder = dump_batch(tmp_path / "d", a_batch(), "why")
    assert main(["inspect", str(folder), f"model={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "has no tokenizer that can be loaded" in err
