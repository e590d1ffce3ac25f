"""MMHal-Bench: the judge's rating by the official reading, and nothing at all without a judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from eval_files import RED, as_json, colour_of, image, parquet, record, replies, values
from reflectvlm.eval.tasks.mmhal import MMHalBench, rating
from reflectvlm.eval.types import Item, MissingData, Task

READINGS = [
    ("Good. Rating: 6", 6), ("RATING: 0, with hallucination", 0), ("rating: 3\nRating: 3", 3),
    ("Rating: 2 or Rating: 4", None), ("Rating 5", None), ("", None), ("Rating: 7", None), ("Rating:5", None),
    ("Rating: 10", 1), ("Rating: **4**", None), ("Rating: 3.5", 3),
]  # fmt: skip


@pytest.mark.parametrize(("said", "found"), READINGS)
def test_a_rating(said: str, found: int | None) -> None:
    """Bug: the last number in the judge's text is taken, or one of two ratings."""
    assert rating(said) == found


class Scripted:
    def __init__(self, *said: str | None) -> None:
        self.said, self.prompts = list(said), []

    def __call__(self, prompts: Sequence[str], /) -> list[str | None]:
        self.prompts += prompts
        return [self.said.pop(0) for _ in prompts]


def row(place: int, **changed: object) -> dict[str, object]:
    kinds = [
        "attribute",
        "adversarial",
        "comparison",
        "counting",
        "relation",
        "environment",
        "holistic",
        "other",
    ]
    return {
        "question_type": kinds[place % 8],
        "question_topic": "food",
        "image_id": f"id{place}",
        "image_src": f"https://example.org/7/{place}_o.jpg",
        "image_content": ["Dog", "Bowl"],
        "question": f"What colour is bowl {place}?",
        "gt_answer": "Blue.",
        "model_answer": "",
        **changed,
    }


def loaded(tmp_path: Path, count: int) -> list[Item]:
    as_json(tmp_path / "MMHal-Bench/response_template.json", [row(place) for place in range(count)])
    image(tmp_path / "MMHal-Bench/images/0_o.jpg")
    return MMHalBench().load(tmp_path)


def test_figures(tmp_path: Path) -> None:
    """Bug: a rating of 3 is a hallucination; what cannot be rated leaves the mean; kinds are mixed up."""
    items = loaded(tmp_path, 9)
    judge = Scripted("Rating: 6", "Rating: 3", "Rating: 2", "no word", "Rating: 4", "Rating: 4", "Rating: 4",
                     "Rating: 4", "Rating: 1")  # fmt: skip
    task = MMHalBench()
    marks = task.marks(replies(items, *["It is blue."] * 9), judge)
    assert values(marks) == [6, 3, 2, 0, 4, 4, 4, 4, 1]
    found = task.summary(items, marks)
    assert found.values["rating"] == pytest.approx(28 / 9)
    assert found.values["hallucination_rate"] == pytest.approx(3 / 9)
    assert found.values["rating/attribute"] == 3.5  # rows 0 and 8
    assert (found.headline, found.unit, found.unscored) == ("rating", "points", 0)
    for part in ("Dog, Bowl", "What colour is bowl 1?", "Blue.", "It is blue."):
        assert part in judge.prompts[1]


def test_nothing_is_scored_without_a_judge(tmp_path: Path) -> None:
    """Bug: no judge means a rating of 0 and a hallucination in every row."""
    items = loaded(tmp_path, 2)
    task = MMHalBench()
    found = task.summary(items, task.marks(replies(items, "Blue.", "")))
    assert (found.values["rating"], found.values["hallucination_rate"], found.unscored) == (None, None, 2)
    half = task.marks(replies(items, "Blue.", "Red."), Scripted(None, "Rating: 5"))
    assert values(half) == [None, 5]
    assert task.summary(items, half).values["rating"] == 5


def test_an_empty_reply_is_rated_0_unasked(tmp_path: Path) -> None:
    """Bug: a missing image leaves the mean, or the judge finds no hallucination in nothing."""
    items = loaded(tmp_path, 2)
    judge = Scripted("Rating: 5")
    assert values(MMHalBench().marks(replies(items, " ", "Red."), judge)) == [0, 5]
    assert len(judge.prompts) == 1


def test_forms(tmp_path: Path) -> None:
    """Bug: images are looked for under another name than test_data.zip gives them."""
    items = loaded(tmp_path, 2)
    assert items[0].images == ("images/0_o.jpg",)
    assert colour_of(items[0]) == RED
    as_json(tmp_path / "b/MMHal-Bench/response_template.json", [row(0)])
    assert MMHalBench().load(tmp_path / "b")[0].images == ("https://example.org/7/0_o.jpg",)
    parquet(tmp_path / "c/MMHal-Bench/test-0.parquet", [row(0, image=record()), row(1, question_type=None)])
    table = MMHalBench().load(tmp_path / "c")
    assert colour_of(table[0]) == RED
    assert [one.columns["question_type"] for one in table] == ["attribute", "adversarial"]
    with pytest.raises(MissingData, match=r"test_data\.zip unpacked: MMHal-Bench/response_template\.json"):
        MMHalBench().load(tmp_path / "d")
    assert isinstance(MMHalBench(), Task)
