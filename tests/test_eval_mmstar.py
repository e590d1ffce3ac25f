"""MMStar: the first letters decide, and the mean is over rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval_files import BLUE, b64, colour_of, item, parquet, record, replies, tsv, values
from reflectvlm.eval.tasks.mmstar import MMStar, first_letter
from reflectvlm.eval.types import MissingData, Task

READINGS = [
    ("B", True), ("b. a dog", True), ("(B) a dog", True), ("Option B", True), ("The answer is B", True),
    ("\nB", True), ("A", False), ("", False), ("(", False), ("option ", False),
    ("Because it is red", True),  # the first letter is a B, and that is all the rule looks at
    ("The answer is (B)", False), ("Answer: B", False), (r"\boxed{B}", False),
    ("The correct answer is B", False),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "right"), READINGS)
def test_the_official_reading(reply: str, right: bool) -> None:
    """Bug: a search in the whole reply is kinder than the benchmark."""
    assert (first_letter(reply, "B") == "b") is right
    (mark,) = MMStar().marks(replies([item("B")], reply))
    assert mark.value == float(right)


def test_micro_over_rows_and_lmms_evals_macro() -> None:
    """Bug: as in lmms-eval, the average is over the fine categories, which are not of one size."""
    places = [
        ("math", "geometry"),
        ("math", "geometry"),
        ("math", "geometry"),
        ("math", "statistical reasoning"),
    ]
    items = [
        item("A", id=str(n), columns={"category": a, "l2_category": b}) for n, (a, b) in enumerate(places)
    ]
    task = MMStar()
    marks = task.marks(replies(items, "A", "A", "A", "B"))
    found = task.summary(items, marks)
    assert (found.headline, found.values["accuracy"]) == ("accuracy", 0.75)
    assert found.values["lmms_eval/l2_macro"] == 0.5  # (1 + 0) / 2
    assert found.values["accuracy/category/math"] == 0.75
    assert found.values["accuracy/l2_category/geometry"] == 1.0


def row(**changed: object) -> dict[str, object]:
    return {
        "index": 3,
        "question": "Which? Options: A: red, B: blue",
        "image": record("blue"),
        "answer": "B",
        "category": "math",
        "l2_category": "geometry",
        "meta_info": {"source": "x", "split": "y", "image_path": "z"},
        **changed,
    }


def test_hub_and_table(tmp_path: Path) -> None:
    """Bug: the options of VLMEvalKit's table, which stand in columns, are not asked."""
    parquet(tmp_path / "a/MMStar/mmstar.parquet", [row()])
    columns = {"A": "red", "B": "blue", "C": "", "D": "", "image": b64("blue")}
    line = {key: value for key, value in row(question="Which?").items() if key != "meta_info"}
    tsv(tmp_path / "b/MMStar/MMStar.tsv", [{**line, **columns}])
    (one,), (other,) = MMStar().load(tmp_path / "a"), MMStar().load(tmp_path / "b")
    assert (one.id, one.answer, one.question) == ("3", "B", "Which? Options: A: red, B: blue")
    assert (other.id, other.answer, other.question) == ("3", "B", "Which?\nA: red\nB: blue")
    assert other.choices == ("red", "blue")
    assert colour_of(one) == colour_of(other) == BLUE


def test_missing(tmp_path: Path) -> None:
    """Bug: nobody is told what to fetch. And an empty reply, as to a missing image, leaves the mean."""
    with pytest.raises(MissingData, match=r"Lin-Chen/MMStar: MMStar/mmstar\.parquet"):
        MMStar().load(tmp_path)
    assert values(MMStar().marks(replies([item("A")], ""))) == [0.0]
    assert isinstance(MMStar(), Task)
