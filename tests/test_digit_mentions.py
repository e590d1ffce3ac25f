"""Digits that an answer names and the page does not have."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflectvlm.data.digit_mentions import Hallucination, Mention, mentions
from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import PLACES, Digits, reading
from reflectvlm.rewards import Rubric
from reflectvlm.train.evaluate import summarize
from reflectvlm.types import Prompt, Rollout, Sample

PAGE = (7, None, 0, 3)
"""upper left 7, upper right empty, lower left 0, lower right 3"""


def rollout(text: str, digits: Any = PAGE) -> Rollout:
    sample = Sample(id="s", question="", answer="", columns={} if digits is ... else {"digits": digits})
    return Rollout(prompt=Prompt(sample=sample, spans=()), spans=(), text=text, stop="eos")


def share(text: str, which: Any = "last", digits: Any = PAGE) -> float | None:
    (value,) = Hallucination(mentions=which)([rollout(text, digits)])
    return value


@pytest.mark.parametrize(
    ("text", "last", "every"),
    [
        ("upper left 7, lower right 3.", 0.0, 0.0),
        ("Upper left 1, lower right 3.", 0.5, 0.5),
        # Corrected: wrong once of two times.
        ("upper left 1. Looking again: upper left 7.", 0.0, 0.5),
        # Spoiled by the second look.
        ("upper left 7. Looking again: upper left 1.", 1.0, 0.5),
        # Repeated: each mention counts, wrong two times of three.
        ("upper left 1. upper left 1. lower left 0.", 0.5, 2 / 3),
        # A digit in an empty place, and one taken back.
        ("upper right 3", 1.0, 1.0),
        ("upper left 1, upper right 3. Looking again: upper left 7, upper right none.", 0.0, 2 / 3),
        # "none" names nothing, right or wrong.
        ("upper right none, lower left none", None, None),
        ("upper left 7, upper left none", None, 0.0),
        # 0 is a digit, and no empty place.
        ("lower left 0", 0.0, 0.0),
        ("upper right 0", 1.0, 1.0),
        # A number is no digit, however long; another spelling of one is another.
        ("upper left 77", 1.0, 1.0),
        ("upper left " + "7" * 5000, 1.0, 1.0),
        ("upper left 07", 1.0, 1.0),
        ("7 + 3 = 10", None, None),
        ("the upper left digit is larger than 7", None, None),
        ("upper left nonesuch, supper left 1, upper left 7th", None, None),
        ("", None, None),
    ],
)
def test_shares_by_hand(text: str, last: float | None, every: float | None) -> None:
    """Bug: a corrected misreading counted as the answer's claim, an empty place as a digit, 0 as empty."""
    assert share(text, "last") == last
    assert share(text, "all") == every


@given(digits=st.lists(st.none() | st.integers(0, 9), min_size=4, max_size=4), said=st.permutations(range(4)))
def test_what_is_read_off_the_page_is_no_hallucination(digits: list[int | None], said: list[int]) -> None:
    """Bug: a place mistaken for another one."""
    text = ", ".join(reading(place, digits[place]) for place in said)
    digit = [None if digits[place] is None else str(digits[place]) for place in said]
    assert mentions(text) == [Mention(place, one) for place, one in zip(said, digit, strict=True)]
    assert share(text, digits=digits) in ((0.0,) if any(one is not None for one in digits) else (None,))
    moved = [None if one is None else (one + 1) % 10 for one in digits]
    assert share(text, digits=moved) in ((1.0,) if any(one is not None for one in digits) else (None,))


def test_gold_traces_end_with_the_truth() -> None:
    """Bug: a measure that is above 0 for the gold answers, or blind to their first misreading."""
    data = Digits(size=120, filled=(3, 4), kinds=("read", "add"))
    for style in ("semantic", "qwen_la"):
        for wrong in (0.0, 1.0):
            for row in DigitTraces(data=data, style=style, wrong_first=wrong):  # type: ignore[arg-type]
                trace, looks = row.columns["trace"], row.columns["looks"]
                assert Hallucination().share(trace, row) == 0.0
                # Each place is named twice, one of them wrongly once.
                assert Hallucination(mentions="all").share(trace, row) == wrong / (2 * len(looks))


def test_a_rubric_leaves_out_answers_that_name_nothing() -> None:
    """Bug: an answer that names nothing counted as free of hallucinations, or as a failed reward."""
    rubric = Rubric(
        rewards={"hallucination": Hallucination()}, weights={"hallucination": 0.0}, on_error="raise"
    )
    scored = rubric([rollout("upper left 1"), rollout("It is 7."), rollout("upper left 7")])
    assert scored.scored == (True, True, True)
    assert scored.rewards == (0.0, 0.0, 0.0)
    assert summarize([scored], "<back>")["reward/hallucination"] == 0.5


@pytest.mark.parametrize("digits", [..., None, (1, 2), 7])
def test_a_page_that_is_not_known(digits: Any) -> None:
    """Bug: every mention on another data set taken for a hallucination."""
    with pytest.raises(
        ValueError, match=r"Sample 's' does not say what is on its page.*as Digits gives them"
    ):
        share("upper left 7", digits=digits)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mentions is 'lst', not one of .* Did you mean 'last'"):
        Hallucination(mentions="lst")  # type: ignore[arg-type]


def test_the_example_in_the_docstring_holds() -> None:
    text = " ".join((Hallucination.__doc__ or "").split())
    example = text.split('"')[-4]
    assert example.startswith("upper left 1")
    assert (share(example, digits=(7, None, None, None)), share(example, "all", (7, None, None, None))) == (
        0,
        2 / 3,
    )
    assert len(PLACES) == 4
