"""MathVerse: extraction and judgement by a language model, quick matching, versions."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from eval_files_maths import MATHVERSE, Scripted, mathverse_files, mathverse_hub, replies
from reflectvlm.data.fetch import BadImage
from reflectvlm.data.images import load_image
from reflectvlm.eval.tasks.mathverse import MathVerse
from reflectvlm.eval.types import Item, Mark, MissingData, Task


def items() -> list[Item]:
    return [MathVerse()._item(row, Path()) for row in MATHVERSE]


def test_a_language_model_extracts_and_another_call_judges() -> None:
    """Bug: the words around an extraction or a judgement make it another one, or rows are mixed up."""
    ask = Scripted("Extracted Answer: B", "60°", " 14 ", "Judgement: 1", "0", "1\n")
    marks = MathVerse().marks(replies(items(), "So B", "So 60", "It is 14"), ask)
    assert [(mark.value, mark.answer) for mark in marks] == [(1.0, "B"), (0.0, "60°"), (1.0, "14")]
    assert "So B" in ask.asked[0]
    assert "for eval 1" in ask.asked[3]  # judged with the question that the data set has for it
    assert "60°" in ask.asked[4]


def test_a_judge_that_says_neither_is_asked_once_and_not_believed() -> None:
    """Bug: a greedy model is asked the same again, or for ever; or "yes" counts as 0."""
    ask = Scripted("B", "A", "14", "Judgement: no", "1", "0")
    marks = MathVerse().marks(replies(items(), "x", "y", "z"), ask)
    assert [mark.value for mark in marks] == [None, 1.0, 0.0]
    assert marks[0].note == "the language model judged 'no', not 0 or 1"
    assert ask.told == []
    assert len(ask.asked) == 6  # 3 extractions, 3 judgements


def test_a_language_model_that_fails_scores_nothing() -> None:
    """Bug: a failed request is a wrong answer."""
    ask = Scripted("B", None, "14", "1", None)
    marks = MathVerse().marks(replies(items(), "x", "y", "z"), ask)
    assert [mark.value for mark in marks] == [1.0, None, None]
    assert marks[1].note == "the language model extracted nothing"


def test_empty_replies_are_wrong_and_cost_no_call() -> None:
    """Bug: an item whose image is missing drops out of the denominator."""
    ask = Scripted("B", "1")
    marks = MathVerse().marks(replies(items(), "B", " ", ""), ask)
    assert [mark.value for mark in marks] == [1.0, 0.0, 0.0]
    quick = MathVerse(quick_match=True).marks(replies(items(), "", "", ""))
    assert [mark.value for mark in quick] == [0.0, 0.0, 0.0]
    assert MathVerse().summary(items(), marks).values["accuracy"] == pytest.approx(1 / 3)


def test_quick_match_compares_texts() -> None:
    """Bug: quick matching forgives what the official one does not."""
    task = MathVerse(quick_match=True)
    ask = Scripted("B", "a", "14.0")
    assert [mark.value for mark in task.marks(replies(items(), "x", "y", "z"), ask)] == [1.0, 0.0, 0.0]
    by_rule = task.marks(replies(items(), r"\boxed{C} or \boxed{B}", "<answer>A</answer>", " 14\n"))
    assert [(mark.value, mark.answer) for mark in by_rule] == [(1.0, "B"), (1.0, "A"), (1.0, "14")]
    assert task.marks(replies(items()[:1], "It is B"))[0].value == 0.0
    assert task.marks(replies(items()[:1], "x"), Scripted(None))[0].value is None


def test_without_a_language_model_nothing_is_scored() -> None:
    """Bug: one empty reply among those that nobody judged is all that is scored, and the accuracy is 0."""
    marks = MathVerse().marks(replies(items(), r"\boxed{B}", "", "x"))
    assert [mark.value for mark in marks] == [None, None, None]
    summary = MathVerse().summary(items(), marks)
    assert (summary.unscored, summary.values["accuracy"]) == (3, None)


def test_figures_by_version_and_subject_without_text_only(tmp_path: Path) -> None:
    """Bug: Text Only is counted in the overall figure."""
    mathverse_files(tmp_path / "mathverse")
    task = MathVerse(text_only=True)
    rows = task.load(tmp_path)
    assert [row.id for row in rows] == ["1", "2", "3", "text-only-1"]
    assert rows[3].images == ()
    summary = task.summary(rows, [Mark(value=value) for value in (1.0, 0.0, 1.0, 0.0)])
    assert summary.headline == "accuracy"
    assert summary.values == {
        "accuracy": pytest.approx(2 / 3),
        "accuracy/version/Text Dominant": 1.0,
        "accuracy/version/Vision Only": 0.5,
        "accuracy/subject/Plane Geometry": 0.5,
        "accuracy/subject/Solid Geometry": 1.0,
        "accuracy/subfield/Plane Geometry/Angle": 0.5,
        "accuracy/subfield/Solid Geometry/Length": 1.0,
        "accuracy/version/Text Only": 0.0,
    }


def test_the_files_and_what_is_asked(tmp_path: Path) -> None:
    """Bug: the wrong query, the options' texts lost, or an image looked for beside its folder."""
    mathverse_files(tmp_path / "mathverse")
    one, two, three = MathVerse().load(tmp_path)
    assert (one.question, one.answer, one.choices) == ("cot 1", "B", ("40°", "60°"))
    assert (three.question, three.answer, three.choices) == ("cot 3", "14", ())
    assert [row.question for row in MathVerse(query="query_wo").load(tmp_path)] == ["wo 1", "wo 2", "wo 3"]
    assert [row.question for row in MathVerse(asked="lookback").load(tmp_path)] == ["cot 1", "cot 2", "cot 3"]
    assert load_image(one.images[0], one.root).size == (4, 3)
    with pytest.raises(BadImage, match="image_2"):
        load_image(two.images[0], two.root)


def test_the_hubs_tables(tmp_path: Path) -> None:
    """Bug: `testmini` also reads the table of Text Only."""
    mathverse_hub(tmp_path / "mathverse")
    assert [row.id for row in MathVerse().load(tmp_path)] == ["1", "2", "3"]
    rows = MathVerse(text_only=True).load(tmp_path)
    assert [row.columns["version"] for row in rows][-1] == "Text Only"
    assert load_image(rows[0].images[0], rows[0].root).size == (4, 3)


def test_missing_data_says_what_to_fetch(tmp_path: Path) -> None:
    """Bug: a user without the data, or without the 788 rows of text, reads a traceback."""
    with pytest.raises(MissingData, match=r"MathVerse is not in .*(\n.*)*mathverse/testmini\.json"):
        MathVerse().load(tmp_path)
    mathverse_files(tmp_path / "mathverse")
    (tmp_path / "mathverse/testmini_text_only.json").unlink()
    with pytest.raises(MissingData, match="testmini_text_only"):
        MathVerse(text_only=True).load(tmp_path)


def test_look_back_asks_one_way_only() -> None:
    """Bug: a figure is called Look-Back's and comes from other questions."""
    with pytest.raises(ValueError, match=r"asked='lookback'.*leave both out"):
        MathVerse(asked="lookback", query="query_wo")
    with pytest.raises(ValueError, match="text_only=True"):
        MathVerse(asked="lookback", text_only=True)
    task: Task = MathVerse()
    assert task.name == "mathverse"


def test_hostile_replies_take_no_time() -> None:
    """Bug: the search for a box or a tag is quadratic in a reply of 100 kB."""
    texts = [r"\boxed{" * 14_000, "<answer>" * 12_000, "(" * 100_000]
    started = time.monotonic()
    MathVerse(quick_match=True).marks(replies(items(), *texts))
    assert time.monotonic() - started < 30
