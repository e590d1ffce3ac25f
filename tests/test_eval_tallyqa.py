"""TallyQA: the first number from 0 to 20, accuracy and error of simple and complex questions."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from eval_files_maths import picture, replies, sharegpt_row, tallyqa_files, tallyqa_hub, write_json
from reflectvlm.data.fetch import BadImage
from reflectvlm.data.images import load_image
from reflectvlm.eval.tasks.tallyqa import TallyQA, count
from reflectvlm.eval.types import Item, Mark, MissingData, Task

COUNTS = [
    # reply, and the count in it
    ("4", 4),
    ("There are Four dogs and 2 cats", 4),  # words and digits alike, the first counts
    ("2 of the four", 2),
    ("20", 20),
    ("21", None),  # no number from 0 to 20 stands by itself
    ("100 or 7", 7),
    ("3.5", 3),
    ("-3", 3),
    ("x4", None),
    ("a4 paper, 5", 5),
    ("someone", None),
    ("zero", 0),
    ("twenty-one", 20),
    ("sixteen", 16),
    ("007", None),
    ("١", None),
    (r"\boxed{8}", 8),
    ("", None),
]


@pytest.mark.parametrize(("text", "number"), COUNTS)
def test_the_count_in_a_reply(text: str, number: int | None) -> None:
    """Bug: a part of a longer number or word counts, or a word does not."""
    assert count(text) == number


def item(gold: str, simple: bool | None) -> Item:
    return Item(id="1", question="?", answer=gold, columns={} if simple is None else {"simple": simple})


def test_accuracy_and_error_by_kind() -> None:
    """Bug: replies without a number spoil the error, or simple and complex are exchanged."""
    rows = [item("4", True), item("2", True), item("3", False), item("9", False), item("5", False)]
    marks = TallyQA().marks(replies(rows, "four", "5", "3", "many", "1"))
    assert [mark.value for mark in marks] == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert [mark.answer for mark in marks] == ["4", "5", "3", "", "1"]
    summary = TallyQA().summary(rows, marks)
    assert summary.values == {
        "accuracy": 0.4,
        "accuracy/kind/simple": 0.5,
        "accuracy/kind/complex": pytest.approx(1 / 3),
        "rmse": math.sqrt((0 + 9 + 0 + 16) / 4),
        "rmse/kind/simple": math.sqrt(9 / 2),
        "rmse/kind/complex": math.sqrt(16 / 2),
        "no_number": 0.2,
    }


def test_figures_of_another_scorers_marks() -> None:
    """Bug: a mark that is not scored counts, or an answer with a unit has no error."""
    rows = [item("4", None), item("2", None)]
    values = TallyQA().summary(rows, [Mark(value=0.0, answer="6 cars"), Mark(value=None)]).values
    assert values == {"accuracy": 0.0, "rmse": 2.0, "no_number": 0.0}
    assert TallyQA().summary(rows, [Mark(value=None)] * 2).values["rmse"] is None


def test_the_official_files(tmp_path: Path) -> None:
    """Bug: `issimple` is lost, or a missing image takes its row with it."""
    tallyqa_files(tmp_path / "tallyqa")
    one, two = rows = TallyQA().load(tmp_path)
    assert (one.id, one.question, one.answer) == ("30095774", "How many headlights does the bus have?", "4")
    assert [row.columns["simple"] for row in rows] == [False, True]
    assert load_image(two.images[0], two.root).size == (4, 3)
    with pytest.raises(BadImage, match=r"24\.jpg"):
        load_image(one.images[0], one.root)
    marks = TallyQA().marks(replies(rows, "", "2"))
    assert TallyQA().summary(rows, marks).values["accuracy"] == 0.5


def test_the_hubs_table_has_one_row_per_image(tmp_path: Path) -> None:
    """Bug: only the first question of an image is asked."""
    tallyqa_hub(tmp_path / "tallyqa")
    one, two = TallyQA().load(tmp_path)
    assert [one.id, two.id] == ["0-0", "0-1"]
    assert (one.answer, two.question, two.columns["simple"]) == ("4", "How many dogs?", True)
    assert load_image(two.images[0], two.root).getpixel((0, 0)) == (3, 3, 3)


def test_look_backs_files(tmp_path: Path) -> None:
    """Bug: the official rows are asked under Look-Back's name."""
    tallyqa_files(tmp_path / "TallyQA")
    write_json(tmp_path / "Tallyqa/Tallyqa.json", [sharegpt_row("a", "3")])
    picture(tmp_path / "Tallyqa/images/7.png")
    (one,) = TallyQA(asked="lookback").load(tmp_path)
    assert (one.question, one.answer) == ("<image>How many in a?", "3")
    assert load_image(one.images[0], one.root).size == (4, 3)
    marks = TallyQA().marks(replies([one], "three"))
    assert set(TallyQA().summary([one], marks).values) == {"accuracy", "rmse", "no_number"}


def test_missing_data_says_what_to_fetch(tmp_path: Path) -> None:
    """Bug: a user without the data reads a traceback."""
    with pytest.raises(MissingData, match=r"vikhyatk/tallyqa-test(.*\n)*.*tallyqa/test\.json"):
        TallyQA().load(tmp_path)
    with pytest.raises(MissingData, match=r"Tallyqa/Tallyqa\.json"):
        TallyQA(asked="lookback").load(tmp_path)
    task: Task = TallyQA()
    assert task.name == "tallyqa"


def test_hostile_replies_take_no_time() -> None:
    """Bug: the pattern is quadratic in a reply of 100 kB."""
    texts = ["1" * 100_000, "seventee" * 12_000, "(" * 100_000, "9**9**9**9"]
    started = time.monotonic()
    marks = TallyQA().marks(replies([item("9", True)] * 4, *texts))
    assert time.monotonic() - started < 30
    assert [mark.value for mark in marks] == [0.0, 0.0, 0.0, 1.0]
