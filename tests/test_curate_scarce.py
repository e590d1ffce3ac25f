"""Which look is scarce, and the shares that would keep every row."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reflectvlm.curate.choosing import LOOKS, assign
from reflectvlm.curate.coldstart_command import shares_of
from reflectvlm.curate.scarce import Supply, after, before
from reflectvlm.curate.types import Look

ANY = st.frozensets(st.sampled_from(LOOKS))
SHARES = st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)


@given(st.lists(ANY, max_size=60), SHARES, st.integers(1, 70))
def test_the_shares_that_are_told_do_keep_all(
    possible: list[frozenset[Look]], weights: list[int], most: int
) -> None:
    """Bug: a user follows the advice, pays again, and still loses rows."""
    shares = {look: weight / sum(weights) for look, weight in zip(LOOKS, weights, strict=True)}
    supply = Supply.of(possible, shares)
    if not supply.rows:
        return
    told = shares_of(supply.keep_all(most).removeprefix("shares="))
    assert abs(sum(told.values()) - 1) < 1e-6
    looks = assign(list(supply.rows), told, most, 0)
    assert sum(look is not None for look in looks) == min(most, len(supply.rows))


def test_shares_that_can_be_had_are_told_as_they_are() -> None:
    """Bug: the advice for one look turns the shares of all others upside down."""
    both: frozenset[Look] = frozenset({"confirmed", "unneeded"})
    supply = Supply.of(
        [both] * 18 + [frozenset({"corrected"})] * 2, {"corrected": 0.3, "confirmed": 0.5, "unneeded": 0.2}
    )
    assert supply.scarce == "corrected"
    # 18 rows for 0.5 to 0.2: 12.9 + 5.1
    assert supply.keep_all() == "shares=corrected:0.1,confirmed:0.65,unneeded:0.25"
    assert before(supply, 7, None).startswith("corrected is scarce: 2 of 20 usable questions can have it")
    assert "leave out 13 that" in before(supply, 7, None)
    assert before(supply, 7, 8) == before(supply, 20, None) == after(supply, 0) == ""


def test_a_look_that_is_a_fraction_of_a_row_is_not_missed() -> None:
    """Bug: limit=1, or a try with two questions, is refused for its shares."""
    confirmed: frozenset[Look] = frozenset({"confirmed"})
    shares: dict[Look, float] = {"corrected": 0.3, "confirmed": 0.7}
    assert Supply.of([confirmed] * 3, shares).absent == []
    assert Supply.of([confirmed] * 4, shares).absent == ["corrected"]
    assert Supply.of([confirmed] * 4, shares).without_absent() == {"confirmed": 1.0}


def test_plain_answers_alone_are_no_set_to_look_again_by() -> None:
    """Bug: a teacher that never writes a look leaves a set of plain answers, called a cold start."""
    shares: dict[Look, float] = {"corrected": 0.3, "confirmed": 0.5, "unneeded": 0.2}
    assert Supply.of([frozenset({"unneeded"})] * 9, shares).without_absent() is None
    assert Supply.of([frozenset({"unneeded"})] * 9, {"unneeded": 1.0}).without_absent() == {"unneeded": 1.0}
