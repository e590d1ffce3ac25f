"""Questions that evaluation sets have are left out before anybody is asked about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from curating import QUESTIONS, Scripted, cold, lines, make, rule
from reflectvlm.curate import coldstart_command, distil_command
from reflectvlm.curate.beforehand import beforehand
from reflectvlm.curate.contamination import EvaluationIndex, Held
from reflectvlm.curate.distil import Distillation
from reflectvlm.curate.filters import NoOverlap, standard
from reflectvlm.curate.hashes import row_hashes
from reflectvlm.curate.judging import Judges
from reflectvlm.curate.stages import Stage
from reflectvlm.curate.types import Question, Request, Said, Trace

HELD = [
    Held(set="exam", id=f"e{one.id}", question=one.question, images=tuple(row_hashes(one.images, one.root)))
    for one in QUESTIONS[:3]
]
INDEX = EvaluationIndex(held=HELD, distance=None)
IN_IT = {one.id for one in QUESTIONS[:3]}


class Heard:
    """A teacher, and about which rows it was asked."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.rows = inner, set[str]()
        self.name = inner.name

    def __call__(self, requests: Sequence[Request], /) -> list[Said]:
        self.rows |= {one.row for one in requests}
        said: list[Said] = self.inner(requests)
        return said


def dropped(out: Path) -> dict[str, dict[str, Any]]:
    return {line["id"]: line for line in lines(out / "dropped.jsonl")}


def test_nobody_is_asked_about_a_question_of_an_evaluation_set(tmp_path: Path) -> None:
    """Bug: eight answers, a look and two votes are paid for a question that is thrown away at the end."""
    model, teacher, judge = Heard(rule(wrong=0.5)), Heard(rule(seed=1)), Heard(Scripted("correct"))
    one = cold("semantic_back")
    filters = standard(one.method, without=INDEX)
    judges = Judges(asked={"j": judge}, votes=1)
    rows = make(tmp_path, one, model=model, teacher=teacher, judges=judges, filters=filters)
    assert model.rows == {one.id for one in QUESTIONS} - IN_IT
    assert teacher.rows.isdisjoint(IN_IT)
    assert judge.rows.isdisjoint(IN_IT)
    assert rows
    told = dropped(tmp_path)
    assert {told[name]["stage"] for name in IN_IT} == {"overlap"}
    assert {told[name]["why"] for name in IN_IT} == {f"text and image of exam e{name}" for name in IN_IT}
    assert len(told) + len(rows) == len(QUESTIONS)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["questions"] == len(QUESTIONS)
    assert report["dropped"]["overlap"]["all"] == 3


def test_a_distillation_asks_nobody_either(tmp_path: Path) -> None:
    """Bug: as above, in the other way to make a set."""
    policy, teacher, judge = Heard(rule(wrong=0.5)), Heard(rule(seed=1)), Heard(Scripted("incorrect"))
    way = Distillation()
    filters = standard(way.method, without=INDEX)
    judges = Judges(asked={"j": judge}, votes=1)
    way.run(QUESTIONS, policy, judges, teacher, out=tmp_path, filters=filters)
    for one in (policy, teacher, judge):
        assert one.rows == {one.id for one in QUESTIONS} - IN_IT
    assert {name for name, line in dropped(tmp_path).items() if line["stage"] == "overlap"} == IN_IT


def test_a_question_is_looked_up_once(tmp_path: Path) -> None:
    """Bug: every start hashes all images again before it asks anybody; or a kill moves what was found to
    another question."""
    looked: list[str] = []

    class Slow:
        name = "slow"

        def __call__(self, _: Trace, /) -> str | None:
            return None

        def of_question(self, question: Question, /) -> str | None:
            looked.append(question.id)
            return "seen" if question.id in IN_IT else None

    def begun() -> Any:
        return beforehand(QUESTIONS, [Slow()], Stage(path=tmp_path / "questions.jsonl", rows_at_once=5))

    first = begun()
    assert [one.id for one in first.left_out] == [one.id for one in QUESTIONS[:3]]
    assert looked == [one.id for one in QUESTIONS]
    assert begun() == first
    assert len(looked) == len(QUESTIONS)
    whole = (tmp_path / "questions.jsonl").read_bytes()
    (tmp_path / "questions.jsonl").write_bytes(whole[: len(whole) // 2])
    done = whole[: len(whole) // 2].count(b"\n") // 5 * 5
    assert 0 < done < len(QUESTIONS)
    assert begun() == first
    assert looked[len(QUESTIONS) :] == [one.id for one in QUESTIONS[done:]]
    assert (tmp_path / "questions.jsonl").read_bytes() == whole


def test_without_evaluation_sets_there_is_no_such_stage(tmp_path: Path) -> None:
    """Bug: an empty file, and a line about it, for everybody else."""
    make(tmp_path, cold("semantic_back"))
    assert not (tmp_path / "questions.jsonl").exists()


def test_an_image_that_cannot_be_read_is_not_this_stages_matter() -> None:
    """Bug: a server that is down for a minute takes its questions out of the set for good."""
    gone = Question(id="1", question="How many?", answer="3", images=("gone.png",))
    overlap = NoOverlap(index=INDEX)
    assert overlap.of_question(gone) is None
    trace = Trace(question=gone, text="", method="qwen_la")
    assert str(overlap(trace)).startswith("an image cannot be read")


def test_what_an_answer_takes_from_an_evaluation_set_is_still_found() -> None:
    """Bug: with the question let pass, nobody looks at the answer, which quotes an evaluation question."""
    said = "one two three four five six seven eight nine ten"
    index = EvaluationIndex(held=[Held(set="exam", id="e", question=said)])
    question = Question(id="1", question="How many?", answer="3")
    overlap = NoOverlap(index=index)
    assert overlap.of_question(question) is None
    assert overlap(Trace(question=question, text=f"I know: {said}.", method="qwen_la")) == "text of exam e"


@pytest.mark.parametrize("command", ["coldstart", "distill"])
def test_a_source_that_is_an_evaluation_set_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Bug: no question is left, and the command ends in a sentence about shares, or in a traceback."""
    run = {"coldstart": coldstart_command.run, "distill": distil_command.run}[command]
    words = ["source=digits", "max_rows=3", "model=rule,wrong=0.5", "teacher=rule,seed=1"]
    words += ["method=semantic_back", "n=2"] if command == "coldstart" else ["judges=rule,seed=2"]
    assert run([*words, f"out={tmp_path / 'a'}"]) in (0, 1)
    answers = lines(tmp_path / "a" / "answers.jsonl")
    held = tmp_path / "exam.jsonl"
    rows = [
        {"id": one["id"], "question": q.question, "answer": "1"}
        for one, q in zip(answers, QUESTIONS, strict=False)
    ]
    held.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert run([*words, f"out={tmp_path / 'b'}", f"without={held}", "without.n=3"]) == 1
    told = capsys.readouterr()
    assert "of 3 questions 3 are left out for overlap, for example: text of exam.jsonl" in told.err
    assert "Give another source=, or leave the set out of without=." in told.err
    assert lines(tmp_path / "b" / "answers.jsonl") == []
    assert "calls to make" not in told.out


def test_an_evaluation_set_that_has_changed_is_another_one(tmp_path: Path) -> None:
    """Bug: questions stay out for a row that the evaluation set has no longer, or stay in for a new one."""
    held = tmp_path / "exam.jsonl"
    words = ["source=digits", "max_rows=3", "model=rule,wrong=0.5", "teacher=rule,seed=1", "n=2"]
    words += ["method=semantic_back", f"without={held}", f"out={tmp_path / 'a'}"]
    held.write_text('{"id": "1", "question": "Who?", "answer": "x"}\n')
    coldstart_command.run(words)
    held.write_text('{"id": "1", "question": "Where?", "answer": "x"}\n')
    with pytest.raises(ValueError, match=r"begun with other settings: evaluation_rows '.*' → '"):
        coldstart_command.run(words)


def test_an_image_alone_is_no_sure_evidence() -> None:
    """Bug: where an image counts and an image with text does not, a question is left out whose trace would be
    kept."""
    question = QUESTIONS[0]
    images = tuple(row_hashes(question.images, question.root))
    said = "one two three four five six seven eight nine ten"
    index = EvaluationIndex(held=[Held(set="exam", id="e", question=said, images=images)], distance=None)
    alone = NoOverlap(index=index, evidence=("image",))
    trace = Trace(question=question, text=said, method="qwen_la")
    assert alone(trace) is None
    assert alone.of_question(question) is None
    assert NoOverlap(index=index, evidence=("image", "text and image")).of_question(question) is not None
