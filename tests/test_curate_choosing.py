"""Which answers become which traces, and how many of each."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflectvlm.curate.choosing import LOOKS, Choosing, assign, check_shares, counts_of
from reflectvlm.curate.types import Look

A = "Left 3, right 4. 3 + 4 = 7. \\boxed{7}"
B = "Left 8, right 4. 8 + 4 = 12. \\boxed{12}"
ODD = "Left 5, right 2. 5 + 2 = 7. \\boxed{7}"
SHARES: dict[Look, float] = {"corrected": 0.3, "confirmed": 0.5, "unneeded": 0.2}
POSSIBLE = st.lists(st.frozensets(st.sampled_from(LOOKS)), max_size=40)


class Rows(list[frozenset[Look]]):
    """Counts how often all of them are gone through."""

    walks = 0

    def __iter__(self) -> Iterator[frozenset[Look]]:
        self.walks += 1
        return super().__iter__()


def test_rows_are_counted_once_however_far_the_shares_are() -> None:
    """Bug: where few rows can be corrected, each size that is tried counts all rows again: 40,000 questions
    take minutes, 400,000 hours."""
    rows = Rows([frozenset({"confirmed"})] * 200 + [frozenset({"corrected", "unneeded"})] * 6)
    looks = assign(rows, SHARES, None, 0)
    # The six others are half of the set, one of 12: 3.6, 6 and 2.4 by the shares.
    assert Counter(looks) == {"corrected": 4, "confirmed": 6, "unneeded": 2, None: 194}
    assert rows.walks < 20


def test_of_several_right_answers_the_shared_reading_is_the_second_look() -> None:
    """Bug: a right result that follows from a wrong reading becomes what the look teaches."""
    choosing = Choosing(method="semantic_back", self_made=True)
    found = choosing([ODD, A, B, A], [True, True, False, True])
    assert found.second is not None
    assert found.second.kept == "Left 3, right 4."
    assert (found.rate, found.agree) == (0.75, 0.5)
    assert [start.kept for start in found.starts["corrected"]] == ["Left 8, right 4."]
    assert len(found.starts["confirmed"]) == 1, "the other answer that reads the same"
    assert found.starts["unneeded"][0].answer == "7"


def test_readings_that_few_answers_share_are_not_taught() -> None:
    """Bug: `agree` has no effect."""
    assert Choosing(method="semantic_back", self_made=True)([A, B, B], [True, False, False]).why == (
        "second looks do not agree"
    )
    assert Choosing(method="semantic_back", self_made=True, agree=0.3)([A, B, B], [True, False, False]).starts


def test_a_wrong_answer_with_the_same_reading_is_no_first_reading_to_mend() -> None:
    """Bug: a look "corrects" a reading into itself, where only the sum was wrong."""
    slip = "Left 3, right 4. 3 + 4 = 8. \\boxed{8}"
    semantic = Choosing(method="semantic_back", self_made=True)([A, A, slip], [True, True, False])
    assert "corrected" not in semantic.starts
    solution = Choosing(method="solution_back", self_made=True)([A, A, slip], [True, True, False])
    assert [start.answer for start in solution.starts["corrected"]] == ["8"]


def test_pass_rates_bound_what_is_used() -> None:
    """Bug: questions that the model never answers are in a set that it is to learn to answer from."""
    choosing = Choosing(method="semantic_back", pass_rate=(0.4, 0.8))
    assert choosing([A, B, B], [True, False, False]).why == "pass rate too low"
    assert choosing([A, A, A], [True, True, True]).why == "pass rate too high"
    assert choosing([A, B, None], [True, False, False]).rate == 0.5, "what has no text is no answer"
    assert choosing([None], [False]).why == "no answers"


def test_with_a_teacher_a_question_needs_no_right_answer() -> None:
    """Bug: what a teacher could mend is dropped as if the model had to mend it itself."""
    found = Choosing(method="semantic_back", pass_rate=(0, 1))([B, B], [False, False])
    assert set(found.starts) == {"corrected"}


@given(POSSIBLE, st.integers(0, 3))
def test_shares_are_kept_and_no_row_gets_a_look_it_cannot_have(
    possible: list[frozenset[Look]], seed: int
) -> None:
    """Bug: shares are met by rows that cannot have the look, or one question is in the set twice."""
    looks = assign(possible, SHARES, None, seed)
    assert len(looks) == len(possible)
    assert all(look is None or look in there for look, there in zip(looks, possible, strict=True))
    used = [look for look in looks if look is not None]
    assert {look: used.count(look) for look in LOOKS} == counts_of(len(used), SHARES)


@settings(max_examples=40)
@given(st.lists(st.frozensets(st.sampled_from(LOOKS)), max_size=5))
def test_no_larger_set_has_the_shares(possible: list[frozenset[Look]]) -> None:
    """Bug: a row that alone could have a scarce look is spent on another, and the set is smaller than it
    could be. Compared with all ways there are."""
    ways = itertools.product(*([None, *looks] for looks in possible))
    used = [[look for look in way if look is not None] for way in ways]
    fit = [len(way) for way in used if Counter(way) == Counter(counts_of(len(way), SHARES))]
    assert sum(look is not None for look in assign(possible, SHARES, None, 0)) == max(fit)


def test_the_largest_set_is_found() -> None:
    """Bug: a look that any row can have takes the rows that alone can have the scarce one. Ten rows with 3, 5
    and 2 wanted: only the first three can be corrected."""
    possible = [frozenset(LOOKS)] * 3 + [frozenset({"confirmed", "unneeded"})] * 7
    looks = assign(possible, SHARES, None, 0)
    assert looks[:3] == ["corrected"] * 3
    assert sorted(filter(None, looks[3:])) == ["confirmed"] * 5 + ["unneeded"] * 2
    assert sum(look is not None for look in assign(possible, SHARES, 4, 0)) == 4


def test_counts_add_up() -> None:
    """Bug: rounding loses or invents a row. 7 rows: 2.1, 3.5, 1.4 are 2, 4, 1."""
    assert counts_of(7, SHARES) == {"corrected": 2, "confirmed": 4, "unneeded": 1}
    assert all(sum(counts_of(total, SHARES).values()) == total for total in range(50))


@pytest.mark.parametrize(
    ("shares", "method", "why"),
    [
        ({"corected": 1.0}, "semantic_back", "shares name 'corected'"),
        ({"corrected": 0.5}, "semantic_back", "add up to 1"),
        ({"corrected": 1.5, "confirmed": -0.5}, "semantic_back", "from 0 to 1"),
        ({"confirmed": 0.5, "unneeded": 0.5}, "qwen_la", "exactly one reflection"),
    ],
)
def test_shares_that_cannot_be_are_refused(shares: dict[Look, float], method: str, why: str) -> None:
    """Bug: a misspelt look is a share of nothing, and the set has other shares than were asked for."""
    with pytest.raises(ValueError, match=why):
        check_shares(shares, method)  # type: ignore[arg-type]
