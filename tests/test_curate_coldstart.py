"""Cold starts of pages of digits, whole, with teachers whose replies are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from curating import QUESTIONS, Scripted, cold, lines, make, rule
from reflectvlm.curate.judging import Judges
from reflectvlm.curate.splice import METHODS
from reflectvlm.curate.teachers.rule import RuleTeacher
from reflectvlm.curate.types import Question, Request, Said
from reflectvlm.data.sources import dataset
from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.tags import parse, qwen_la

ALL = {"corrected": 0.4, "confirmed": 0.6}


@pytest.mark.parametrize("method", METHODS)
def test_what_stands_before_the_look_is_the_models_own_letter_by_letter(tmp_path: Path, method: str) -> None:
    """Bug: a teacher's hand, or white space that was tidied, in what is said to be kept verbatim."""
    rows = make(tmp_path, cold(method, shares=ALL))
    assert len(rows) >= 8
    answers = {
        line["id"]: [one["text"] for one in line["answers"]] for line in lines(tmp_path / "answers.jsonl")
    }
    for row in rows:
        start = "" if method == "qwen_la" else "<think>"
        kept = row["trace"][len(start) :][: row["kept"]]
        assert row["trace"].startswith(f"{start}{kept}")
        assert kept
        assert any(kept in said for said in answers[row["id"]])
        after = row["trace"][len(start) + len(kept) :]
        assert after.startswith(("</think> <back>", "<REFLECTION>"))


@pytest.mark.parametrize("method", METHODS)
def test_every_row_ends_in_the_right_answer_and_in_its_look(tmp_path: Path, method: str) -> None:
    """Bug: `look` says corrected where the first reading was right; or a wrong answer gets into the set."""
    accuracy = Accuracy(answer_from="CONCLUSION" if method == "qwen_la" else "boxed")
    for row in make(tmp_path, cold(method, shares=ALL)):
        assert accuracy.is_right(row["trace"], row["answer"])
        first = row["about"]["first_answer"]
        assert (first == row["answer"]) == (row["look"] == "confirmed")


def test_qwen_la_has_exactly_one_reflection_between_reasoning_and_conclusion(tmp_path: Path) -> None:
    """Bug: a second reflection, or the old conclusion in front of the corrected one."""
    for row in make(tmp_path, cold("qwen_la", shares=ALL)):
        tags = [block.tag for block in parse(qwen_la(), row["trace"]).blocks]
        assert tags == ["SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION"]


def test_shares_are_reached(tmp_path: Path) -> None:
    """Bug: filters eat one kind of trace, and the set has other shares than were asked for."""
    rows = make(tmp_path, cold("semantic_back"), teacher=rule(seed=1, faulty=0.4))
    count = len(rows)
    looks = [row["look"] for row in rows]
    wanted = {"corrected": 0.3, "confirmed": 0.5, "unneeded": 0.2}
    assert all(abs(looks.count(look) - share * count) < 1 for look, share in wanted.items())
    assert all("<back>" not in row["trace"] for row in rows if row["look"] == "unneeded")


def test_every_question_is_a_row_or_has_a_reason(tmp_path: Path) -> None:
    """Bug: rows are lost between two stages, or are in the set and in the list of what was left out."""
    rows = make(tmp_path, cold("semantic_back"), teacher=rule(seed=1, faulty=0.5), model=rule(wrong=0.8))
    dropped = lines(tmp_path / "dropped.jsonl")
    assert sorted(line["id"] for line in [*rows, *dropped]) == sorted(one.id for one in QUESTIONS)
    assert all(line["why"] and line["stage"] for line in dropped)
    assert {"look", "plan"} <= {line["stage"] for line in dropped}


def test_the_rows_are_a_data_set(tmp_path: Path) -> None:
    """Bug: images that `dataset` cannot open, or a trace in another column than lookback_sft reads."""
    rows = make(tmp_path, cold("semantic_back"))
    data = dataset(tmp_path / "rows.jsonl")
    assert len(data) == len(rows) == data.report.total
    sample = data[0]
    assert sample.columns["trace"] == rows[0]["trace"]
    assert sample.images[0].size == (64, 64)


@pytest.mark.parametrize("method", METHODS)
def test_self_made_traces_are_all_the_models_own_words(tmp_path: Path, method: str) -> None:
    """Bug: the gold answer, or somebody else's words, in what no stronger model has written."""
    one = cold(method, self_made=True, n=6, shares=ALL, agree=0.3)
    rows = make(tmp_path, one, model=rule(wrong=0.5))
    assert len(rows) >= 5
    answers = {
        line["id"]: [said["text"] for said in line["answers"]] for line in lines(tmp_path / "answers.jsonl")
    }
    for row in rows:
        assert row["made_by"] == "itself"
        start = "" if method == "qwen_la" else "<think>"
        kept, after = row["trace"][len(start) :][: row["kept"]], row["trace"][len(start) + row["kept"] :]
        assert any(said.startswith(kept) for said in answers[row["id"]])
        assert after.startswith(("</think> <back>", "<REFLECTION>"))
        layout = one.choosing.method
        look = row["trace"].partition(": ")[2] if layout == "semantic_back" else None
        if look is not None:
            seen = look.partition("</back>")[0]
            assert any(said.startswith(seen) for said in answers[row["id"]])


def test_nobody_is_asked_for_a_self_made_look(tmp_path: Path) -> None:
    """Bug: self=true still calls a teacher."""
    plan = tmp_path / "plan.jsonl"
    one = cold("semantic_back", self_made=True, n=6, agree=0.3)
    make(tmp_path, one)
    planned = [line for line in lines(plan) if "look" in line]
    assert planned
    assert all(one.second_look.request(QUESTIONS[0], line) is None for line in planned)


def test_a_source_brings_its_own_answers(tmp_path: Path) -> None:
    """Bug: LLaVA-CoT's answers are asked for again, or are cut off by a pass rate that they do not have."""
    own = "<SUMMARY>s</SUMMARY><CAPTION>left 3</CAPTION><REASONING>r</REASONING><CONCLUSION>{}</CONCLUSION>"
    questions = [
        Question(id=str(place), question="What is it?", answer="7", columns={"solution": own.format(said)})
        for place, said in enumerate(("7", "6"))
    ]
    teacher = Scripted("<REFLECTION>The left digit is 7.</REFLECTION><CONCLUSION>7</CONCLUSION>")
    one = cold("qwen_la", column="solution", shares={"corrected": 0.5, "confirmed": 0.5})
    model = Scripted("never")
    rows = make(tmp_path, one, model=model, questions=questions, teacher=teacher, filters=())
    assert model.asked == []
    assert [(row["look"], row["about"]["rate"]) for row in rows] == [("confirmed", None), ("corrected", None)]
    assert rows[1]["trace"].endswith("</REFLECTION><CONCLUSION>7</CONCLUSION>")


@pytest.mark.parametrize("method", ["qwen_la", "semantic_back"])
def test_of_a_source_whose_answers_are_right_every_row_is_used(tmp_path: Path, method: str) -> None:
    """Bug: where no answer is wrong the usual share of corrected ones leaves one row of 100,000."""
    one = cold(method, column="trace")
    asked = cold(method, n=1).answer_requests
    said = [rule(wrong=0.0)(asked(question))[0].text for question in QUESTIONS]
    questions = [
        replace(q, columns={**q.columns, "trace": text}) for q, text in zip(QUESTIONS, said, strict=True)
    ]
    rows = make(tmp_path, one, questions=questions, teacher=rule(seed=1))
    assert len(rows) >= 0.9 * len(QUESTIONS)
    (note,) = json.loads((tmp_path / "report.json").read_text())["notes"]
    assert note.startswith(
        "The usual shares cannot be had: none is corrected, because no usable answer is wrong"
    )


def test_shares_that_leave_most_rows_out_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a model that is hardly ever wrong makes a set of a few rows, and nobody hears why."""
    make(tmp_path / "a", cold("semantic_back", shares=ALL), model=rule(wrong=0.05))
    assert "corrected is scarce: 3 of 24 usable questions can have it" in caplog.text
    caplog.clear()
    make(tmp_path / "b", cold("semantic_back", shares=ALL, limit=4), model=rule(wrong=0.5))
    assert "scarce" not in caplog.text


def test_a_confirmed_answer_keeps_its_own_end_as_well(tmp_path: Path) -> None:
    """Bug: a teacher that was to look again rewrites what needed no rewriting."""
    teacher = Scripted("<back>The left digit is 3.</back>")
    one = cold("semantic_back", shares={"confirmed": 1.0}, n=1)
    model = Scripted("Left 3, right 4. 3 + 4 = 7. \\boxed{7}")
    question = Question(id="a", question="Add them.", answer="7")
    rows = make(tmp_path, one, model=model, questions=[question], teacher=teacher, filters=())
    assert rows[0]["trace"] == (
        "<think>Left 3, right 4.</think> <back>The left digit is 3.</back> "
        "<think>3 + 4 = 7.</think> \\boxed{7}"
    )
    assert "Write that block and nothing else" in (teacher.asked[0].system or "")


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("<back>I see 3.", "reply out of layout: <back> is never closed"),
        ("Sure! <back>I see 3.</back>", "reply out of layout: text outside of the blocks at character 0"),
        (None, "no reply (http 5xx)"),
    ],
)
def test_replies_that_cannot_be_used_are_named(tmp_path: Path, reply: str | None, why: str) -> None:
    """Bug: a reply out of layout is spliced in, and the filters blame the model."""
    one = cold("semantic_back", shares={"confirmed": 1.0}, n=1)
    model = Scripted("Left 3, right 4. 3 + 4 = 7. \\boxed{7}")
    question = Question(id="a", question="Add them.", answer="7")
    assert make(tmp_path, one, model=model, questions=[question], teacher=Scripted(reply), filters=()) == []
    assert lines(tmp_path / "dropped.jsonl") == [{"id": "a", "stage": "look", "why": why}]
    (trace,) = lines(tmp_path / "traces.jsonl")
    assert trace["said"] == (reply or "http 5xx: 503")  # where people look for what it said


def test_a_thinking_teachers_thoughts_are_no_part_of_the_trace(tmp_path: Path) -> None:
    """Bug: every reply of a thinking model is out of layout."""
    one = cold("semantic_back", shares={"confirmed": 1.0}, n=1)
    model = Scripted("Left 3, right 4. 3 + 4 = 7. \\boxed{7}")
    question = Question(id="a", question="Add them.", answer="7")
    teacher = Scripted("<think>Hm, a block.</think>\n<back>The left digit is 3.</back>")
    (row,) = make(tmp_path, one, model=model, questions=[question], teacher=teacher, filters=())
    assert "Hm" not in row["trace"]


def test_judges_leave_out_and_disagree(tmp_path: Path) -> None:
    """Bug: votes have no effect, or nobody learns where judges differ."""
    one = cold("semantic_back", shares={"confirmed": 1.0})
    yes, no, silent = Scripted("correct"), Scripted("Incorrect."), Scripted("I cannot say")
    rows = make(tmp_path / "a", one, judges=Judges(asked={"a": yes, "b": no, "c": silent}))
    assert rows
    assert rows[0]["votes"] == {"a": True, "b": False, "c": None}
    assert len(lines(tmp_path / "a" / "to_review.jsonl")) == len(rows)
    assert make(tmp_path / "b", one, judges=Judges(asked={"a": no, "b": no, "c": yes})) == []
    assert {line["why"] for line in lines(tmp_path / "b" / "dropped.jsonl") if line["stage"] == "judges"} == {
        "2 of 3 say incorrect"
    }


def test_what_nobody_judged_is_for_people(tmp_path: Path) -> None:
    """Bug: no judge has a word for a trace, for a broken server or their rambling, and the row is kept
    as if they had agreed."""
    one = cold("semantic_back", shares={"confirmed": 1.0})
    judges = Judges(asked={"a": Scripted(None), "b": Scripted("I cannot say")})
    rows = make(tmp_path, one, judges=judges)
    assert rows
    assert [row["review"] for row in lines(tmp_path / "to_review.jsonl")] == ["no judge voted"] * len(rows)
    assert make(tmp_path / "without", one)
    assert lines(tmp_path / "without" / "to_review.jsonl") == []


@dataclass
class Silent:
    """A teacher whose server does not answer some of the requests."""

    teacher: RuleTeacher
    to: Callable[[Request], bool]

    def __call__(self, requests: Sequence[Request], /) -> list[Said]:
        said = self.teacher(requests)
        gone = Said(text=None, why="http 5xx: 503")
        return [gone if self.to(one) else given for one, given in zip(requests, said, strict=True)]


@pytest.mark.parametrize("who", ["model", "teacher", "judge"])
def test_what_a_server_did_not_say_is_asked_again_and_the_set_is_the_whole_one(
    tmp_path: Path, who: str
) -> None:
    """Bug: failures of a server are frozen into the set; or traces and votes that were made from the answers
    that came stay beside a plan that is another one."""
    one = cold("semantic_back")
    whole = {"model": rule(wrong=0.5), "teacher": rule(seed=1), "judge": rule(seed=2)}
    told: list[tuple[str, int]] = []

    def run(out: Path, asked: Mapping[str, Any]) -> None:
        judges = Judges(asked={"judge": asked["judge"]}, votes=1)
        given = {"teacher": asked["teacher"], "judges": judges}
        make(out, one, model=asked["model"], before=lambda who, all: told.append((who, len(all))), **given)

    run(tmp_path / "whole", whole)
    broken = Silent(whole[who], lambda request: request.row[-1] in "147" and request.number % 2 == 0)
    run(tmp_path / "out", {**whole, who: broken})
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["failed"]
    assert "The same words again ask for these" in report["notes"][-1]
    told.clear()
    run(tmp_path / "out", whole)
    assert told[0 if who == "model" else 1 if who == "teacher" else 2][1] > 0
    files = ["answers", "plan", "traces", "votes", "rows", "dropped", "to_review"]
    for name in files:
        found, wanted = (tmp_path / out / f"{name}.jsonl" for out in ("out", "whole"))
        assert found.read_bytes() == wanted.read_bytes(), name
    told.clear()
    run(tmp_path / "out", whole)
    assert told == [("model", 0), ("teacher", 0), ("judges", 0)]


OWN = "<SUMMARY>s</SUMMARY><CAPTION>left 3</CAPTION><REASONING>r</REASONING><CONCLUSION>{}</CONCLUSION>"
LOOKS = Scripted("<REFLECTION>The left digit is 7.</REFLECTION><CONCLUSION>7</CONCLUSION>")


def brought(*conclusions: str) -> list[Question]:
    """A source that brings its answers."""
    return [
        Question(id=str(place), question="What is it?", answer="7", columns={"own": OWN.format(said)})
        for place, said in enumerate(conclusions)
    ]


def test_a_look_that_no_question_can_have_costs_no_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: the answers of LLaVA-CoT are the gold answers, so that none can be corrected: one row is left of
    a hundred thousand, without a word."""
    one = cold("qwen_la", column="own")
    rows = make(tmp_path / "a", one, questions=brought(*"7777"), teacher=LOOKS, filters=())
    assert [row["look"] for row in rows] == ["confirmed"] * 4
    note = (
        "The usual shares cannot be had: none is corrected, because no usable answer is wrong. They are "
        "taken over the others: confirmed:1."
    )
    assert note in caplog.text
    assert note in (tmp_path / "a" / "report.md").read_text()
    given = cold("qwen_la", column="own", shares={"corrected": 0.5, "confirmed": 0.5})
    with pytest.raises(ValueError, match=r"want corrected, and none of 4 usable.* Give shares=confirmed:1"):
        make(tmp_path / "b", given, questions=brought(*"7777"), teacher=Scripted("never"), filters=())


def test_a_look_that_calls_without_a_reply_may_yet_bring_is_not_given_up(tmp_path: Path) -> None:
    """Bug: a server that was silent for a minute sends people to other shares; the same words would do."""
    model = Scripted("Left 3, right 4. 3 + 4 = 7. \\boxed{7}", None)
    questions = [Question(id=name, question="Add them.", answer="7") for name in "ab"]
    why = r"want corrected, .* 2 calls had no reply for reasons that may pass: try the same words first\.$"
    with pytest.raises(ValueError, match=why):
        make(
            tmp_path,
            cold("semantic_back", n=2, shares={"corrected": 0.5, "confirmed": 0.5}),
            model=model,
            questions=questions,
            teacher=Scripted("never"),
        )


def test_a_scarce_look_is_told_before_a_teacher_is_paid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: most of the questions are left out for the shares, and nobody hears which look is too rare."""
    heard: list[str] = []
    make(
        tmp_path / "a",
        cold("qwen_la", column="own"),
        questions=brought("6", *"777777777"),
        teacher=LOOKS,
        filters=(),
        before=lambda who, _: heard.append(caplog.text) if who == "teacher" else None,
    )
    # 1 of 10 is wrong: of 4 rows 1.2 + 2.8 are wanted, so 1 + 3; of 5 it would be 1.5 + 3.5, so 2 + 3
    assert "corrected is scarce: 1 of 10 usable questions can have it" in heard[0]
    assert "leave out 6 that could be rows" in heard[0]
    assert "shares=corrected:0.1,confirmed:0.9 would use them" in heard[0]
    caplog.clear()
    shares = {"corrected": 0.1, "confirmed": 0.9}
    one = cold("qwen_la", column="own", shares=shares)
    assert (
        len(make(tmp_path / "b", one, questions=brought("6", *"777777777"), teacher=LOOKS, filters=())) == 10
    )
    assert "scarce" not in caplog.text


@pytest.mark.parametrize(("chosen", "left"), [(False, 4), (True, 0)])
def test_rows_that_were_paid_for_are_not_lost_without_a_word(tmp_path: Path, chosen: bool, left: int) -> None:
    """Bug: a teacher fails at one look, and all rows of the other are thrown away in silence."""
    shares = {"shares": {"corrected": 0.3, "confirmed": 0.7}} if chosen else {}
    replies = {"6": "no reflection at all", "7": str(LOOKS.texts[0])}

    def teacher(requests: Sequence[Request]) -> list[Said]:
        return [Said(text=replies[one.row[0]]) for one in requests]

    questions = [
        replace(one, id=f"{said}{one.id}") for said, one in zip("667777", brought(*"667777"), strict=True)
    ]
    rows = make(
        tmp_path, cold("qwen_la", column="own", **shares), questions=questions, teacher=teacher, filters=()
    )
    assert len(rows) == left
    (note,) = json.loads((tmp_path / "report.json").read_text())["notes"]
    assert note.startswith("None of 4 finished rows is corrected")
    assert ("shares=confirmed:1 would have kept them" in note) == chosen
    surplus = [line for line in lines(tmp_path / "dropped.jsonl") if line["stage"] == "shares"]
    assert len(surplus) == 4 - left


def test_a_rewritten_trace_keeps_nothing(tmp_path: Path) -> None:
    """Bug: rewrite=rewrite claims to have kept the model's words."""
    rows = make(tmp_path, cold("solution_back", rewrite="rewrite", shares=ALL))
    assert rows
    assert {row["kept"] for row in rows} == {0}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"method": "semantic"}, "method is 'semantic'"),
        ({"n": 0}, "n is 0. It must be at least 1"),
        ({"n": 1, "self_made": True}, "n=2 or more"),
        ({"self_made": True, "rewrite": "rewrite"}, "Leave out rewrite=rewrite, or self"),
        ({"pass_rate": (0.5, 0.1)}, "pass_rate is 0.5:0.1"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"shares": {"confirmed": 0.5}}, "add up to 1"),
        ({"limit": 0}, "limit is 0"),
        ({"rewrite": "splices"}, "rewrite is 'splices'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], why: str) -> None:
    """Bug: a set is asked and paid for before its settings are looked at."""
    with pytest.raises(ValueError, match=why):
        cold(**{"method": "semantic_back", **settings})  # type: ignore[arg-type]
