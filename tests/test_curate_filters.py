"""Filters of one trace: each rule, and what it must not object to."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflectvlm.curate.filters import (
    AnswerNotLeaked,
    AnswerRight,
    Duplicates,
    InLayout,
    Language,
    Lengths,
    NamesWhatIsSeen,
    layout_of,
)
from reflectvlm.curate.filters.mentions import begins_with, mentions
from reflectvlm.curate.filters.readings import readings
from reflectvlm.curate.filters.visible import copied_share
from reflectvlm.curate.types import Trace
from reflectvlm.rewards import answers
from traces import asked, back, qwen

few = settings(deadline=None, max_examples=60)


# -- layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trace", "why"),
    [
        (back(), None),
        (back(method="solution_back"), None),
        (back(look=" "), "<back> is empty"),
        (
            dataclasses.replace(back(), text="<think>a</think> \\boxed{7}"),
            "expected <back>, found no further block",
        ),
        (dataclasses.replace(back(), text="<think>a</think> \\boxed{7}", look="unneeded"), None),
        (dataclasses.replace(back(), look="unneeded"), "a second look where none is needed"),
        (qwen(), None),
        (qwen(reflections=("", "7 bars")), None),
        (qwen(reflections=()), "no second look"),
        (qwen(reflections=("",)), "no second look"),
        (qwen(reflections=("",), look="unneeded"), None),
        (qwen(look="unneeded"), "a second look where none is needed"),
        (qwen(conclusion=""), "<CONCLUSION> is empty"),
    ],
)
def test_layout(trace: Trace, why: str | None) -> None:
    """Bug: a trace without a look that is said to correct something; a look in one that is to show none."""
    found = InLayout()(trace)
    assert found == why


def test_layouts_of_methods() -> None:
    """Bug: a trace that needs no look is held against a layout with one."""
    assert [block.tag for block in layout_of("semantic_back").blocks] == ["think", "back", "think"]
    assert [block.tag for block in layout_of("solution_back", "unneeded").blocks] == ["think"]
    assert layout_of("qwen_la", "unneeded") == layout_of("qwen_la")


# -- answer ---------------------------------------------------------------------------------------


def test_the_answer_is_read_where_the_layout_has_it() -> None:
    """Bug: the box of a Qwen-LA trace, or the last number anywhere, in place of the conclusion."""
    rule = AnswerRight()
    assert rule(back()) is None
    assert rule(back(box="7.0")) is None
    assert rule(back(box="8")) == "it is '8', not '7'"
    assert rule(qwen()) is None
    assert rule(qwen(conclusion="8")) == "it is '8', not '7'"
    assert rule(dataclasses.replace(back(), text="7")) == "no answer"
    assert rule(back(question=asked(answer=" "))) == "the question has no gold answer"


def test_maths_is_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a process per answer makes 40,000 traces a day's work; decisions that go to the wrong rows. Rows
    1 and 4 need sympy, the others are settled by their texts."""
    calls: list[list[tuple[str, str]]] = []

    def settle(questions: Any, timeout: float) -> list[bool]:
        assert timeout == 10.0
        calls.append([(one.gold, one.answer) for one in questions])
        return [one.answer == "2\\sqrt{2}" for one in questions]

    monkeypatch.setattr("reflectvlm.curate.filters.answer.settle", settle)
    root = asked(answer="\\sqrt{8}")
    traces = [back(), back(question=root, box="3"), back(box="8"), back(question=root, box="\\sqrt{8}")]
    traces.append(back(question=root, box="2\\sqrt{2}"))
    assert AnswerRight().many(traces) == [
        None,
        "it is '3', not '\\\\sqrt{8}'",
        "it is '8', not '7'",
        None,
        None,
    ]
    assert calls == [[("\\sqrt{8}", "3"), ("\\sqrt{8}", "2\\sqrt{2}")]]
    assert isinstance(answers.graded("\\sqrt{8}", "3"), tuple)


def test_what_had_to_be_killed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a grader that never ends lets its row through."""
    from reflectvlm.rewards.isolation import RewardError

    def settle(questions: Any, _: float) -> list[RewardError]:
        return [RewardError("timeout", "took too long") for _ in questions]

    monkeypatch.setattr("reflectvlm.curate.filters.answer.settle", settle)
    assert AnswerRight()(back(question=asked(answer="x^2"), box="x")) == "could not be graded (took too long)"


def test_a_timeout_is_positive() -> None:
    with pytest.raises(ValueError, match=r"AnswerRight.timeout is 0.*positive"):
        AnswerRight(timeout=0)


# -- leak -----------------------------------------------------------------------------------------

LEAKS = [
    (back("The answer is 7. Let me see the bars."), "announces the gold answer at its start"),
    (back("We know that the correct answer is seven, so count."), "announces the gold answer at its start"),
    (back("Answer: **7**. Now the chart."), "announces"),
    (back("7 because there are many bars."), "begins with the gold answer"),
    (back("7!"), "begins with"),
    (back("Bars, 6.", "The answer should be 7, so I look again: 7 red bars."), "<back> announces"),
    (
        back("Bars, 6.", "Let me take one more careful and patient look because the answer must be 7: yes."),
        "<back>",
    ),
    (back("The reference answer says seven, I count 6."), "an answer that it was given"),
    (back(then="This matches the ground truth."), "an answer that it was given"),
    (back(then="This is what `gold` says, so 7."), "an answer that it was given"),
    (back(then="It goes on where so_far ended, so 7."), "an answer that it was given"),
    (back("I count \\boxed{7} bars"), "a box inside <think>"),
    (back("The correct option is (B).", question=asked(answer="B"), box="B"), "announces"),
    (back("The answer is $x+1$, as we show.", question=asked(answer="x+1"), box="x+1"), "announces"),
    (
        back("The answer is the red one.", question=asked(answer="the red one"), box="the red one"),
        "announces",
    ),
    (back("\u7b54\u6848\u662f7\u3002"), "announces"),
    (qwen(summary="Count the bars; in the end the answer is 7."), "<SUMMARY> announces"),
    (qwen(summary="Find the area, 12 cm.", question=asked(answer="12"), conclusion="12"), "<SUMMARY> has"),
    (qwen(caption="A chart with some bars whose colour is red; the answer is 7."), "<CAPTION> announces"),
    (qwen(reasoning="The answer is 7."), "<REASONING> announces"),
]
FAIR = [
    back("Upper left 7. The answer is 7."),  # a reading, then what follows from it
    back("7, 3 and 5 stand at the bars."),
    back("1. Look at the bars.", question=asked(answer="1"), box="1"),
    back("The answer is not 7 if 6 is right."),
    back("The answer is 6."),
    back("The answer is 17."),
    back("Since the left has 3 and the right 4, the answer is 7."),
    back("The result of 3 + 4 is 7."),
    back("The given answer choices are 6 and 7."),
    back("6 bars, or is the answer 7?", "The answer 7 is right: 7 red bars."),
    back("3 + 4 is 7, the answer is 7.", "The answer is 7? Check the red bars."),  # derived before the look
    back("6.", "There are 7 red bars, so the answer is 7."),
    back("6.", "7 red bars.", "The answer is 7."),  # after the look
    back("The bars 'red', \"gold\" and 'gold' are 7."),  # what a chart calls them
    back("6 and 5.", "Upper left 3, lower right 8, so the answer is 11.", question=asked(answer="11")),
    back("6 and 5.", "3 and 8.", "The answer is 11.", question=asked(answer="11")),
    back("The answer key of the map is at the left.", question=asked("Where is the answer key?", "7")),
    back("An option is a square.", question=asked(answer="A"), box="A"),
    back("The answer is A square.", question=asked(answer="A"), box="A"),
    qwen(summary="Compare 7 bars."),  # one character may be anything
    qwen(summary="Is it yes or no?", question=asked(answer="yes"), conclusion="yes"),
    qwen(summary="Find what is 12 long.", question=asked("What is 12 long?", "12"), conclusion="12"),
    qwen(caption="7 red bars.", reasoning="The answer is 7."),  # the caption has read it
]


@pytest.mark.parametrize(("trace", "why"), LEAKS)
def test_leaks_are_found(trace: Trace, why: str) -> None:
    """Bug: a teacher that was shown the answer starts from it, and the set teaches guessing."""
    found = AnswerNotLeaked()(trace)
    assert found is not None
    assert why in found


@pytest.mark.parametrize("trace", FAIR)
def test_derivations_are_no_leaks(trace: Trace) -> None:
    """Bug: a reading that happens to be the answer, a wrong value, a list's number or a repeated result is
    taken for a leak, and honest traces are lost."""
    assert AnswerNotLeaked()(trace) is None


@pytest.mark.parametrize(("words", "leaks"), [(5, True), (6, False)])
def test_the_opening_is_counted_in_words(words: int, leaks: bool) -> None:
    """Bug: off by one. "a a a a the" are 5 words before "answer"."""
    text = f"{'a ' * (words - 1)}the answer is 7."
    assert (AnswerNotLeaked()(back(text)) is not None) is leaks
    assert (AnswerNotLeaked(opening=words)(back(text)) is None) is True
    assert (AnswerNotLeaked(opening=words + 1)(back(text)) is None) is False


@few
@given(st.integers(-50, 5000), st.text("abc 0123456789,.-=", max_size=20))
def test_numbers_are_mentioned_as_values_of_their_own(value: int, around: str) -> None:
    """Bug: 7 found in 17, 7.5 or 7,000, or not found at the end of a sentence."""
    gold = str(value)
    assert mentions(gold, f"it says {value}.")
    assert mentions(gold, f"({value}), {around}")
    assert not mentions(gold, f"x1{abs(value)}7.5")
    assert begins_with(gold, f" **{value}**") == len(f" **{value}")


@pytest.mark.parametrize(
    ("gold", "text", "found"),
    [
        ("7", "1,007 and 7.5 and 17", False),
        ("7", "seven", True),
        ("0.5", "a share of 1/2", True),
        ("0.5", "\\frac{1}{2}", True),
        ("-7", "7", False),
        ("-7", "x = -7", True),
        ("B", "(B)", True),
        ("B", "Bar b AB", False),
        ("the red one", "It is The  Red one!", True),
        ("the red one", "the red ones", False),
        ("\\sqrt{2}", "so $\\sqrt{2}$ it is", True),
        ("\\sqrt{2}", "2\\sqrt{2}", True),  # the edge is no letter: a limit
    ],
)
def test_mentions(gold: str, text: str, found: bool) -> None:
    """Bug: values compared as texts, or texts inside of words."""
    assert mentions(gold, text) is found


def test_a_long_text_takes_no_long_time() -> None:
    """Bug: a pattern with nested repetition needs quadratic time; each of these would then take minutes."""
    for text in (
        "answer " * 5_000,
        "the " * 10_000,
        " " * 25_000,
        "answer is " * 5_000,
        "answer is 7 " * 5_000,
        "1," * 12_000,
        "'" * 12_000,
    ):
        for one in (AnswerNotLeaked(), NamesWhatIsSeen(), Language()):
            one(back(f"x{text}", f"7 red bars {text}"))


# -- visible --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("The red bar is 12 units", {"colour", "thing", "number"}),
        ("it stands at the upper left", {"place"}),
        ("seven of them", {"number"}),
        ("so AB is parallel", {"point", "place"}),
        ("AB = 7", {"point", "number"}),
        ("it says \u201cExit\u201d", {"label"}),
        ("3 + 4 = 7 holds", set()),
        ("3 \\times 4", {"number"}),  # a limit: signs spelled as commands are not seen
        ("I think that A statement is one of those that don't follow", set()),
        ("EVERYTHING IS FINE", {"point"}),  # "IS": capitals of up to four letters are names of points
        ("this is right, and what is left is done", set()),
        ("it is left of the bars, at the right", {"place", "thing"}),
        ("the bars, the boxes and the rightmost bus", {"thing", "place"}),
    ],
)
def test_readings(text: str, kinds: set[str]) -> None:
    """Bug: arithmetic or a pronoun passes for something that was seen."""
    assert {one.kind for one in readings(text)} == kinds


def test_copied_share() -> None:
    """Bug: shares of letters or of a set. Runs of "the bar is red": "the bar is" and "bar is red", the
    first is in the other text. Of two words the one run of two counts."""
    assert copied_share("the bar is red", "I see that the bar is green") == 0.5
    assert copied_share("is red", "it is red") == 1.0
    assert copied_share("?", "is") == 0.0


@pytest.mark.parametrize(
    ("trace", "why"),
    [
        (back(look="Let me think about it again, carefully."), "<back> names nothing that can be seen"),
        (back(look="3 + 4 = 7, so this is right."), "<back> names nothing that can be seen"),
        (
            back("The red bar at the left has 7 units.", "The red bar at the left has 7 units."),
            "100% of its runs",
        ),
        (
            back(
                "The red bar at the left has 7 units.", "Looking again: the red bar at the left has 7 units."
            ),
            None,
        ),
        (back(), None),
        (back("Upper left 7.", "Upper left 7, I am sure about it.", method="solution_back"), None),
        (qwen(reflections=("", "Yes, that is so.")), "<REFLECTION> names nothing"),
        (qwen(reflections=("",), look="unneeded"), None),
    ],
)
def test_visible(trace: Trace, why: str | None) -> None:
    """Bug: a look that only says the reasoning once more is kept, or one that reads the same again is not."""
    found = NamesWhatIsSeen()(trace)
    assert found == why if why is None else why in str(found)


def test_a_correction_reads_something_new() -> None:
    """Bug: a trace that is counted as corrected and corrects nothing. "upper left 7" is new after "lower
    left 7"."""
    rule = NamesWhatIsSeen()
    same = dataclasses.replace(back("Lower left 7.", "Looking at it again: lower left 7."), look="corrected")
    new = dataclasses.replace(back("Lower left 7.", "Looking at it again: upper left 7."), look="corrected")
    assert rule(new) is None
    assert "reads nothing that was not read before" in str(rule(same))
    assert rule(dataclasses.replace(same, look="confirmed")) is None


def test_more_readings_may_be_asked_for() -> None:
    """Bug: a word that is said twice counts twice; further words are not taken."""
    assert (
        NamesWhatIsSeen(readings=2)(back(look="red and Red"))
        == "<back> names only 1 of 2 things that can be seen"
    )
    assert NamesWhatIsSeen(readings=2)(back(look="red bar")) is None
    assert NamesWhatIsSeen(things=["flange"])(back(look="the flange there")) is None
    assert NamesWhatIsSeen()(back(look="the flange there")) is not None


# -- lengths and language -------------------------------------------------------------------------


def test_lengths() -> None:
    """Bug: bounds off by one, tags counted as a block's text, or a unit that is never used."""
    rule = Lengths(text=(1, 500), blocks={"back": (3, 5)})
    assert rule(back(look="abc")) is None
    assert rule(back(look=" abcde ")) is None
    assert rule(back(look="ab")) == "<back> has 2 characters, at least 3 wanted"
    assert rule(back(look="abcdef")) == "<back> has 6 characters, at most 5 wanted"
    assert "the answer has" in str(Lengths(text=(1, 20))(back()))
    words = Lengths(
        text=(1, 500), blocks={"back": (1, 2)}, count=lambda text: len(text.split()), unit="tokens"
    )
    assert words(back(look="a b c")) == "<back> has 3 tokens, at most 2 wanted"
    assert Lengths()(qwen(reflections=("", "Looking again: 7"))) is None


@pytest.mark.parametrize(
    ("question", "text", "kept"),
    [
        ("How many?", "caf\u00e9 \u03b1 and \u2220\u03b1\u03b2, \U0001d465 \u00b5m \u2102", True),
        ("How many?", "The bars \u67f1 are red " + "and so on " * 20, True),  # 1 of 192
        ("How many?", "\u6211\u4eec\u770b\u56fe", False),
        ("\u591a\u5c11\u6839\u67f1\u5b50\uff1f", "\u6211\u4eec\u770b\u56fe AB = 7", True),
        ("\u591a\u5c11?", "\u3072\u3089\u304c\u306a", True),  # east Asian scripts are one
        (
            "Read the sign \u201c\u51fa\u53e3\u201d aloud",
            "\u51fa\u53e3 is written there",
            True,
        ),  # quoted from the question
        (
            "Read the sign \u201c\u51fa\u53e3\u201d aloud",
            "\u6211\u4eec\u770b\u56fe",
            False,
        ),  # 2 of 18 letters
        ("How many?", "\u0421\u043a\u043e\u043b\u044c\u043a\u043e", False),
        ("How many?", "\u03bb\u03cc\u03b3\u03bf\u03c2", False),  # a Greek word is no formula
    ],
)
def test_language(question: str, text: str, kept: bool) -> None:
    """Bug: formulas counted as Greek, a label of the picture as a change of language, or a teacher's slip
    into another script not seen."""
    trace = Trace(question=asked(question), text=text, method="qwen_la")
    assert (Language()(trace) is None) is kept


def test_scripts_can_be_named() -> None:
    """Bug: `scripts` that are not used, or a text taken for a list of letters."""
    chinese = Trace(question=asked("How many?"), text="\u6211\u4eec\u770b\u56fe", method="qwen_la")
    assert Language(scripts=["CJK"])(chinese) is None
    why = Language(scripts=["LATIN"])(chinese)
    assert why == "4 of 4 letters are not LATIN, most of them CJK"
    mixed = dataclasses.replace(chinese, text="\u6211\u4eec \u0434")
    assert Language()(mixed) == "3 of 3 letters are not LATIN, most of them CJK"
    plain = dataclasses.replace(chinese, text="How many")  # letters that its question has, too
    assert Language(scripts=["CJK"])(plain) is not None


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Lengths(text=(5, 2)), r"Lengths has \(5, 2\) for 'text'.*least <= most"),
        (lambda: Language(share=0), "Language.share is 0.*above 0"),
        (lambda: Language(scripts="LATIN"), r"It is a list: \['LATIN'\]"),
        (lambda: Language(scripts=["latin"]), "Name them in capitals"),
        (lambda: AnswerNotLeaked(opening=0), "AnswerNotLeaked.opening is 0.*at least 1"),
        (lambda: NamesWhatIsSeen(copied=2), "NamesWhatIsSeen.copied is 2.*at most 1"),
        (lambda: NamesWhatIsSeen(n=0), "NamesWhatIsSeen has readings=1 and n=0.*n >= 1"),
        (lambda: Duplicates(similarity=0.3), "Duplicates.similarity is 0.3.*from 0.6 to 1"),
        (lambda: Duplicates(distance=16), "Duplicates.distance is 16.*0 to 15"),
        (lambda: Duplicates(tint=-1), "Duplicates.tint is -1.*0 to 64"),
        (lambda: Duplicates(needs="all"), "Duplicates.needs is 'all'.*one of"),
        (lambda: Duplicates(of="image"), "Duplicates.of is 'image'.*one of"),
    ],
)
def test_settings_are_checked(make: Any, match: str) -> None:
    """Bug: a value that makes a filter drop all or nothing without a word."""
    with pytest.raises(ValueError, match=match):
        make()
