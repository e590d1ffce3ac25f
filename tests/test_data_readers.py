"""Ready readers: the layouts of public data sets as plain rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import reader_files
from reflectvlm.data.findings import Tally
from reflectvlm.data.readers import (
    MMK12,
    Geo170K,
    Geometry3K,
    LlavaCot,
    MathVisionRows,
    PolyMath,
    SceMQA,
    ViRL39K,
    named,
    questions,
)
from reflectvlm.data.readers.json_array import open_json_array
from reflectvlm.data.readers.layout import braced
from reflectvlm.data.sources import JsonLines, Parquet, dataset
from reflectvlm.types import Sample


def both(source: Any, count: int) -> list[Sample]:
    """The samples; the questions say the same, with their images unread."""
    samples = list(dataset(source, max_bad=0.7))
    asked = list(questions(source, max_bad=0.7, name="here"))
    assert len(samples) == len(asked) == count
    for sample, question in zip(samples, asked, strict=True):
        assert (sample.id, sample.question, sample.answer) == (
            question.id,
            question.question,
            question.answer,
        )
        assert (len(sample.images), sample.columns) == (len(question.images), question.columns)
        assert (question.source, question.root) == ("here", source.root)
        assert all(image.size == (40, 30) for image in sample.images)
    return samples


def test_llava_cot(tmp_path: Path) -> None:
    """Bug: the whole reply becomes the gold answer, or a second turn is asked without the first."""
    first, second = both(LlavaCot(reader_files.llava_cot(tmp_path)), 2)
    assert (first.id, first.question, first.answer) == ("llava-cot-1", "What is red?", "B")
    assert (first.columns["reasoning"], first.columns["exchanges"]) == ("r", 1)
    assert first.columns["trace"].startswith("<SUMMARY>")
    assert (second.id, second.question, second.answer, second.columns["exchanges"]) == (
        "llava-cot-2", "First?", "one", 2,
    )  # fmt: skip


def test_geometry3k_of_the_authors(tmp_path: Path) -> None:
    """Bug: problems in the order of their names as texts, the letter where the hub has the value."""
    folder = reader_files.geometry3k(tmp_path)
    two, ten = both(Geometry3K(folder), 2)
    assert (two.id, two.question, two.answer) == ("geometry3k-2", "Find $x$.", "\\sqrt{3}")
    assert two.columns["text_logic_form"] == ["Find(x)"]
    assert (ten.id, ten.answer, ten.columns["diagram_logic_form"]) == ("geometry3k-10", "1", [])
    asked = dataset(Geometry3K(folder, choices=True))[0]
    assert (asked.question, asked.answer) == (
        "Find $x$.\nChoices:\n(A) 1\n(B) 2\n(C) \\sqrt{3}\n(D) 4",
        "C",
    )


def test_geometry3k_of_the_hub(tmp_path: Path) -> None:
    """Bug: `val` is looked for under its own name, which the hub does not have."""
    folder = reader_files.geometry3k_hub(tmp_path)
    first, second = both(Geometry3K(folder, "val"), 2)
    assert (first.id, second.id) == ("geometry3k-val-1", "geometry3k-val-2")
    assert (first.question, first.answer) == ("<image>Find x.", "3")
    with pytest.raises(ValueError, match=r"choices=True\) needs the authors' folders"):
        Geometry3K(folder, "val", choices=True).open()


def test_mathvision(tmp_path: Path) -> None:
    """Bug: `<image1>` is no marker here, twice it would be two; letters as options are listed as texts."""
    first, second = both(MathVisionRows(reader_files.mathvision(tmp_path / "a")), 2)
    assert first.question == "How many? <image> or \nChoices:\n(A) 2\n(B) 3"
    assert (second.question, second.answer, second.columns["level"]) == ("Which? <image>", "A", 2)
    (third,) = both(MathVisionRows(reader_files.mathvision_hub(tmp_path / "b"), "testmini"), 1)
    assert (third.id, third.question, third.answer) == ("mathvision-7", "<image> How many?", "12")
    assert "decoded_image" not in third.columns


def test_polymath_leaves_out_rows_without_gold(tmp_path: Path) -> None:
    """Bug: a null gold answer becomes the text "None"."""
    (row,) = both(PolyMath(reader_files.polymath(tmp_path)), 1)
    assert (row.id, row.answer) == ("polymath-test-1", "3")
    assert row.question == "Answer the question in the image.\nOptions: 1, 2, 3, 4"
    assert dict(row.columns) == {
        "answer_option": "1, 2, 3, 4", "final_answer_range": "1-4", "category": "odd_one_out",
    }  # fmt: skip


def test_scemqa(tmp_path: Path) -> None:
    """Bug: an explanation is the gold answer, braces inside of it are cut, a picture has one suffix only."""
    source = SceMQA(reader_files.scemqa(tmp_path))
    choice, free = both(source, 2)
    assert (choice.id, choice.answer, choice.columns["kind"]) == ("scemqa-choice-Math-1", "B", "choice")
    assert (free.id, free.answer) == ("scemqa-free-Math-1", "\\frac{1}{2}")
    assert free.columns["answers"] == ["\\frac{1}{2}", "0.5"]
    tally = Tally()
    list(questions(source, max_bad=0.5, tally=tally))
    ((_, reason, count, (finding,)),) = tally.kinds("problem")
    assert (reason, count, finding.position) == ("answer not found", 1, "multiple_choice.json Physics:1")


def test_geo170k(tmp_path: Path) -> None:
    """Bug: the first option that is named is taken for the answer; brackets in a text end an item."""
    folder = reader_files.geo170k(tmp_path)
    first, second = both(Geo170K(folder), 2)
    assert (first.id, first.answer, second.id, second.answer) == (
        "geo170k-qa_tuning-1", "B", "geo170k-qa_tuning-2", "A",
    )  # fmt: skip
    assert '"x" in [A, {B}?' in first.question
    (caption,) = both(Geo170K(folder, "alignment"), 1)
    assert caption.answer == "A triangle."
    (row,) = both(Geo170K(reader_files.geo170k_hub(tmp_path / "hub")), 1)
    assert row.answer == "C"


def test_mmk12_and_virl39k(tmp_path: Path) -> None:
    """Bug: a box or spaces stay in the gold answer; a rate of -1, which means unknown, is averaged."""
    (one,) = both(MMK12(reader_files.mmk12(tmp_path / "a")), 1)
    assert (one.id, one.answer, one.columns["subject"]) == ("mmk12-train-k-1", "12", "math")
    (two,) = both(ViRL39K(reader_files.virl39k(tmp_path / "b")), 1)
    assert (two.id, two.answer, len(two.images)) == ("virl39k-q-1", "\\frac{1}{2}", 2)
    assert (two.columns["pass_rate_32b"], two.columns["pass_rate_7b"]) == (0.5, None)


@pytest.mark.parametrize("reader", [PolyMath, MMK12, Geometry3K])
def test_ids_differ_over_several_files(reader: Any, tmp_path: Path) -> None:
    """Bug: each Parquet file counts its rows from 1, so that a set of several files is nearly all repeated
    ids, and no row of it can be used."""
    row = {
        "image": reader_files.STORED,
        "images": [reader_files.STORED],
        "problem": "Find x.",
        "question": "?",
    }
    split = "train" if reader is not PolyMath else "test"
    for part in range(3):
        rows = [{**row, "answer": "3", "final_answer": "3"}] * 2
        reader_files.table(tmp_path / f"data/{split}-0000{part}-of-00003.parquet", *rows)
    ids = [one.id.rpartition("-")[2] for one in questions(reader(tmp_path, split))]
    assert ids == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("reader", "match"),
    [
        (
            LlavaCot,
            r"LLaVA-CoT-100k is not in .*It holds other.txt\. Wanted: the hub's Xkev/LLaVA-CoT-100k: train.j",
        ),
        (Geometry3K, r"Geometry3K is not in .* train/0/data.json, .*; or the hub's hiyouga/geometry3k"),
        (MathVisionRows, r"MATH-Vision is not in .* data/test.jsonl and images/1.jpg"),
        (PolyMath, r"PolyMATH is not in .* him1411/polymath: data/test-….parquet"),
        (SceMQA, r"SceMQA is not in .* Multiple_Choice/multiple_choice.json and the pictures"),
        (Geo170K, r"Geo170K is not in .* qa_tuning.json or data/qa_tuning-"),
        (MMK12, r"MMK12 is not in .* FanqingM/MMK12: data/train-"),
        (ViRL39K, r"ViRL39K is not in .* TIGER-Lab/ViRL39K: 39Krelease.parquet"),
    ],
)
def test_missing_data_is_told(reader: Any, match: str, tmp_path: Path) -> None:
    """Bug: FileNotFoundError with a path that the user never wrote, and not a word of where to get it."""
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(ValueError, match=match):
        reader(tmp_path).open()


def test_missing_images_are_told_once(tmp_path: Path) -> None:
    """Bug: an archive that nobody unpacked is 100,000 bad rows."""
    folder = reader_files.llava_cot(tmp_path)
    (folder / "image/sqa/1.png").unlink()
    with pytest.raises(ValueError, match=r"images of LLaVA-CoT-100k, such as 'sqa/1.png', are in none of"):
        dataset(LlavaCot(folder))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        ('{"a": 1}', "no whole JSON array"),
        ('[{"a": 1}, {"a"', "may be cut off"),
        ('[{"a": "x]', "may be cut off"),
    ],
)
def test_a_cut_array_is_refused(text: str, match: str, tmp_path: Path) -> None:
    """Bug: half of a file that was cut off passes as all of it."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        open_json_array(tmp_path / "x.json")


def test_items_of_an_array_are_those_of_json(tmp_path: Path) -> None:
    """Bug: an item's end is found at a bracket in a text, or behind an escaped quote."""
    items = [{"a": '"]}\\'}, {"b": [1, {"c": "[{"}]}, {}, {"d": '\\"'}]
    for indent in (None, 2):
        (tmp_path / "x.json").write_text(json.dumps(items, indent=indent))
        rows = open_json_array(tmp_path / "x.json")
        assert [rows[i] for i in range(len(rows))] == items
        assert rows.position(2) == "x.json:3"


def test_braces() -> None:
    """Bug: the answer ends at its first closing brace; an open one is read to the end of the text."""
    assert list(braced(r"\boxed{a{b}} and \boxed{c}", "boxed")) == ["a{b}", "c"]
    assert list(braced(r"\boxed{a{b}", "boxed")) == []


def test_named_sources(tmp_path: Path) -> None:
    """Bug: a path with a colon is taken for a reader, or the split behind it is lost."""
    assert named(f"geometry3k:{tmp_path}:test") == Geometry3K(str(tmp_path), "test")
    assert named(f"geo170k:{tmp_path}") == Geo170K(str(tmp_path))
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert named(str(tmp_path / "a.jsonl")) == JsonLines(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="does not exist"):
        named("./mystery:folder")
    assert isinstance(named("b.parquet"), Parquet)


def test_tools_take_readers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a public set has to be written to a file before it can be checked, shown or mixed."""
    from reflectvlm.data import check_command, mix_command, show_command

    (tmp_path / "geo").mkdir()
    folder = reader_files.geo170k(tmp_path / "geo")
    assert check_command.run([f"geo170k:{folder}", "images=true"]) == 1
    assert "qa_tuning.json:3: conversations: answer not found" in capsys.readouterr().out
    assert check_command.run([f"geo170k:{folder}:alignment", "images=true"]) == 0
    assert show_command.run([f"geo170k:{folder}", "rows=1"]) == 0
    assert "[image 1: 40 x 30]" in capsys.readouterr().out
    out = tmp_path / "mixed.jsonl"
    assert mix_command.run([f"geo170k:{folder}:2", f"out={out}", "max_bad=0.5"]) == 0
    assert [sample.id for sample in dataset(out)] == [f"geo170k/geo170k-qa_tuning-{i}" for i in (1, 2)]


def test_questions_leave_out_what_a_data_set_does(tmp_path: Path) -> None:
    """Bug: rows enter a cold start that training refuses, or a repeated id makes two traces one."""
    rows = [
        {"id": "a", "question": "q", "answer": "1"},
        {"id": "a", "question": "again", "answer": "1"},
        {"question": "", "answer": "1"},
        {"question": "q", "answer": "1", "images": ["gone.png"]},
        {"question": "<image> q", "answer": 2},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tally = Tally()
    (kept,) = questions(path, max_bad=0.8, tally=tally)
    assert kept.id == "a"
    assert {reason: count for _, reason, count, _ in tally.kinds("problem")} == {
        "duplicate id": 1, "empty question": 1, "missing image": 1, "markers differ from images": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"Too many bad rows, max_bad=0.5: kept 1 of 5 rows; 4 left out: "):
        list(questions(path, max_bad=0.5))
    with pytest.raises(ValueError, match=r"rows.jsonl:2: Id 'a' is already that of an earlier row"):
        list(questions(path, on_bad="error"))
