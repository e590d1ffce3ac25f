"""HallusionBench: yes, no and cannot tell; questions, figures and pairs; the bias towards yes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from eval_files_maths import HALLUSION, Scripted, hallusion_files, hallusion_hub, hallusion_row, replies
from reflectvlm.data.fetch import BadImage
from reflectvlm.data.images import load_image
from reflectvlm.eval.tasks.hallusionbench import HallusionBench, read
from reflectvlm.eval.types import Item, Mark, MissingData, Task


def item(**changed: str) -> Item:
    row = {**hallusion_row("VD", "1", "0", "1"), **changed}
    return HallusionBench()._item(row, "1", Path(), "")


ITEMS = [HallusionBench()._item(row, str(place), Path(), "") for place, row in enumerate(HALLUSION)]
YES, NO = item(), item(gt_answer="0")
BARE = item(category="VS", figure_id="0", visual_input="0")

READ = [
    ("Yes.", "yes"),
    ("NO", "no"),
    ("no, the left one is", "no"),
    ("After looking, the answer is yes!", "yes"),
    (r"First no. \boxed{Yes}", "yes"),  # the box counts
    ("<think>no</think><answer>yes</answer>", "yes"),
    ("I cannot determine this without the image.", "uncertain"),
    ("It is unclear.", "uncertain"),
    ("I don't know", "uncertain"),
    ("You cannot call them equal", None),
    ("There is no difference between them", None),  # a no that answers nothing
    ("The same size", None),
    ("Nobody", None),
    ("No doubt about it: the answer is yes", None),  # first and last word disagree
    ("Yes, they look alike, but the answer is no.", None),
    ("No, it is no", "no"),
]


@pytest.mark.parametrize(("text", "told"), READ)
def test_what_a_reply_says(text: str, told: str | None) -> None:
    """Bug: a word inside of a sentence is taken for the answer, or one of two that disagree."""
    assert read(text) == told


def test_marks_by_rule() -> None:
    """Bug: unclear counts as right with an image, or as wrong without one."""
    rows = [YES, YES, NO, YES, BARE, BARE, BARE, YES, BARE]
    texts = ["Yes", "No", "no", "I am not sure", "I am not sure", "no", "yes", "The same size", ""]
    marks = HallusionBench().marks(replies(rows, *texts))
    assert [mark.value for mark in marks] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, None, 0.0]
    assert "language model" in marks[7].note
    assert marks[8].note == "the reply is empty"


def test_a_language_model_judges_every_reply() -> None:
    """Bug: "incorrect" holds the word "correct" and counts as right."""
    ask = Scripted("Correct", "incorrect.", "unclear", "unclear", None)
    rows = [YES, NO, YES, BARE, YES, YES]
    marks = HallusionBench().marks(replies(rows, "yes", "maybe", "hm", "hm", "hm", ""), ask)
    assert [mark.value for mark in marks] == [1.0, 0.0, 0.0, 1.0, None, 0.0]
    assert [mark.answer for mark in marks] == ["yes", "yes", "uncertain", "uncertain", "", ""]
    assert len(ask.asked) == 5  # an empty reply is not worth a call
    assert "A is larger." in ask.asked[1]
    assert "maybe" in ask.asked[1]


def test_accuracies_by_hand() -> None:
    """Bug: figure 0 of VS counts as a figure, or a pair is right with one wrong row.

    row  cat fig q visual gold | right
    0    VD  0   0   1    yes  |  1
    1    VD  0   1   1    no   |  1
    2    VD  1   0   2    no   |  0
    3    VD  1   1   2    yes  |  1
    4    VS  0   0   0    yes  |  0
    5    VS  1   0   1    yes  |  1
    6    VS  2   0   2    no   |  1
    """
    right = (1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0)
    summary = HallusionBench().summary(ITEMS, [Mark(value=value) for value in right])
    assert summary.headline == "overall"
    expected = {
        "aAcc": 5 / 7,
        "qAcc": 1 / 3,  # VD 0: rows 0, 2; VD 1: rows 1, 3, right; VS 0: rows 4, 5, 6
        "fAcc": 3 / 4,  # VD 0, right; VD 1; VS 1 and VS 2, right; VS 0 is none
        "overall": (5 / 7 + 1 / 3 + 3 / 4) / 3,
        "qAcc/easy": 2 / 3,  # rows 0; 1; 4 and 5
        "qAcc/hard": 2 / 3,  # rows 2; 3; 6
        "aAcc/VD": 3 / 4,
        "qAcc/VD": 1 / 2,
        "fAcc/VD": 1 / 2,
        "aAcc/VS": 2 / 3,
        "qAcc/VS": 0.0,
        "fAcc/VS": 1.0,
        # said yes: rows 0, 3, 5 (right, gold yes) and 2 (wrong, gold no): 4 of 7; gold yes: 4 of 7
        "yes_bias": 0.0,
        "false_positive_ratio": 1 / 2,  # of the wrong rows 2 and 4, row 2 said yes
    }
    assert dict(summary.values) == {name: pytest.approx(value) for name, value in expected.items()}


def test_a_model_that_always_says_yes() -> None:
    """Bug: the bias has the wrong sign."""
    marks = HallusionBench().marks(replies(ITEMS, *["Yes"] * 7))
    values = HallusionBench().summary(ITEMS, marks).values
    assert values["yes_bias"] == pytest.approx(1 - 4 / 7)
    assert values["false_positive_ratio"] == 1.0


def test_rows_that_are_not_scored() -> None:
    """Bug: they count as wrong, or make a question right whose other row is unknown."""
    values: list[float | None] = [1.0, None, 1.0, 0.0, None, 1.0, 1.0]
    summary = HallusionBench().summary(ITEMS, [Mark(value=value) for value in values])
    assert summary.unscored == 2
    assert summary.values["aAcc"] == 4 / 5
    assert summary.values["qAcc"] == 1 / 2  # VD 0 right; VD 1 wrong by row 3; VS 0 unknown
    assert summary.values["fAcc"] == 2 / 3  # VD 0 unknown; VD 1 wrong; VS 1, VS 2 right
    nothing = HallusionBench().summary(ITEMS, [Mark(value=None)] * 7)
    assert set(nothing.values.values()) == {None}


@pytest.mark.parametrize("pictures", ["", "images"])
def test_the_official_files(tmp_path: Path, pictures: str) -> None:
    """Bug: images are not found in one of the two places, or rows without one are dropped."""
    hallusion_files(tmp_path / "hallubench", pictures)
    rows = HallusionBench().load(tmp_path)
    assert [row.id for row in rows][:5] == [
        "VD_chart_0_0_0",
        "VD_chart_0_0_1",
        "VD_chart_0_1_0",
        "VD_chart_0_1_1",
        "VS_chart_0_0_0",
    ]
    assert [row.answer for row in rows] == ["yes", "no", "no", "yes", "yes", "yes", "no"]
    assert rows[0].question == "In 2019, is A larger? Is it?"
    assert rows[4].images == ()
    assert load_image(rows[0].images[0], rows[0].root).size == (4, 3)
    with pytest.raises(BadImage, match=r"0_1\.png"):
        load_image(rows[2].images[0], rows[2].root)
    marks = HallusionBench().marks(replies(rows, "yes", "no", "", "yes", "yes", "yes", "no"))
    assert HallusionBench().summary(rows, marks).values["aAcc"] == pytest.approx(6 / 7)


def test_look_back_cuts_rows_and_questions(tmp_path: Path) -> None:
    """Bug: rows without an image stay, or the question is not cut at its first question mark."""
    hallusion_files(tmp_path / "hallubench")
    rows = HallusionBench(asked="lookback").load(tmp_path)
    assert len(rows) == 6
    end = r"? You final answer can only be \boxed{yes} or \boxed{no}."
    assert rows[0].question == "In 2019, is A larger" + end
    assert rows[0].answer == "yes"


def test_the_hubs_tables(tmp_path: Path) -> None:
    """Bug: the rows without an image, a split of their own, are missing."""
    hallusion_hub(tmp_path / "hallusionbench")
    rows = HallusionBench().load(tmp_path)
    assert len(rows) == 7
    assert rows[6].images == ()
    assert load_image(rows[0].images[0], rows[0].root).size == (4, 3)
    assert len(HallusionBench(asked="lookback").load(tmp_path)) == 6


def test_missing_data_says_what_to_fetch(tmp_path: Path) -> None:
    """Bug: a user without the data reads a traceback."""
    with pytest.raises(MissingData, match=r"lmms-lab/HallusionBench(.*\n)*.*hallusion_bench\.zip"):
        HallusionBench().load(tmp_path)
    task: Task = HallusionBench()
    assert task.name == "hallusionbench"


def test_hostile_replies_take_no_time() -> None:
    """Bug: a pattern that is quadratic in a reply of 100 kB."""
    texts = ["cannot " * 14_000, "not " * 25_000, "yes" * 33_000, r"\boxed{" * 14_000, "(" * 100_000]
    started = time.monotonic()
    HallusionBench().marks(replies([YES] * 5, *texts))
    assert time.monotonic() - started < 30
