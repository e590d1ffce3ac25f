"""What the tables of an evaluation say beside a figure: its interval, its unit, and what is left out."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reflectvlm.data.fetch import BadImage
from reflectvlm.eval.compare import comparison
from reflectvlm.eval.result import TaskResult, cluster_of, figures, mean_interval
from reflectvlm.eval.table import notes, table_of
from reflectvlm.eval.tasks.chair import CHAIR
from reflectvlm.eval.tasks.mmbench import MMBench
from reflectvlm.eval.tasks.mme import MME
from reflectvlm.eval.tasks.mmhal import MMHalBench
from reflectvlm.eval.tasks.pope import POPE
from reflectvlm.eval.types import Item, Mark, Reply, Summary

PLAIN = Summary(headline="accuracy", values={"accuracy": 0.5})


def result(
    values: Sequence[float | None],
    summary: Summary = PLAIN,
    *,
    samples: int = 1,
    images: Sequence[Any] = (),
    first: int = 0,
) -> TaskResult:
    """Marks of one scorer: all first replies, then all second ones."""
    count = len(values) // samples
    items = [
        Item(id=str(first + n), question="?", answer="a", images=(images[n],) if images else ())
        for n in range(count)
    ]
    return TaskResult(
        name="task",
        items=items,
        replies=[Reply(item=items[n % count], text="a", number=n // count) for n in range(len(values))],
        samples=samples,
        marks={"official": [Mark(value=value) for value in values]},
        summaries={"official": summary},
        missing={},
        absent=[],
    )


def cell(made: TaskResult, column: str) -> str:
    rows = [line.split("|")[1:-1] for line in table_of([made], "t").markdown.splitlines() if "|" in line]
    return dict(zip((name.strip() for name in rows[0]), (one.strip() for one in rows[-1]), strict=True))[
        column
    ]


# -- intervals ------------------------------------------------------------------------------------


def test_no_interval_beside_what_is_no_mean() -> None:
    """Bug: the interval of the accuracy beside an F1, or beside 1,800 points."""
    assert cell(result([1.0, 1.0]), "official 95 %") == "100.0 – 100.0"
    f1 = Summary(headline="f1", values={"f1": 0.5}, mean=False)
    assert cell(result([1.0, 1.0], f1), "official 95 %") == "–"


def test_a_rating_keeps_its_unit() -> None:
    """Bug: a rating from 0 to 6 with an interval, or a gain, of some hundreds."""
    rating = Summary(headline="rating", values={"rating": 4.0}, unit="points")
    made = result([4.0, 4.0], rating)
    assert cell(made, "official") == "4.00"
    assert cell(made, "official 95 %") == "4.00 – 4.00"
    row = comparison(result([3.0, 3.0], rating), made, "a", "b").markdown.splitlines()[-1]
    assert [one.strip() for one in row.split("|")[4:7]] == ["3.00", "4.00", "+1.00"]
    # Marks that a sum of points is made of are shares.
    points = Summary(headline="total", values={"total": 200.0}, unit="points", mean=False)
    row = comparison(result([0.0, 1.0], points), result([1.0, 1.0], points), "a", "b").markdown.splitlines()[
        -1
    ]
    assert [one.strip() for one in row.split("|")[4:7]] == ["50.00", "100.00", "+50.00"]


def test_tasks_say_whether_their_figure_is_a_mean() -> None:
    """Bug: a benchmark whose headline is a sum or a ratio, and which says that it is a mean."""
    assert not POPE().summary([], []).mean
    assert not MME().summary([], []).mean
    assert MME(asked="lookback").summary([], []).mean
    assert not CHAIR().summary([], []).mean
    assert MMHalBench().summary([], []).mean
    assert not MMBench().summary([], []).mean
    assert MMBench(headline="vanilla").summary([], []).mean


class Unreadable(dict[str, Any]):
    """A stored image whose table is broken."""

    def get(self, key: str, default: Any = None) -> Any:
        raise BadImage("unreadable image", f"{key} of row 1", "is broken", f"Fetch it again ({default})")


@dataclass(frozen=True)
class Same:
    """One image and another in a form of storage."""

    one: Any
    other: Any


def _url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _drawn(colour: str) -> Image.Image:
    return Image.new("RGB", (2, 2), colour)


@pytest.mark.parametrize(
    "stored",
    [
        Same("a.png", "b.png"),
        Same(Path("a.png"), "b.png"),
        Same(b"a", b"b"),
        Same({"bytes": b"a", "path": "image.png"}, {"bytes": b"b", "path": "image.png"}),
        Same({"bytes": None, "path": "a.png"}, {"bytes": None, "path": "b.png"}),
        Same(_url(b"a"), _url(b"b")),
        Same(_drawn("red"), _drawn("blue")),
    ],
    ids=["path", "Path", "bytes", "record", "record of a path", "base64", "PIL"],
)
def test_questions_about_one_image_are_one_observation(stored: Same) -> None:
    """Bug: rows of a hub's table that share an image drawn one by one, and an interval that is too narrow."""
    images = [stored.one, stored.one, stored.other]
    clusters = list(result([1.0, 1.0, 0.0], images=images).clusters.values())
    assert clusters[0] == clusters[1] != clusters[2]
    assert max(map(len, clusters)) < 100


def test_what_shares_no_image_is_apart() -> None:
    """Bug: all rows whose image is missing as one observation."""
    empty: Mapping[str, Any] = {"bytes": None, "path": None}
    for image in (empty, Unreadable(), b"", 3):
        found = [cluster_of(Item(id=id, question="?", answer="", images=(image,))) for id in "ab"]
        assert found == ["id a", "id b"]


def test_an_interval_over_images_in_tables() -> None:
    """Bug: four questions about each of two images as eight observations: of two, one draw in four has
    twice the same, so that the interval is 0 to 1."""
    found = mean_interval(result([1.0] * 4 + [0.0] * 4, images=[b"a"] * 4 + [b"b"] * 4), "official")
    assert found is not None
    assert (found.low, found.high) == (0.0, 1.0)


# -- what is left out -----------------------------------------------------------------------------


def test_items_that_are_partly_scored_are_counted() -> None:
    """Bug: pass@k over some of the items, and nothing that says of how many."""
    made = result([1.0, 1.0, 0.0, None], samples=2)
    found = figures(made, "official")
    assert (found["left_out@k"], found["pass@2"]) == (1, 1.0)
    assert any("leaves 1 of 2 items out of avg@k" in line for line in notes([made]))
    assert figures(result([None, None], samples=2), "official")["left_out@k"] == 1
    whole = result([1.0, 1.0, 0.0, 1.0], samples=2)
    assert figures(whole, "official")["left_out@k"] == 0
    assert notes([whole]) == []
    assert "left_out@k" not in figures(result([1.0, None]), "official")


def test_items_that_cannot_be_compared_are_counted() -> None:
    """Bug: a gain over a tenth of the items beside the figures of all."""
    # Items 0, 1, 2 and 1, 2, 3; 2 is not scored in the second: 1 alone is compared.
    first, second = result([1.0, 0.0, 1.0]), result([1.0, None, 1.0], first=1)
    row = [one.strip() for one in comparison(first, second, "a", "b").markdown.splitlines()[-1].split("|")]
    assert row[1:7] == ["official", "1", "3", "0.00", "100.00", "+100.00"]
    nothing = comparison(result([None]), result([1.0]), "a", "b").markdown.splitlines()[-1].split("|")
    assert [one.strip() for one in nothing[1:5]] == ["official", "0", "1", "–"]
