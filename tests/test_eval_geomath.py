"""GeoMath: Reason-RFT's rule, both forms of its rows."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from eval_files_maths import geomath_files, picture, replies, sharegpt_row, write_json, write_parquet
from reflectvlm.data.fetch import BadImage
from reflectvlm.data.images import load_image
from reflectvlm.eval.tasks.geomath import GeoMath, _decided
from reflectvlm.eval.types import Item, Mark, MissingData, Reply, Task
from reflectvlm.rewards.maths import Equal


def item(gold: str, raw: str | None = None) -> Item:
    return Item(id="1", question="?", answer=gold, lookback_answer=raw)


FACTS = [
    # gold, reply, and what it is worth
    ("12", "<think>x</think><answer> 12 </answer>", 1.0),
    ("12", "<answer>12.0</answer>", 1.0),  # math-verify
    ("0.5", r"<answer>\frac{1}{2}</answer>", 1.0),
    ("12", "<answer>13</answer>", 0.0),
    ("12", "<answer>13</answer> no: <answer>12</answer>", 0.0),  # the first tag counts
    ("B", "<answer>B</answer>", 1.0),
    ("B", "<answer>b</answer>", 0.0),
    ("12", "12", 1.0),  # the whole reply is the answer
    ("12", r"So it is \boxed{12}", 1.0),  # math-verify finds it in the reply
    ("12", r"<answer>so \boxed{12}", 1.0),  # the tag is not closed: the whole reply is read
    ("B", "It is B", 0.0),
    ("12", "", 0.0),
    ("12", "<answer></answer>", 0.0),
]


def test_worked_examples() -> None:
    """Bug: another tag, another order of the comparison, or a reply without a tag is wrong at once."""
    marks = GeoMath().marks(replies([item(gold) for gold, _, _ in FACTS], *(text for _, text, _ in FACTS)))
    assert [mark.value for mark in marks] == [value for _, _, value in FACTS]
    assert marks[0].answer == "12"


def test_the_comparison_is_asked_with_exchanged_arguments() -> None:
    """Bug: gold first, where an interval is right for an inequality: (1,2) for 1<x<2, not the reverse."""
    asked = _decided(Reply(item=item("(1,2)"), text="<answer>1<x<2</answer>"))
    assert asked == Equal("exchanged_equal", "(1,2)", "1<x<2")
    texts = [r"<answer>$1<x<2$</answer>", r"<answer>$(1,2)$</answer>"]
    marks = GeoMath().marks(replies([item("$(1,2)$"), item("$1<x<2$")], *texts))
    assert [mark.value for mark in marks] == [1.0, 0.0]


def test_a_gold_answer_with_space_around_it() -> None:
    """Bug: a tag's text is stripped and the gold answer is not, unless there is no tag."""
    assert _decided(Reply(item=item("B", " B"), text="<answer>B</answer>")) == Equal(
        "exchanged_equal", " B", "B"
    )
    assert _decided(Reply(item=item("B", " B"), text="B ")) is True


def test_figures_of_choices_and_others() -> None:
    """Bug: the two kinds are not told apart."""
    marks = [Mark(value=value) for value in (1.0, 0.0, 1.0)]
    values = GeoMath().summary([item("A"), item("D"), item("AB")], marks).values
    assert values == {
        "accuracy": pytest.approx(2 / 3),
        "accuracy/kind/choice": 0.5,
        "accuracy/kind/non_choice": 1.0,
    }


def test_the_official_files(tmp_path: Path) -> None:
    """Bug: rows of one id are taken for each other, or images beside the rows are not found."""
    geomath_files(tmp_path / "geomath")
    one, two, three = rows = GeoMath().load(tmp_path)
    assert [row.id for row in rows] == ["g1", "g2", "g2#3"]
    assert (one.question, one.answer, two.answer) == ("Find x.", "12", "B")
    assert load_image(one.images[0], one.root).size == (4, 3)
    with pytest.raises(BadImage, match=r"geo/3\.png"):
        load_image(three.images[0], three.root)
    marks = GeoMath().marks(replies(rows, "12", "B", ""))
    assert GeoMath().summary(rows, marks).values["accuracy"] == pytest.approx(2 / 3)


def test_look_backs_files(tmp_path: Path) -> None:
    """Bug: Look-Back's rows are not found where the official ones are missing, or the other way round."""
    write_json(tmp_path / "GeoMath/GeoMath-data.json", [sharegpt_row("a", "7")])
    picture(tmp_path / "GeoMath/images/7.png")
    for task in (GeoMath(), GeoMath(asked="lookback")):
        (one,) = task.load(tmp_path)
        assert (one.question, one.answer) == ("<image>How many in a?", "7")
        assert load_image(one.images[0], one.root).size == (4, 3)
    geomath_files(tmp_path / "geomath")
    assert len(GeoMath().load(tmp_path)) == 3
    assert len(GeoMath(asked="lookback").load(tmp_path)) == 1


def test_the_hubs_table(tmp_path: Path) -> None:
    """Bug: a table converted by the hub is not read."""
    write_parquet(
        tmp_path / "geomath/test.parquet", [{"id": "1", "problem": "?", "solution": "3", "image": "a.png"}]
    )
    (one,) = GeoMath().load(tmp_path)
    assert (one.answer, one.images) == ("3", ("a.png",))


def test_missing_data_says_what_to_fetch(tmp_path: Path) -> None:
    """Bug: a user without the data reads a traceback, or is sent for the wrong files."""
    with pytest.raises(MissingData, match=r"Look-Back-eval(.*\n)*.*Structure-Perception-id-test-820\.json"):
        GeoMath().load(tmp_path)
    with pytest.raises(MissingData, match="Look-Back-eval") as caught:
        GeoMath(asked="lookback").load(tmp_path)
    assert "Reason-RFT" not in str(caught.value)
    task: Task = GeoMath()
    assert task.name == "geomath"


def test_hostile_replies_are_marked_in_time() -> None:
    """Bug: an unclosed tag, repeated, is quadratic; brackets of 100 kB reach math-verify."""
    texts = [
        "<answer>" * 12_000,
        "(" * 100_000,
        "9**9**9**9",
        r"\frac{" * 20_000,
        "<answer>" + "9" * 90_000 + "</answer>",
    ]
    rows = [item("12")] * (len(texts) + 2_000)
    texts += [f"<answer>{n}</answer>" for n in range(2_000)]
    started = time.monotonic()
    marks = GeoMath().marks(replies(rows, *texts))
    assert time.monotonic() - started < 120
    assert [mark.value for mark in marks[:5]] == [0.0] * 5
    assert sum(mark.value == 1.0 for mark in marks) == 1
