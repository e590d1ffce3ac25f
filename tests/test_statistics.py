"""pass@k, avg@k, bootstrap intervals and McNemar's test, against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflectvlm.eval.statistics import (
    avg_at_k,
    interval,
    mcnemar,
    mean_pass_at_k,
    paired_interval,
    pass_at_k,
)

MARKS = st.lists(st.booleans(), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("replies", "right", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6
        (5, 2, 3, 9 / 10),  # 1 - C(3, 3) / C(5, 3) = 1 - 1 / 10
        (5, 3, 3, 1.0),  # only two are wrong: three cannot miss
        (3, 0, 3, 0.0),
    ],
)
def test_pass_at_k_by_hand(replies: int, right: int, k: int, expected: float) -> None:
    """Bug: the biased 1 - (1 - c/n)^k, which for (4, 1, 2) is 0.4375."""
    assert pass_at_k(replies, right, k) == pytest.approx(expected)


@given(marks=st.lists(st.booleans(), min_size=1, max_size=7), data=st.data())
@settings(max_examples=60, deadline=None)
def test_pass_at_k_is_the_mean_over_all_choices(marks: list[bool], data: st.DataObject) -> None:
    """Bug: an estimator that is not what drawing k of n replies gives."""
    k = data.draw(st.integers(1, len(marks)))
    chosen = [any(some) for some in itertools.combinations(marks, k)]
    assert pass_at_k(len(marks), sum(marks), k) == pytest.approx(sum(chosen) / len(chosen))


def test_means_over_items() -> None:
    """Bug: replies pooled over items. pass@2 of [1, 0, 0] is 2/3 and of [0, 0, 0] is 0: 1/3 in the mean."""
    assert mean_pass_at_k([[True, False, False], [False] * 3], 2) == pytest.approx(1 / 3)
    # (1 + 0) / 2 and (0 + 0) / 2: 1/4, whatever the third replies are
    assert avg_at_k([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], 2) == pytest.approx(1 / 4)


def test_one_value_has_no_width() -> None:
    """Bug: an interval around values that do not vary."""
    assert interval([0.5] * 7) == (0.5, 0.5, 0.5)
    # nor do clusters of different sizes give them one: a draw's mean is over the values that it drew
    assert interval([0.5] * 8, ["a", "b", "b", "c", "c", "c", "c", "c"]) == (0.5, 0.5, 0.5)


def test_interval_of_a_coin() -> None:
    """Bug: a standard error too large or too small. Of 400 marks, half of them right, the mean's standard
    error is 0.5 / 20 = 0.025, so that 95 % are within 1.96 * 0.025 = 0.049 of 0.5."""
    found = interval([0.0, 1.0] * 200, draws=4000)
    assert found.value == 0.5
    assert found.low == pytest.approx(0.451, abs=0.004)
    assert found.high == pytest.approx(0.549, abs=0.004)


def test_clusters_count_as_one() -> None:
    """Bug: eight replies to each item counted as eight observations: sqrt(8) times too narrow. 100 clusters
    of 8 equal marks are 100 observations: standard error 0.05."""
    values = [float(place % 2) for place in range(100) for _ in range(8)]
    clusters = [f"{place:03}" for place in range(100) for _ in range(8)]
    clustered, naive = interval(values, clusters, draws=4000), interval(values, draws=4000)
    assert clustered.high - clustered.low == pytest.approx(4 * 1.96 * 0.025, rel=0.1)
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(math.sqrt(8), rel=0.1)


@given(marks=MARKS, seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_intervals_hold_their_mean_and_forget_the_order(marks: list[bool], seed: int) -> None:
    """Bug: an interval that hangs on the order of rows, or does not hold the mean it is of."""
    values, clusters = [float(mark) for mark in marks], [str(place) for place in range(len(marks))]
    order = np.random.default_rng(seed).permutation(len(marks))
    first = interval(values, clusters, draws=50, seed=3)
    again = interval([values[i] for i in order], [clusters[i] for i in order], draws=50, seed=3)
    assert first == pytest.approx(again)
    assert 0 <= first.low <= first.high <= 1
    assert interval(values, draws=50) == pytest.approx(interval([values[i] for i in order], draws=50))
    assert interval(values, clusters, draws=200, level=0.999).low <= first.value


def test_pairs_meet_the_same_draws() -> None:
    """Bug: two models resampled apart. Where one is better by 0.1 on each item, there is nothing to vary."""
    rng = np.random.default_rng(0)
    first = rng.random(50).tolist()
    found = paired_interval(first, [value + 0.1 for value in first])
    assert found == pytest.approx((0.1, 0.1, 0.1))


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (1, 5, 14 / 64),  # 2 (C(6, 0) + C(6, 1)) / 2^6 = 2 * 7 / 64
        (0, 6, 2 / 64),
        (3, 3, 1.0),  # 2 (1 + 6 + 15 + 20) / 64 is above 1
        (0, 0, 1.0),
    ],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p: float) -> None:
    """Bug: a one-sided test, or the chi-squared approximation, which is far off for so few."""
    first = [True] * only_first + [False] * only_second + [True, False]
    second = [False] * only_first + [True] * only_second + [True, False]
    assert mcnemar(first, second) == (only_first, only_second, pytest.approx(p))
    assert mcnemar(second, first) == (only_second, only_first, pytest.approx(p))


@given(first=MARKS, seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_mcnemar_is_the_binomial_test(first: list[bool], seed: int) -> None:
    """Bug: a tail that leaves out or doubles its last term."""
    stats = pytest.importorskip("scipy.stats")
    second = (np.random.default_rng(seed).random(len(first)) < 0.5).tolist()
    found = mcnemar(first, second)
    trials = found.only_first + found.only_second
    expected = stats.binomtest(found.only_first, trials).pvalue if trials else 1.0
    assert found.p == pytest.approx(expected)


def test_wrong_numbers_are_told() -> None:
    """Bug: pass@8 of four replies as a figure; pairs of which one is missing."""
    with pytest.raises(ValueError, match=r"pass@8 needs 8 replies or more, and at least 1; there are 4"):
        pass_at_k(4, 1, 8)
    with pytest.raises(ValueError, match="5 of 4 replies cannot be right"):
        pass_at_k(4, 5, 2)
    with pytest.raises(ValueError, match="avg@2 needs 2 replies to every item, and at least 1; one has 1"):
        avg_at_k([[1.0, 0.0], [1.0]], 2)
    with pytest.raises(ValueError, match="There are no values"):
        interval([])
    with pytest.raises(ValueError, match=r"level is 95. It must be between 0 and 1, e.g. 0.95"):
        interval([1.0], level=95)
    with pytest.raises(ValueError, match="1 clusters are named for 2 values"):
        interval([1.0, 0.0], ["a"])
    for compare in (paired_interval, mcnemar):
        with pytest.raises(ValueError, match=r"are no pairs\. Give the same items of both"):
            compare([True], [True, False])
    with pytest.raises(ValueError, match="draws is 0"):
        interval([1.0], draws=0)
