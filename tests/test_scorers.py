"""The scorers on whole replies: Look-Back's published rule with its oddities, ours without them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from reflectvlm.eval import scorers
from reflectvlm.eval.scorers import (
    Lookback,
    Official,
    Scorer,
    Strict,
    final_answer,
    final_place,
    make_scorers,
    place_asked_for,
    plain,
)
from reflectvlm.eval.types import Ask, Item, Mark, Reply, Summary
from reflectvlm.recipe_check import RecipeError
from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.rewards.hopeless import hopeless


def reply(text: str, gold: str, lookback: str | None = None) -> Reply:
    return Reply(item=Item(id="1", question="?", answer=gold, lookback_answer=lookback), text=text)


def value(scorer: Scorer, text: str, gold: str) -> float | None:
    (mark,) = scorer(None, [reply(text, gold)])
    return mark.value


# (reply, gold, by Look-Back's rule, by ours)
ODDITIES = [
    ("I give up.", "E", 1.0, 0.0),  # no box is the text "None", upper-cased NONE, which has an E,
    ("I give up.", "N", 1.0, 0.0),  # an N
    ("I give up.", "O", 1.0, 0.0),  # and an O
    ("I give up.", "A", 0.0, 0.0),
    ("I give up.", "4", 0.0, 0.0),
    (r"\boxed{None of the above}", "A", 1.0, 0.0),  # ABOVE has an A
    (r"\boxed{ABCD}", "C", 1.0, 0.0),
    (r"\boxed{c}", "C", 1.0, 1.0),
    (r"\boxed{Yes.}", "yes", 0.0, 1.0),
    (r"\boxed{four}", "4", 0.0, 0.0),
    (r"\boxed{4 cars}", "4", 1.0, 0.0),
    (r"\boxed{4}", "4", 1.0, 1.0),
    (r"\boxed{3} no, \boxed{4}", "4", 1.0, 1.0),  # the last box counts
    (r"\boxed{4} no, \boxed{3}", "4", 0.0, 0.0),
    (r"\boxed{4} and \boxed{", "4", 0.0, 1.0),  # its last box does not close; ours reads the whole one
    (r"\boxed{\frac{1}{2}}", "0.5", 1.0, 1.0),
]


@pytest.mark.parametrize(("text", "gold", "lookback", "strict"), ODDITIES)
def test_the_published_rule_and_ours(text: str, gold: str, lookback: float, strict: float) -> None:
    """Bug: an oddity of the published scorer repaired, so that its figures cannot be had again; or one of
    them in ours, so that a model that gives up is right on 9 % of MATH-Vision."""
    assert value(Lookback(), text, gold) == lookback
    assert value(Strict(), text, gold) == strict


def test_lookback_has_a_gold_answer_of_its_own() -> None:
    """Bug: the strict gold answer graded where Look-Back's loader makes another one."""
    (mark,) = Lookback()(None, [reply(r"\boxed{B}", "12", lookback="B")])
    assert mark == Mark(value=1.0, answer="B")
    assert Strict()(None, [reply(r"\boxed{B}", "12", lookback="B")])[0].value == 0.0


def test_no_gold_answer_is_not_scored() -> None:
    """Bug: items without a gold answer counted as wrong."""
    for scorer in (Lookback(), Strict()):
        (mark,) = scorer(None, [reply(r"\boxed{3}", " ")])
        assert mark == Mark(value=None, note="no gold answer")
    assert plain([Mark(value=None)]) == Summary(headline="accuracy", values={"accuracy": None}, unscored=1)
    assert plain([Mark(value=None), Mark(value=1.0), Mark(value=0.0)]).values == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("text", "place", "answer"),
    [
        (r"<CONCLUSION>7</CONCLUSION> \boxed{8}", "CONCLUSION", "7"),
        (r"<CONCLUSION>so \boxed{7}</CONCLUSION>", "CONCLUSION", "7"),
        (r"<CONCLUSION>7 \boxed{8}", "boxed", "8"),
        (r"<answer>7</answer>", "answer", "7"),
        (r"\boxed{8} <answer>7</answer>", "answer", "7"),
        (r"<answer>7</answer> \boxed{8}", "boxed", "8"),
        ("7", "boxed", None),
    ],
)
def test_the_final_place(text: str, place: str, answer: str | None) -> None:
    """Bug: an answer read where the reply has moved on, or guessed where there is neither box nor tag."""
    assert final_place(text) == place
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("instruction", "place"),
    [
        (r"Put it in \boxed{}.", "boxed"),
        ("Write <REASONING>, answer in <CONCLUSION>.", "CONCLUSION"),
        (r"<answer> \boxed{} </answer>", "auto"),
        ("", "auto"),
    ],
)
def test_where_an_instruction_puts_the_answer(instruction: str, place: str) -> None:
    """Bug: a model graded elsewhere than its training graded it."""
    assert place_asked_for(instruction) == place


@pytest.mark.parametrize("answer_from", ["boxed", "CONCLUSION", "<final>"])
def test_strict_is_what_training_calls_accuracy(answer_from: str) -> None:
    """Bug: a figure of training that `eval` does not find again on the same replies."""
    golds = ("4", "C", "yes", "E", r"2\sqrt{3}")
    texts = [text for text, *_ in ODDITIES] + [r"\boxed{\sqrt{12}}", "<CONCLUSION>yes</CONCLUSION>", ""]
    asked = [reply(text, gold) for text in texts for gold in golds]
    asked += [reply("<final>E</final>", "E"), reply("<final>E", "E")]
    accuracy = Accuracy(answer_from=answer_from.strip("<>"))
    expected = [float(accuracy.is_right(one.text, one.item.answer)) for one in asked]
    assert [mark.value for mark in Strict(answer_from=answer_from)(None, asked)] == expected
    assert 0 < sum(expected) < len(expected)


HOSTILE = ["9**9**9**9", "9^{9^{9^{9}}}", "99999999!", "2**99999999", "(" * 100_000, "{" * 900 + "}" * 900]


def test_hostile_replies_are_wrong_and_quick() -> None:
    """Bug: each of them costs its grader's whole time-out, and ten thousand rows a night."""
    asked = [reply(f"\\boxed{{{text}}}", gold) for text in HOSTILE for gold in ("4", r"2\sqrt{3}", "x+1")]
    Lookback()(None, [reply(r"\boxed{1}", "2")])  # starts the workers
    started = time.perf_counter()
    for scorer in (Lookback(), Strict()):
        assert {mark.value for mark in scorer(None, asked)} == {0.0}
    assert time.perf_counter() - started < 9  # a single time-out is 10


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("2^{2^{3}}", False), ("5^{10000}", False), ("10^{10}", False), ("1^{9^{9}}", False), ("12345!",
        False), ("(1,2]", False), (r"3\times10^{8}", False), ("2^{3^{4}}", False),
        ("2^{10^{-9}}", False), ("2**(10**(-9))", False), ("9^{-9^{9}}", True), ("9^{9^{+9}}", True),
        ("9^{9^{9}}", True), ("x^9^9^9", True), ("2^{9999999}", True), ("factorial(1000000)", True),
    ],
)  # fmt: skip
def test_what_is_out_of_the_question(answer: str, expected: bool) -> None:
    """Bug: an answer that a person means refused, or one that never ends handed to a grader."""
    assert hopeless(answer) == expected


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [("1000000", "1000000!", True), ("10^{6}", "1000000 !", True), ("1000000", "2000000!", False),
     ("x^2", "1000000!", False), ("1000000!", "1000000!", True), ("12", "12!", False)],
)  # fmt: skip
def test_a_mark_of_exclamation_is_no_factorial(gold: str, answer: str, right: bool) -> None:
    """Bug: "1000000!" is taken for a factorial that is never finished, and is wrong though it is right."""
    (mark,) = Strict()(None, [reply(f"\\boxed{{{answer}}}", gold)])
    assert mark.value == float(right)


def test_a_grader_that_is_killed_is_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a killed grader counted as a wrong answer, unlike in training; or one that hangs for ever."""
    monkeypatch.setattr("reflectvlm.rewards.answers.hopeless", lambda _: False)
    started = time.perf_counter()
    (mark,) = Lookback(timeout=1.5)(None, [reply(r"\boxed{9**9**9**9}", "x^2")])
    assert time.perf_counter() - started < 30
    assert mark.value is None
    assert mark.note.startswith("not graded: ")


class Judge:
    """A task whose rule asks."""

    name = "judged"

    def load(self, data_dir: Path) -> list[Item]:
        del data_dir
        return []

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:
        return [Mark(value=None if ask is None else float(ask(["?"]) == ["yes"])) for _ in replies]

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        del items, marks
        return Summary(headline="rate", values={"rate": 0.25})


def test_the_official_rule_is_the_task_s() -> None:
    """Bug: a rule that cannot ask gives 0, or the figure of another rule."""
    asked = [reply("x", "y")]
    assert Official()(Judge(), asked) == [Mark(value=None)]
    assert Official(ask=lambda _: ["yes"])(Judge(), asked) == [Mark(value=1.0)]
    assert Official().summary(Judge(), [], []).values == {"rate": 0.25}
    assert Strict().summary(Judge(), [], []).values == {"rate": 0.25}
    assert Lookback().summary(Judge(), [], [Mark(value=1.0)]).values == {"accuracy": 1.0}
    (mark,) = Official()(None, asked)
    assert mark.value is None
    assert "no task is named" in mark.note


def test_scorers_by_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a misspelt scorer as a missing column; a whole evaluation that stops because an extra is
    missing."""
    assert [scorer.name for scorer in make_scorers()] == ["official", "lookback", "strict"]
    assert [scorer.name for scorer in make_scorers(["strict"])] == ["strict"]
    with pytest.raises(RecipeError, match=r"No scorer is called 'offical', only .* Did you mean official\?"):
        make_scorers(["offical"])
    with pytest.raises(RecipeError, match="at most once"):
        make_scorers(["strict", "strict"])
    with pytest.raises(ValueError, match=r"timeout is 0. It must be a positive number"):
        Strict(timeout=0)
    with pytest.raises(ValueError, match=r"answer_from is 'conclusion'.*Did you mean CONCLUSION\?"):
        Strict(answer_from="conclusion")
    monkeypatch.setattr("reflectvlm.rewards.answers.find_spec", lambda _: None)
    with caplog.at_level(logging.WARNING, logger="reflectvlm"):
        assert [scorer.name for scorer in make_scorers()] == ["official", "strict"]
    assert "no column of the lookback scorer" in caplog.text
    with pytest.raises(ValueError, match="needs the optional package"):
        make_scorers(["lookback"])
    assert scorers.NAMES == ("official", "lookback", "strict")
