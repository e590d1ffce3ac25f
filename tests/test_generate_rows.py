"""`reflectvlm generate` with a file of rows: what it writes, and going on where it stopped."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fixtures import noise_image
from generating import DRAWN, SPECIAL, ask, generator, write_work
from reflectvlm import generate_command
from reflectvlm.answer_card import card_file
from reflectvlm.cli import main
from reflectvlm.generator import Generator
from reflectvlm.types import Rollout, Sample


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_work(tmp_path_factory.mktemp("work"))


@pytest.fixture(autouse=True)
def _inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers in another order than the rows, rows without gold answers refused, or a field lost."""
    out = tmp_path / "new" / "answers.jsonl"
    assert ask("data=rows.jsonl", f"out={out}", "batch=3", *DRAWN) == 0
    rows = [
        Sample(id=f"row-{i}", question=f"Page {i}?", answer="", images=(noise_image(i),)) for i in range(7)
    ]
    expected = list(generator().answers(rows, batch=3))
    assert any(rollout.insertions for rollout in expected)
    assert lines_of(out) == [
        {
            "id": rollout.prompt.sample.id,
            "question": rollout.prompt.sample.question,
            "text": rollout.text,
            "stop": rollout.stop,
            "tokens": len(rollout.sampled_ids),
            # A trigger that max_tokens cut off had nothing put in front of it.
            "inserted": [[[0, None]]] * (blocks := len(rollout.insertions))
            + [[]] * (rollout.count(SPECIAL) - blocks),
        }
        for rollout in expected
    ]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "7 rows answered in " in captured.err
    assert "answers.jsonl has 7 of 7 rows\n" in captured.err


def test_going_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers drawn twice or differently after a restart, a torn line that stays, a row that is lost."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    words = ("data=rows.jsonl", "batch=3", *DRAWN)
    assert ask(*words, f"out={whole}") == 0
    lines = whole.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:20])  # inside of the second batch of three
    shutil.copy(card_file(whole), card_file(out))
    batches: list[int] = []
    batch = Generator.batch

    def note(self: Generator, samples: Sequence[Sample], number: int = 0) -> list[Rollout]:
        batches.append(number)
        return batch(self, samples, number)

    monkeypatch.setattr(Generator, "batch", note)
    assert ask(*words, f"out={out}", "resume=auto") == 0
    assert out.read_text() == whole.read_text()
    assert batches == [1, 2]


def test_greedy_rows_are_not_answered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours spent again on rows that are in the file; weights loaded for nothing."""
    out = tmp_path / "out.jsonl"
    words = ("data=rows.jsonl", f"out={out}", "batch=3", "max_tokens=3", "resume=auto")
    assert ask(*words, "max_rows=1") == 0  # for its card
    mine = [{"id": f"row-{i}", "question": f"Page {i}?", "text": "mine"} for i in (1, 4)]
    out.write_text("".join(json.dumps(line) + "\n" for line in mine))
    asked: list[str] = []
    batch = Generator.batch

    def note(self: Generator, samples: Sequence[Sample], number: int = 0) -> list[Rollout]:
        asked.extend(sample.id for sample in samples)
        return batch(self, samples, number)

    monkeypatch.setattr(Generator, "batch", note)
    assert ask(*words) == 0
    assert asked == ["row-0", "row-2", "row-3", "row-5", "row-6"]
    assert [line["id"] for line in lines_of(out)] == ["row-1", "row-4", *asked]
    assert [line["text"] for line in lines_of(out)][:2] == ["mine", "mine"]
    monkeypatch.setattr(generate_command.Plan, "generator", None)  # not needed any more
    assert ask(*words) == 0


def test_a_signal_gives_the_batch_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch lost at SIGTERM, or a job that its scheduler takes for a finished one. The batch at hand is
    given up and asked again."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    words = ("data=rows.jsonl", "batch=3", *DRAWN)
    assert ask(*words, f"out={whole}") == 0
    batch = Generator.batch

    def stopped(self: Generator, samples: Sequence[Sample], number: int = 0) -> list[Rollout]:
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, samples, number)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "batch", stopped)
        assert ask(*words, f"out={out}") == 143
    assert len(lines_of(out)) == 3
    assert "stopped by SIGTERM: 3 rows answered" in capsys.readouterr().err
    assert ask(*words, f"out={out}", "resume=auto") == 0
    assert out.read_text() == whole.read_text()


def test_a_signal_with_the_last_row_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: all rows are in the file, and yet the job ends with 143 and is told to go on."""
    out = tmp_path / "out.jsonl"
    batch = Generator.batch

    def told_at_its_end(self: Generator, samples: Sequence[Sample], number: int = 0) -> list[Rollout]:
        made = batch(self, samples, number)
        if number == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return made

    monkeypatch.setattr(Generator, "batch", told_at_its_end)
    last = 1  # of 0, 1, 2: rows are left
    words = ("data=rows.jsonl", "batch=3", *DRAWN, f"out={out}")
    assert ask(*words) == 143
    assert len(lines_of(out)) == 6
    assert "stopped by SIGTERM: 6 rows answered" in (told := capsys.readouterr().err)
    assert "Go on with resume=auto" in told
    last = 2
    assert ask(*words, "resume=auto") == 0
    assert len(lines_of(out)) == 7
    assert "Go on with" not in capsys.readouterr().err


def test_other_columns_and_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of one's own that have to be rewritten before they can be asked."""
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["problem", "a", "b", "answer"], ["x?", "p0.png", "p1.png", "[1]"]])
    for name in ("p0.png", "p1.png"):
        (tmp_path / name).write_bytes(Path(name).read_bytes())
    out = tmp_path / "out.jsonl"
    words = (f"data={tmp_path / 'rows.csv'}", f"out={out}", "max_tokens=2", "columns.question=problem")
    assert ask(*words, "columns.images=a,b") == 0
    assert ask(*words, "columns.images=null", "resume=auto") == 0  # nothing to do
    (line,) = lines_of(out)
    assert (line["id"], line["question"]) == ("rows.csv:2", "x?")
    assert "kept 1 of 1 rows" in capsys.readouterr().err
    text = tmp_path / "text.jsonl"
    text.write_text('{"question": "y?"}\n{"question": ""}\n')
    words = (f"data={text}", f"out={tmp_path / 'o.jsonl'}", "max_tokens=2", "columns.images=null")
    assert ask(*words) == 2
    assert "Too many bad rows, max_bad=0.05 allows 0" in capsys.readouterr().err
    assert ask(*words, "max_bad=0.5") == 0
    assert "1 skipped: empty question 1 (text.jsonl:2)" in capsys.readouterr().err
    assert [line["id"] for line in lines_of(tmp_path / "o.jsonl")] == ["text.jsonl:1"]


def test_a_file_that_answers_other_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers of two data sets mixed because both count their rows from 0; a user's file cut or kept on."""
    out = tmp_path / "out.jsonl"
    words = ("data=rows.jsonl", f"out={out}", "max_tokens=2")
    assert ask(*words, "max_rows=1") == 0  # for its card
    out.write_text('{"id": "row-3", "question": "Another?", "text": "a"}\n')
    assert ask(*words, "resume=auto") == 2
    assert "answers another question under the id 'row-3'" in capsys.readouterr().err
    assert ask(*words) == 2
    assert "is there already, with 1 lines. Go on with it by resume=auto" in capsys.readouterr().err
    for text in ("my notes\nand more", '["id"]\n', '{"id": 1}\n'):
        out.write_text(text)
        assert ask(*words, "resume=auto") == 2
        assert "out.jsonl:1 is no answer of generate" in capsys.readouterr().err
        assert out.read_text() == text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=tiny"], r"model '\w{16}' → '\w{16}', reattention 'VisualCopy' → 'Implicit'. Give"),
        (
            ["reattention.limit=1"],
            r"other settings: reattention.limit None → 1\. Give the old ones to go on with it, or another",
        ),
        (["instruction=none"], "instruction.text 'Look twice.' → ''"),
        (
            ["temperature=0.5"],
            r"batch \(not given\) → 16, sampling.temperature 0.0 → 0.5, seed \(not given\) → 0",
        ),
        (["max_tokens=3"], "other settings: sampling.max_tokens 2 → 3. Give"),
        (["max_pixels=9000"], r"other settings: max_pixels \(not given\) → 9000"),
        (["seed=3", "batch=2", "max_rows=3"], ""),  # change no greedy answer
    ],
)
def test_answers_of_two_kinds_do_not_share_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    """A file half of which is another model's, with nothing in it that tells."""
    out = tmp_path / "out.jsonl"
    base = {"model": "run/model", "data": "rows.jsonl", "max_tokens": "2", "max_rows": "2", "device": "cpu"}

    def again(*more: str) -> int:
        given = base | dict(word.split("=", 1) for word in more)
        return main(["generate", f"out={out}", *(f"{key}={value}" for key, value in given.items())])

    assert again() == 0
    before = out.read_text()
    capsys.readouterr()
    assert again("resume=auto", *words) == (2 if says else 0)
    assert re.search(says, capsys.readouterr().err)
    if says:
        assert out.read_text() == before


def test_a_moved_model_goes_on_and_a_file_without_card_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same model under another name refused; answers of nobody knows what gone on with."""
    out = tmp_path / "out.jsonl"
    words = ("data=rows.jsonl", f"out={out}", "max_tokens=2", "device=cpu")
    assert main(["generate", "model=run/model", *words, "max_rows=2"]) == 0
    moved = shutil.copytree("run/model", tmp_path / "moved")
    assert main(["generate", f"model={moved}", *words, "resume=auto"]) == 0
    assert len(lines_of(out)) == 7
    card_file(out).write_text("[]")
    assert main(["generate", "model=run/model", *words, "resume=auto"]) == 2
    assert "out.jsonl.card.json is no JSON object" in capsys.readouterr().err
    card_file(out).unlink()
    assert main(["generate", "model=run/model", *words, "resume=auto"]) == 2
    assert "has no out.jsonl.card.json beside it" in capsys.readouterr().err


def test_an_image_that_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file that is deleted while hours of answers are made must cost its row only."""
    for i in range(3):
        noise_image(i).save(tmp_path / f"p{i}.png")
    rows = [{"id": i, "question": "?", "images": [f"p{i}.png"]} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make = generate_command.Plan.generator

    def late(self: generate_command.Plan) -> Generator:
        (tmp_path / "p2.png").unlink()
        return make(self)

    monkeypatch.setattr(generate_command.Plan, "generator", late)
    out = tmp_path / "out.jsonl"
    assert ask(f"data={tmp_path / 'rows.jsonl'}", f"out={out}", "max_tokens=2", "batch=2") == 0
    assert [line["id"] for line in lines_of(out)] == ["0", "1"]
    err = capsys.readouterr().err
    assert "warning: row left out: rows.jsonl:3: Image 'p2.png' does not exist" in err
    assert "has 2 of 3 rows" in err
