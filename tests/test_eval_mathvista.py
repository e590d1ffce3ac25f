"""MathVista: its rows, its extraction, its normal forms, its figures."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from eval_files_maths import (
    Scripted,
    mathvista_files,
    mathvista_hub,
    replies,
    stored,
    write_json,
    write_parquet,
)
from reflectvlm.data.fetch import BadImage
from reflectvlm.data.images import load_image
from reflectvlm.eval.tasks.mathvista import MathVista, nearest
from reflectvlm.eval.types import Item, Mark, MissingData, Task


def item(kind: str, gold: str, choices: tuple[str, ...] = (), precision: float | None = None) -> Item:
    columns = {
        "gold": gold,
        "question_type": "multi_choice" if choices else "free_form",
        "answer_type": kind,
        "precision": precision,
        "metadata": {},
    }
    return Item(id="1", question="?", answer=gold, choices=choices, columns=columns)


INTEGER, FLOAT, LIST = item("integer", "4"), item("float", "1.2", precision=1.0), item("list", "[1, 2]")
CHOICE = item("text", "140", ("135", "140", "1450"))
WORDS = item("text", "red", ("green", "red", "blue"))
FACTS = [
    # (row, reply, value, what was taken)
    (INTEGER, "4", 1.0, "4"),
    (INTEGER, " 4\n", 1.0, "4"),  # int() takes white space
    (INTEGER, "5", 0.0, "5"),
    (INTEGER, 'So. The answer is "4.9".', 1.0, "4"),  # int(float("4.9")) is 4
    (INTEGER, 'The answer is "four".', 0.0, ""),
    (INTEGER, 'The answer is "inf".', 0.0, ""),
    (INTEGER, "", 0.0, ""),  # nothing is no number
    (FLOAT, "1.2", 1.0, "1.2"),
    (FLOAT, "1.2345", 1.0, "1.2"),  # round(1.2345, 1)
    (FLOAT, "12e-1", 1.0, "1.2"),
    (FLOAT, "nan", 0.0, "nan"),
    (LIST, 'The answer is "[1, 2]".', 1.0, "[1, 2]"),
    (LIST, 'The answer is "[1,2]".', 0.0, "[1,2]"),  # lists are compared as texts
    (CHOICE, "140", 1.0, "140"),  # the reply is an option
    (CHOICE, 'The answer is "(B) 999".', 1.0, "140"),  # the letter in brackets wins
    (CHOICE, 'The answer is "B".', 1.0, "140"),
    (CHOICE, 'The answer is "b".', 0.0, "135"),  # no letter: 3 edits to each of 135 and 140, the first wins
    (CHOICE, 'The answer is "(D)".', 0.0, "135"),  # there is no option D, and "D" is 3 edits from 135
    (CHOICE, 'The answer is "145".', 0.0, "135"),  # one edit from 135 and 140 and 1450: the first
    (CHOICE, "", 0.0, "135"),  # an empty extraction picks the shortest option, here the first
    (WORDS, "", 1.0, "red"),  # and so is right at times: "red" has 3 letters, the others more
    (WORDS, 'The answer is "ed".', 1.0, "red"),
]


@pytest.mark.parametrize(("row", "text", "value", "answer"), FACTS)
def test_worked_examples(row: Item, text: str, value: float, answer: str) -> None:
    """Bug: one branch of extraction or normalisation differs from the official one."""
    (mark,) = MathVista().marks(replies([row], text))
    assert (mark.value, mark.answer) == (value, answer)


def test_an_empty_extraction_can_be_wrong_instead() -> None:
    """Bug: the flag is read the wrong way round."""
    strict = MathVista(ignore_empty_extractions=True)
    assert [mark.value for mark in strict.marks(replies([WORDS, WORDS], "", "red"))] == [0.0, 1.0]


def test_what_rules_cannot_read_is_not_scored_without_a_language_model() -> None:
    """Bug: a missing judge counts as a wrong answer."""
    rows = [INTEGER, CHOICE, FLOAT]
    marks = MathVista().marks(replies(rows, r"So \boxed{4}.", "It is B.", "about 1.2"))
    assert [mark.value for mark in marks] == [None, None, None]
    assert "language model" in marks[0].note
    assert MathVista().summary(rows, marks).values["accuracy"] is None
    assert MathVista().summary(rows, marks).unscored == 3


def test_a_language_model_extracts_what_rules_cannot() -> None:
    """Bug: it is asked about every reply, or its words go to another reply."""
    ask = Scripted("4", " (B) ", None)
    rows = [INTEGER, INTEGER, CHOICE, FLOAT]
    marks = MathVista().marks(replies(rows, "4", "four, I think", "the second", "who knows"), ask)
    assert [mark.value for mark in marks] == [1.0, 1.0, 1.0, None]
    assert len(ask.asked) == 3
    assert "four, I think" in ask.asked[0]
    assert "the whole number" in ask.asked[0]
    assert "the letter of the option" in ask.asked[1]


def test_quick_extraction_can_be_left_to_the_language_model() -> None:
    """Bug: `quick_extract=False` still reads the sentence by a rule."""
    reply = replies([INTEGER], 'The answer is "4".')
    assert MathVista(quick_extract=False).marks(reply)[0].value is None
    assert MathVista(quick_extract=False).marks(reply, Scripted("5"))[0].value == 0.0


def test_the_official_files(tmp_path: Path) -> None:
    """Bug: the row's query, its options or its image is not the official one."""
    mathvista_files(tmp_path / "mathvista")
    one, two, *_ = items = MathVista().load(tmp_path)
    assert [item.id for item in items] == ["1", "2", "3", "4"]
    assert [item.question for item in items] == ["Q1", "Q2", "Q3", "Q4"]
    # A letter where there are options, else the value
    assert [item.answer for item in items] == ["1.2", "B", "4", "[2007, 2008]"]
    assert two.columns["gold"] == "140"
    assert two.choices == ("135", "140", "1450")
    assert load_image(one.images[0], one.root).size == (4, 3)
    with pytest.raises(BadImage, match="does not exist"):  # it is asked about, found missing, and stays
        load_image(two.images[0], two.root)
    marks = MathVista().marks(replies(items, "1.2", "", "4", "x"))
    assert [mark.value for mark in marks] == [1.0, 0.0, 1.0, None]
    values = MathVista().summary(items, marks).values
    assert values["accuracy"] == pytest.approx(2 / 3)  # of three scored ones; the missing image counts
    assert values["accuracy/task/geometry"] == 0.5
    assert values["accuracy/skills/algebra"] == 0.5  # rows 1 and 2
    assert values["accuracy/skills/logic"] == 1.0  # row 1; row 4 is not scored
    assert values["accuracy/question_type/multi_choice"] == 0.0
    assert values["accuracy/answer_type/list"] is None
    assert values["accuracy/language/chinese"] == 1.0


def test_a_question_without_a_query_is_put_together(tmp_path: Path) -> None:
    """Bug: options, unit or precision are not asked, and nobody could give the gold answer."""
    mathvista_files(tmp_path / "MathVista/data", queries=False)
    one, two, *_ = MathVista().load(tmp_path)
    assert one.question == "How far? (Unit: m)\nNumber of decimal places: 1"
    assert two.question == "Which angle?\nChoices:\n(A) 135\n(B) 140\n(C) 1450"
    with pytest.raises(ValueError, match=r"row 1 .* has no 'query', which Look-Back asks"):
        MathVista(asked="lookback").load(tmp_path)


def test_the_hubs_files_and_look_backs_manner(tmp_path: Path) -> None:
    """Bug: the table's image is not used, or Look-Back's gold is the option's text."""
    mathvista_hub(tmp_path / "mathvista")
    for task in (MathVista(), MathVista(asked="lookback")):
        one, two, *_ = task.load(tmp_path)
        assert (one.question, two.answer, two.lookback_answer) == ("Hub 1", "B", None)
        assert load_image(one.images[0], one.root).getpixel((0, 0)) == (9, 9, 9)


def test_the_test_split_is_asked_and_not_scored(tmp_path: Path) -> None:
    """Bug: rows without a gold answer are all wrong."""
    row = {
        "pid": "9",
        "question": "?",
        "query": "?",
        "image": "9.jpg",
        "answer": "",
        "question_type": "free_form",
    }
    write_parquet(
        tmp_path / "mathvista/test-0.parquet", [{**row, "answer_type": "integer", "decoded_image": stored()}]
    )
    task = MathVista(split="test")
    items = task.load(tmp_path)
    assert task.marks(replies(items, "4"))[0] == Mark(value=None, note="the row has no gold answer")
    assert task.name == "mathvista_test"


def test_missing_data_says_what_to_fetch(tmp_path: Path) -> None:
    """Bug: a user without the data reads a traceback."""
    with pytest.raises(
        MissingData, match=r"MathVista is not in .*(\n.*)*AI4Math/MathVista.*(\n.*)*images/1\.jpg"
    ):
        MathVista().load(tmp_path)
    write_json(tmp_path / "mathvista/other.json", [])
    with pytest.raises(MissingData):
        MathVista().load(tmp_path)


def test_it_is_a_task() -> None:
    """Bug: the seam to the evaluation is not met."""
    task: Task = MathVista()
    assert isinstance(task, Task)
    assert task.name == "mathvista"


def test_the_nearest_option_by_hand() -> None:
    """Bug: another distance. kitten -> sitting takes 3 edits, kitten -> mitten one."""
    assert nearest("kitten", ("sitting", "mitten")) == "mitten"
    assert nearest("ab", ("ba", "b")) == "b"  # a swap is two edits


def test_hostile_replies_take_no_time() -> None:
    """Bug: a pattern or a distance that is quadratic in a reply of 100 kB."""
    texts = [
        "(" * 100_000,
        'The answer is "' * 7_000,
        "9" * 100_000,
        "9**9**9**9",
        "(A)" * 30_000,
        "\n" * 100_000,
    ]
    started = time.monotonic()
    for row in (INTEGER, FLOAT, LIST, CHOICE):
        MathVista().marks(replies([row] * len(texts), *texts), Scripted(*texts))
    assert time.monotonic() - started < 30
