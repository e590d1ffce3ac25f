"""Overlap with evaluation sets: the index, the filter, the report, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from reader_files import STORED, table
from reflectvlm.curate.contamination import EvaluationIndex, Held, Hit, Overlapping, Tally, held_in_task
from reflectvlm.curate.filters import NoOverlap
from reflectvlm.curate.hashes import ImageHash, image_hash
from reflectvlm.curate.overlap_command import run
from reflectvlm.curate.overlap_report import Report, report_files
from reflectvlm.curate.types import Question, Trace
from reflectvlm.eval.tasks.builtin import Digits
from reflectvlm.eval.types import Item

ONE, TWO = ImageHash(1, 0b1111, 0), ImageHash(2, 0xFFFF0000, 0)
NEAR = ImageHash(3, 0b1100, 1)
"""Of ONE: 2 bits of structure and 1 of colour differ."""
# 12 words, so 5 runs of 8
LONG = "which of the two ships in the harbour carries the tallest mast"
OTHER = "how many people are waiting at the bus stop in the morning"


def held(question: str, *images: ImageHash, row: str = "1", of: str = "exam", answer: str = "7") -> Held:
    return Held(set=of, id=row, question=question, answer=answer, images=images)


def found(index: EvaluationIndex, *row: Any) -> list[tuple[str, str, float | None, int | None]]:
    return [(hit.held.id, hit.evidence, hit.share, hit.apart) for hit in index.hits(*row)]


def drawing(colour: str, at: int) -> Image.Image:
    page = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(page).rectangle((at, at, at + 20, at + 30), fill=colour)
    return page


def test_shares_of_a_long_question() -> None:
    """Bug: the share of the row's runs, which a long trace makes small, in place of the question's. With
    the first 10 of 12 words 3 of 5 runs of eight are there, with the first 9 only 2."""
    index = EvaluationIndex(held=[held(LONG), held(OTHER, row="2")])
    assert found(index, f"Tell me {LONG}, please?") == [("1", "text", 1.0, None)]
    assert found(index, "Look.", f"The question is: {LONG.upper()}?") == [("1", "text", 1.0, None)]
    assert found(index, " ".join(LONG.split()[:10])) == [("1", "text", 0.6, None)]
    assert found(index, " ".join(LONG.split()[:9])) == []
    assert found(EvaluationIndex(held=[held(LONG)], share=0.4), " ".join(LONG.split()[:9])) == [
        ("1", "text", 0.4, None)
    ]
    assert found(index, " ".join(reversed(LONG.split()))) == []


def test_a_run_does_not_reach_from_one_text_into_another() -> None:
    """Bug: question and trace glued together have runs that neither has."""
    index = EvaluationIndex(held=[held("a b c d e f g h")])
    assert found(index, "a b c d", "e f g h") == []
    assert found(index, "a b c d e f g h", "") == [("1", "text", 1.0, None)]


def test_templates_are_no_evidence() -> None:
    """Bug: one question that a set asks of every picture makes all rows with it contaminated. Runs of 2 of
    3 questions are left out with common=1: of the first one "b c" (also in the second) is, "a b" and "c d"
    stay."""
    rows = [held("a b c d", row="1"), held("x b c y", row="2"), held("b c z", row="3")]
    index = EvaluationIndex(held=rows, n=2, common=1, share=0.5)
    assert found(index, "b c") == []
    assert found(index, "a b") == [("1", "text", 0.5, None)]
    assert found(index, "a b q c d") == [("1", "text", 1.0, None)]
    wide = EvaluationIndex(held=rows, n=2, common=3, share=1 / 3)
    assert [row for row, *_ in found(wide, "b c")] == ["1", "2", "3"]


def test_templates_are_those_of_one_set() -> None:
    """Bug: a question that three sets have once each is taken for a template, and hides in all of them."""
    rows = [held(LONG, of=name, row=name) for name in ("a", "b", "c")]
    assert [row for row, *_ in found(EvaluationIndex(held=rows, common=1), LONG)] == ["a", "b", "c"]
    rows = [held(LONG, row=name) for name in ("a", "b", "c")]
    assert found(EvaluationIndex(held=rows, common=2), LONG) == []


def test_short_questions_count_as_a_whole_and_without_other_images() -> None:
    """Bug: "What is the area?" about another picture is contamination, or about none it is not."""
    index = EvaluationIndex(held=[held("What is the area?", ONE), held("Who is it?", row="2")])
    assert found(index, "what is the area", "", [TWO]) == []
    assert found(index, "what is the area") == [("1", "text", 1.0, None)]
    assert found(index, "what is the area", "", [NEAR]) == [("1", "text and image", 1.0, 2)]
    assert found(index, "what is the area of it", "", []) == []
    assert found(index, "Who is it", "", [TWO]) == [("2", "text", 1.0, None)]
    many = [held("What is the area?", row=str(number)) for number in range(3)]
    assert found(EvaluationIndex(held=many, common=2), "What is the area?") == []


def test_images() -> None:
    """Bug: only a row's first image is looked up, or only the first of an evaluation row is known."""
    index = EvaluationIndex(held=[held(LONG, TWO, ONE), held(OTHER, ONE, row="2")])
    assert found(index, "Something else", "", [ImageHash(9, 2**50, 0), NEAR]) == [
        ("1", "image", None, 2),
        ("2", "image", None, 2),
    ]
    assert [apart for *_, apart in found(index, OTHER[:9], "", [ONE, NEAR])] == [0, 0]
    assert found(index, LONG, "", [ONE]) == [("1", "text and image", 1.0, 0), ("2", "image", None, 0)]
    assert found(index, LONG, "", [ImageHash(9, 2**50, 0)]) == [("1", "text", 1.0, None)]
    exact = EvaluationIndex(held=[held(LONG, ONE)], distance=None)
    assert found(exact, "Something else", "", [NEAR]) == []


def test_an_empty_index_finds_nothing() -> None:
    """Bug: no evaluation rows, or rows without words, end in an error deep inside."""
    assert EvaluationIndex(held=[]).hits(LONG, LONG, [ONE]) == []
    assert EvaluationIndex(held=[held("?")]).hits("?", "", []) == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"n": 1}, "n=1.*n >= 2"),
        ({"share": 0}, "share=0.*0 < share <= 1"),
        ({"common": 0}, "common=0.*common >= 1"),
        ({"distance": 20}, "distance is 20.*0 to 15"),
    ],
)
def test_settings_of_the_index(settings: dict[str, Any], match: str) -> None:
    """Bug: share=0 finds every row in every set."""
    with pytest.raises(ValueError, match=match):
        EvaluationIndex(held=[], **settings)


def test_rows_of_a_task() -> None:
    """Bug: a benchmark's rows without their pictures, or not all of them."""
    task = Digits(size=6)
    rows = list(held_in_task(task, Path()))
    items = task.load(Path())
    assert [(one.set, one.id, one.question, one.answer) for one in rows] == [
        ("digits", item.id, item.question, item.answer) for item in items
    ]
    assert [one.images for one in rows] == [(image_hash(item.images[0]),) for item in items]


def test_a_missing_image_does_not_stop_a_task(tmp_path: Path) -> None:
    """Bug: one image that was not fetched keeps a whole benchmark from being compared."""

    class OneRow:
        name = "exam"

        def load(self, data_dir: Path) -> list[Item]:
            return [Item(id="1", question=LONG, answer="7", images=("gone.png",), root=data_dir)]

    (row,) = held_in_task(OneRow(), tmp_path)  # type: ignore[arg-type]  # a scripted benchmark
    assert (row.question, row.images) == (LONG, ())


# -- the filter -----------------------------------------------------------------------------------


def test_no_overlap() -> None:
    """Bug: evidence that was not asked for drops rows; a trace that quotes an evaluation question passes."""
    picture = drawing("red", 10)
    index = EvaluationIndex(held=[held(LONG, image_hash(picture))])

    def why(question: str, text: str = "t", *images: Any, **settings: Any) -> str | None:
        asked = Question(id="1", question=question, answer="7", images=images)
        return NoOverlap(index=index, **settings)(Trace(question=asked, text=text, method="qwen_la"))

    assert why(OTHER) is None
    assert why(LONG) == "text of exam 1"
    assert why(OTHER, f"As in: {LONG}") == "text of exam 1"
    assert why(OTHER, "t", picture) == "image of exam 1"
    assert why(LONG, "t", picture) == "text and image of exam 1"
    assert why(LONG, evidence=["text and image"]) is None
    assert why(LONG, "t", drawing("red", 30)) == "text of exam 1"
    assert why(OTHER, "t", "gone.png") == "an image cannot be read (missing image)"


def test_evidence_is_checked() -> None:
    """Bug: a misspelt kind of evidence never counts."""
    for wrong in (["images"], [], "text"):
        with pytest.raises(ValueError, match=r"NoOverlap.evidence is .* It is a list of some of"):
            NoOverlap(index=EvaluationIndex(held=[]), evidence=wrong)  # type: ignore[arg-type]


# -- the report -----------------------------------------------------------------------------------


def report(*rows: tuple[str, tuple[Hit, ...]]) -> Report:
    exam = [held(LONG, ONE, row="1"), held(OTHER, row="2", answer="8"), held("x", of="quiz", row="1")]
    tally = Tally()
    for number, (question, hits) in enumerate(rows):
        tally.add(Overlapping(f"rows.jsonl:{number + 1}", f"r{number}", question, "7", hits))
    return Report(file="rows.jsonl", index=EvaluationIndex(held=exam), tally=tally)


def test_counts_by_set() -> None:
    """Bug: a row that meets two evaluation rows is counted twice, or under its weaker evidence."""
    one, two = held(LONG, ONE, row="1"), held(OTHER, row="2")
    made = report(
        ("a", (Hit(one, None, 0), Hit(two, 1.0, None))),
        ("b", (Hit(one, 0.6, 2),)),
        ("c", ()),
    )
    assert made.tally.by_set(made.sets) == {
        "exam": {"rows": 2, "text and image": 1, "text": 1, "image": 0, "evaluation rows": 2},
        "quiz": {"rows": 0, "text and image": 0, "text": 0, "image": 0, "evaluation rows": 0},
    }
    assert made.lines()[0] == (
        "exam: 2 of 3 rows of rows.jsonl share something with 2 of its 2 rows "
        "(text and image 1, text 1, image 0)"
    )


def test_what_was_not_looked_at_is_said() -> None:
    """Bug: half a benchmark's images are missing, and the report says that nothing was found."""
    made = report(("a", ()))
    lines = replace(made, doubts=["half of it"], blind=("rows.jsonl", "exam")).lines()
    assert lines[-2:] == [
        "no row of rows.jsonl has an image that can be read: only its texts are compared",
        "half of it",
    ]


def test_both_texts_stand_side_by_side() -> None:
    """Bug: a report that names rows only, so that nobody can judge it; texts of rows that end the table or
    run as mark-up."""
    bad = "a|b <script>x</script>\n[c](http://d) `e` \x1b[31m"
    made = report((bad, (Hit(held(LONG, ONE), 0.6, 2), Hit(held(OTHER, row="2", answer="8"), None, 0))))
    lines = made.as_markdown().splitlines()
    rows = [line for line in lines if line.startswith("| rows.jsonl:1 ")]
    assert [line.count("|") for line in rows] == [6, 6]
    assert (
        f"| exam 1 | {LONG} | text and image, 60% of its words, images 2 bits apart, same answer |" in rows[0]
    )
    assert "image, images 0 bits apart, other answer |" in rows[1]
    assert not any(sign in rows[0] for sign in ("<", "\x1b", "`", "[c]"))
    (row,) = json.loads(made.as_json())["found"]
    assert (row["question"], row["in"][0]["question"], row["in"][0]["same answer"]) == (bad, LONG, True)


@pytest.mark.parametrize("name", ["o", "o.md", "o.json"])
def test_names_of_the_report(name: str) -> None:
    """Bug: `out=o.md` written over by the JSON file, or `o.md.md`."""
    assert report_files(Path("a") / name) == (Path("a/o.md"), Path("a/o.json"))
    assert report_files(Path("a.b/c.d"))[0] == Path("a.b/c.d.md")


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Four rows of ours and an evaluation file of two, in columns of another name."""
    drawing("red", 10).save(tmp_path / "a.png")
    drawing("red", 10).resize((128, 128)).save(tmp_path / "a.jpg", quality=80)
    drawing("blue", 30).save(tmp_path / "b.png")
    ours = [
        {"id": "x", "question": OTHER, "answer": "3", "images": ["b.png"], "trace": "six"},
        {"id": "y", "question": f"Say {LONG}?", "answer": "the left", "images": ["a.jpg"]},
        {"id": "z", "question": "Another", "answer": "3", "images": ["gone.png"]},
        {"id": "w", "question": "Another", "answer": 3, "images": ["a.png"]},
    ]
    exam = [{"problem": LONG, "answer": "The left", "image": "a.png"}, {"problem": "?", "image": "b.png"}]
    for name, lines in (("ours", ours), ("exam", exam)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_command(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: columns of the one file used for the other; a bad row stops the pass or is left out without a
    word; a gold answer that is missing is an error."""
    words = [f"{rows}/ours.jsonl", f"with={rows}/exam.jsonl", "with.question=problem", "with.images=image"]
    assert run([*words, f"out={rows}/report"]) == 0
    made = json.loads((rows / "report.json").read_text())
    assert made["rows"] == 4
    assert made["sets"] == {
        "exam.jsonl": {
            "size": 2,
            "with images": 2,
            "rows": 3,
            "text and image": 1,
            "text": 0,
            "image": 2,
            "evaluation rows": 2,
        }
    }
    assert [(row["row"], row["id"]) for row in made["found"]] == [
        ("ours.jsonl:1", "x"),
        ("ours.jsonl:2", "y"),
        ("ours.jsonl:4", "w"),
    ]
    assert made["found"][1]["in"][0]["same answer"] is True
    assert made["found"][2]["answer"] == "3"
    assert len(made["unread"]) == 1
    assert "gone.png" in made["unread"][0]
    said = capsys.readouterr().out
    assert "3 of 4 rows" in said
    assert "1 rows could not be read" in said
    assert "Side by side (all)" in (rows / "report.md").read_text()


def test_an_evaluation_row_without_its_image_is_compared_by_its_text(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: evaluation rows whose images are not at hand are left out without a word, and what is in them
    passes as clean."""
    exam = [{"question": LONG, "images": ["gone.png"]}, {"question": OTHER, "images": ["b.png"]}, {"id": 3}]
    (rows / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in exam))
    assert run([f"{rows}/ours.jsonl", f"with={rows}/held.jsonl", f"out={rows}/report"]) == 0
    said = capsys.readouterr().out
    assert "2 of 4 rows" in said  # x by text and image, y by text
    assert "text and image 1, text 1, image 0" in said
    (line,) = [line for line in said.splitlines() if "held.jsonl have no image, or none that can be" in line]
    assert line.startswith("1 of 2 rows")
    assert "only their texts are compared, the first that is not whole: held.jsonl:1" in line
    assert "gone.png" in line
    assert "1 rows of held.jsonl could not be read and were not compared, the first: held.jsonl:3" in said
    made = json.loads((rows / "report.json").read_text())
    assert [line[:12] for line in made["unread of the sets"]["held.jsonl"]] == ["held.jsonl:3"]


def test_a_set_of_which_nothing_can_be_read_is_no_clean_bill(rows: Path) -> None:
    """Bug: a set that is empty, or whose column has another name, finds nothing and ends with 0."""
    with pytest.raises(
        ValueError, match=r"exam\.jsonl: no row of it can be read \(.*question.* nothing could"
    ):
        run([f"{rows}/ours.jsonl", f"with={rows}/exam.jsonl"])
    with pytest.raises(ValueError, match="is not a file"):
        run([f"{rows}/ours.jsonl", f"with={rows}/none.jsonl"])


def test_ready_readers_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: `mmk12:FOLDER`, which every other command takes, is looked for on the hub."""
    for folder, split in (("a", "train"), ("b", "test")):
        row = {"id": folder, "question": LONG, "answer": "1", "image": STORED, "subject": "math"}
        table(tmp_path / folder / f"data/{split}-00000-of-00001.parquet", row)
    assert run([f"mmk12:{tmp_path}/a", f"with=mmk12:{tmp_path}/b:test"]) == 0
    assert "text and image 1" in capsys.readouterr().out


def test_a_benchmark_by_name(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the built-in benchmark is looked for as a file; texts of its template are found in each row."""
    items = Digits().load(Path())[:3]
    for item in items:
        item.images[0].save(rows / f"{item.id}.png")
    lines = [
        {"question": item.question, "answer": item.answer, "images": [f"{item.id}.png"]} for item in items
    ]
    lines.append({**lines[0], "images": ["b.png"]})
    (rows / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run([f"{rows}/mine.jsonl", "with=digits"]) == 0
    said = capsys.readouterr().out
    assert "digits: 3 of 4 rows" in said
    assert "share something with 3 of its 400 rows" in said


def test_a_file_without_images_is_said_to_be(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a misspelt column of images compares texts only, and the report says that nothing was found."""
    run([f"{rows}/ours.jsonl", f"with={rows}/exam.jsonl", "with.question=problem", "columns.images=pictures"])
    said = capsys.readouterr().out
    assert "2 of 2 rows of exam.jsonl have no image, or none that can be read" in said
    assert "ours.jsonl has an image that can be read: only its texts are compared" in said


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "takes one file of rows, got 0"),
        (["a.jsonl", "b.jsonl", "with=digits"], "takes one file of rows, got 2"),
        (["a.jsonl"], "needs with="),
        (["a.jsonl", "with=digits,digits"], "names one twice"),
        (["a.jsonl", "with=digits", "colums.id=x"], "no key 'colums.id'. Did you mean columns.id"),
        (["a.jsonl", "with=digits", "share=much"], "share is 'much'. It must be a number"),
        (["a.jsonl", "with=digits", "out=/no/such/o"], "there is no folder /no/such"),
        (["a.jsonl", "with=digit"], "with=digit is no benchmark and no file. Did you mean digits"),
        (["gone.jsonl", "with=digits"], "'gone.jsonl' is not a file"),
    ],
)
def test_words_are_checked(words: list[str], match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a typing mistake that is found after an hour of hashing, or never."""
    monkeypatch.setattr("reflectvlm.eval.tasks.builtin.Digits.load", lambda *_: [])
    with pytest.raises(ValueError, match=match):
        run(words)


def test_files_of_one_name_are_two_sets(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: `with=a/test.jsonl,b/test.jsonl` counted as one set."""
    for folder, question in (("a", LONG), ("b", OTHER)):
        (rows / folder).mkdir()
        (rows / folder / "test.jsonl").write_text(json.dumps({"question": question}) + "\n")
    assert run([f"{rows}/ours.jsonl", f"with={rows}/a/test.jsonl,{rows}/b/test.jsonl"]) == 0
    said = capsys.readouterr().out
    assert f"{rows}/a/test.jsonl: 1 of 4 rows" in said
    assert f"{rows}/b/test.jsonl: 1 of 4 rows" in said


def test_a_report_is_not_written_over(rows: Path) -> None:
    """Bug: yesterday's report is lost."""
    (rows / "old.json").write_text("{}")
    with pytest.raises(ValueError, match=r"old\.json is there already"):
        run([f"{rows}/ours.jsonl", f"with={rows}/exam.jsonl", f"out={rows}/old"])
