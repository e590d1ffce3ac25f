"""Qwen-Zero-40k's way: what enough judges call incorrect is rewritten, the rest is the policy's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from curating import QUESTIONS, Scripted, lines, rule
from reflectvlm.curate.distil import Distillation
from reflectvlm.curate.filters import standard
from reflectvlm.curate.judging import Judges
from reflectvlm.data.instructions import instruction
from reflectvlm.rewards.accuracy import Accuracy

WAY = Distillation(instruction=instruction("qwen_la").text)


def distilled(out: Path, judges: dict[str, Any], **given: Any) -> list[dict[str, Any]]:
    out.mkdir(exist_ok=True)
    settings = {"filters": standard("qwen_la"), "rows_at_once": 5, **given}
    WAY.run(
        QUESTIONS,
        rule(wrong=0.5),
        Judges(asked=judges),
        rule(seed=1),
        out=out,
        teacher_name="teacher",
        **settings,
    )
    return lines(out / "rows.jsonl")


def test_the_wrong_are_rewritten_and_the_rest_kept(tmp_path: Path) -> None:
    """Bug: a right answer is rewritten, a wrong one kept, or a question lost."""
    rows = distilled(tmp_path, {"a": rule(2), "b": rule(3), "c": rule(4)}, filters=())
    answers = {line["id"]: line["text"] for line in lines(tmp_path / "answers.jsonl")}
    right = Accuracy(answer_from="CONCLUSION")
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(QUESTIONS)
    for question in QUESTIONS:
        row = by_id[question.id]
        if right.is_right(answers[question.id], question.answer):
            assert (row["trace"], row["made_by"]) == (answers[question.id], "policy")
        else:
            assert row["made_by"] == "teacher"
            assert row["about"]["first_answer"] == answers[question.id]
        assert right.is_right(row["trace"], question.answer)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        report["rewritten"] == report["called_incorrect"] == sum(row["made_by"] == "teacher" for row in rows)
    )
    assert 0 < report["rewritten"] < len(QUESTIONS)


def test_one_vote_of_three_does_not_rewrite_but_people_hear_of_it(tmp_path: Path) -> None:
    """Bug: a single judge decides, or where judges differ goes unnoticed."""
    yes, no = Scripted("correct"), Scripted("incorrect")
    rows = distilled(tmp_path, {"a": yes, "b": no, "c": yes}, filters=())
    assert {row["made_by"] for row in rows} == {"policy"}
    review = lines(tmp_path / "to_review.jsonl")
    assert [row["review"] for row in review] == ["judges differ"] * len(rows)


def test_votes_are_about_the_text_that_they_stand_beside(tmp_path: Path) -> None:
    """Bug: a rewritten answer has the votes on the one that is gone, and people and training read that
    judges reject it; or what is the policy's own from end to end is not counted as kept."""
    rows = distilled(tmp_path, {"a": rule(2), "b": rule(3), "c": Scripted("correct")}, filters=())
    old, new = ([row for row in rows if row["made_by"] == name] for name in ("policy", "teacher"))
    assert old
    assert new
    for row in new:
        assert "votes" not in row
        assert row["about"]["first_votes"] == {"a": False, "b": False, "c": True}
        assert row["kept"] == 0
    for row in old:
        assert row["votes"]["a"] is True
        assert row["kept"] == len(row["trace"])  # the rule reflects on nothing of its own
    reviews = {row["id"]: row["review"] for row in lines(tmp_path / "to_review.jsonl")}
    assert {reviews[row["id"]] for row in new} == {"rewritten; of the first answer: judges differ"}


def test_an_answer_without_its_layout_is_rewritten_whatever_judges_say(tmp_path: Path) -> None:
    """Bug: a text that nobody can train on is a row because its result was right."""
    yes = Scripted("correct")
    way = Distillation()  # asks without the layout, so the answers are plain
    way.run(QUESTIONS, rule(), Judges(asked={"a": yes, "b": yes}), rule(seed=1), out=tmp_path, filters=())
    rows = lines(tmp_path / "rows.jsonl")
    assert {row["review"] for row in lines(tmp_path / "to_review.jsonl")} == {"rewritten"}
    assert all(row["trace"].startswith("<SUMMARY>") for row in rows)
    assert len(rows) == len(QUESTIONS)


def test_judges_that_can_never_decide_are_refused() -> None:
    """Bug: two votes wanted of one judge: nothing is ever rewritten."""
    with pytest.raises(ValueError, match="votes is 2, and there are 1 judges"):
        Judges(asked={"a": Scripted("correct")}, votes=2)
    with pytest.raises(ValueError, match="Nobody judges"):
        WAY.run(QUESTIONS, rule(), Judges(), rule(), out=Path())
