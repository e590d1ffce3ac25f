"""MME: the first four characters decide, pairs count again, both forms on disk give the same items."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval_files import BLUE, RED, as_json, colour_of, image, item, parquet, record, replies, saved, values
from reflectvlm.data.images import BadImage
from reflectvlm.eval.tasks.mme import MME, said
from reflectvlm.eval.types import Mark, MissingData, Task

READINGS = [
    ("Yes", "yes"), ("YES.", "yes"), (" yes", "yes"), ("no", "no"), ("No, it is not", "no"),
    ("Now I see it: yes", "no"), ("not at all", "no"), ("know", "no"), ("The answer is yes", "other"),
    ("Is it? Yes", "other"), ("", "other"), ("I do not", "other"), ("   yes", "other"), ("no y", "no"),
    ("nyes", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "found"), READINGS)
def test_the_first_four_characters_decide(reply: str, found: str) -> None:
    """Bug: a word search makes "Now I see: yes" right, which the official tool reads as no."""
    assert said(reply) == found


def rows() -> list[dict[str, object]]:
    return [
        {
            "question_id": f"{category}/{name}.png",
            "image": record(colour),
            "question": f"{text} Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for category, name, colour in [
            ("count", "1", "red"),
            ("count", "2", "blue"),
            ("OCR", "1", "red"),
            ("code_reasoning", "1", "red"),
        ]
        for text, answer in [("Is it one?", "Yes"), ("Is it two?", "No")]
    ]


def test_scores_count_questions_and_whole_images(tmp_path: Path) -> None:
    """Bug: acc+ is left out or taken per question; perception takes the mean of its categories."""
    parquet(tmp_path / "MME/data/test-00000-of-00001.parquet", rows())
    task = MME()
    items = task.load(tmp_path)
    texts = ["Yes", "No", "Yes", "Yes", "No", "Yes", "yes", "No."]
    marks = task.marks(replies(items, *texts))
    assert values(marks) == [1, 1, 1, 0, 0, 0, 1, 1]
    summary = task.summary(items, marks)
    # count: 3 of 4 questions, 1 of 2 images: 75 + 50. OCR: 0. code: 100 + 100.
    found = {key: summary.values[key] for key in ("score/count", "score/OCR", "score/code_reasoning")}
    assert found == {"score/count": 125.0, "score/OCR": 0.0, "score/code_reasoning": 200.0}
    assert [summary.values[key] for key in ("perception", "cognition", "total")] == [125.0, 200.0, 325.0]
    assert summary.values["accuracy"] == 5 / 8
    assert (summary.headline, summary.unit) == ("total", "points")


def test_an_image_that_is_missing_is_asked_about_and_counts_as_wrong(tmp_path: Path) -> None:
    """Bug: its two questions disappear from the denominator, or are asked without any image."""
    changed = rows()
    for row in changed[2:4]:
        row["image"] = None
    parquet(tmp_path / "MME/test-00000-of-00001.parquet", changed)
    task = MME()
    items = task.load(tmp_path)
    with pytest.raises(BadImage, match="record has neither"):
        colour_of(items[2])
    marks = task.marks(replies(items, "Yes", "No", "", "", "Yes", "No", "Yes", "No"))
    assert task.summary(items, marks).values["score/count"] == 100.0


def test_the_release_is_read_as_the_hub_is(tmp_path: Path) -> None:
    """Bug: the layouts with and without images/ are mixed up, or ids differ and predictions do not fit."""
    release = tmp_path / "a/MME/MME_Benchmark_release_version"
    for category, name, colour in [("count", "1", "red"), ("count", "2", "blue"), ("OCR", "1", "red"),
                                   ("code_reasoning", "1", "red")]:  # fmt: skip
        inner = ("images", "questions_answers_YN") if category == "OCR" else ("", "")
        image(release / category / inner[0] / f"{name}.png", colour)
        file = release / category / inner[1] / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        said = "Please answer yes or no."
        file.write_text(f"Is it one? {said}\tYes\nIs it two? {said}\tNo\n")
    saved(tmp_path / "b/MME", "test", rows())
    ours, hub = MME().load(tmp_path / "a"), MME().load(tmp_path / "b")
    assert {one.id for one in ours} == {one.id for one in hub}
    assert ours[0].id == "count/1.png/1"
    by_id = {one.id: one for one in hub}
    for one in ours:
        other = by_id[one.id]
        assert (one.question, one.answer, one.columns) == (other.question, other.answer, other.columns)
        assert colour_of(one) == colour_of(other)
    assert colour_of(by_id["count/2.png/2"]) == BLUE


def test_each_image_has_two_questions(tmp_path: Path) -> None:
    """Bug: a file that was cut gives an acc+ over single questions."""
    parquet(tmp_path / "MME/test-0.parquet", rows()[:3])
    with pytest.raises(ValueError, match=r"count/2.png in .* has 1 questions. Every image has two"):
        MME().load(tmp_path)


def test_an_answer_that_is_neither_is_refused(tmp_path: Path) -> None:
    """Bug: a row whose label cannot be read is wrong for every model."""
    parquet(tmp_path / "MME/test-0.parquet", [{**rows()[0], "answer": "maybe"}])
    with pytest.raises(ValueError, match="'maybe', not Yes or No"):
        MME().load(tmp_path)


def test_look_backs_own_rows(tmp_path: Path) -> None:
    """Bug: they have no categories, and a sum over categories fails or shows 0."""
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes"}]
    as_json(tmp_path / "MME/MME.json", [{"id": "7", "images": ["images/7.png"], "messages": chat}])
    image(tmp_path / "MME/images/7.png")
    task = MME(asked="lookback")
    (only,) = task.load(tmp_path)
    assert colour_of(only) == RED
    summary = task.summary([only], task.marks(replies([only], "yes")))
    assert (summary.headline, summary.values) == ("accuracy", {"accuracy": 1.0})


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    """Bug: a user is told "file not found" and not what to fetch, or where to put it."""
    with pytest.raises(MissingData, match=r"(?s)lmms-lab/MME: MME/data/test-.*MME_Benchmark_release_version"):
        MME().load(tmp_path)
    with pytest.raises(MissingData, match=r"MME/MME\.json"):
        MME(asked="lookback").load(tmp_path)
    with pytest.raises(ValueError, match=r"MME.asked is 'x'. It must be one of official, lookback"):
        MME(asked="x")  # type: ignore[arg-type]


def test_unscored_questions_leave_an_image_open() -> None:
    """Bug: a pair of which one question was not scored counts as not right."""
    pair = [item("Yes", id=str(n), columns={"category": "count", "image": "a"}) for n in range(2)]
    open_one = MME().summary(pair, [Mark(value=1.0), Mark(value=None)])
    assert open_one.values["score/count"] is None
    assert open_one.values["total"] is None
    assert open_one.unscored == 1
    assert isinstance(MME(), Task)


def test_a_part_that_is_not_scored_is_not_zero() -> None:
    """Bug: cognition is 0 where none of its categories is scored or asked, and the total lacks its points."""
    asked = [
        item("Yes", id=f"{category}{n}", columns={"category": category, "image": category})
        for category in ("count", "OCR", "code_reasoning")
        for n in range(2)
    ]
    right = [Mark(value=1.0)] * 2
    parts = ("perception", "cognition", "total")
    for marks, expected in [
        ([*right, *right, *right], [400.0, 200.0, 600.0]),
        ([*right, *right, Mark(value=None), Mark(value=None)], [400.0, None, None]),
        ([*right, Mark(value=None), Mark(value=1.0), *right], [None, 200.0, None]),
        ([*right, *right], [400.0, None, 400.0]),
    ]:
        found = MME().summary(asked[: len(marks)], marks).values
        assert [found[part] for part in parts] == expected
