"""Which row comes when: each once per epoch, and the same after a restart."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflectvlm.train.cursor import _ENDLESS, place_at


def ids(size: int, positions: Sequence[int], seed: int) -> list[int]:
    return [place_at(size, position, seed) for position in positions]


@given(size=st.integers(1, 50), epoch=st.integers(0, 10**6), seed=st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_an_epoch_is_a_permutation(size: int, epoch: int, seed: int) -> None:
    """A row that comes twice while another never does."""
    assert sorted(ids(size, range(epoch * size, (epoch + 1) * size), seed)) == list(range(size))


@given(size=st.integers(1, 50), start=st.integers(0, 300), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_a_restart_takes_the_rows_the_unbroken_run_would_have(size: int, start: int, seed: int) -> None:
    whole = ids(size, range(start + 20), seed)
    assert ids(size, range(start, start + 20), seed) == whole[start:]
    assert [ids(size, [p], seed)[0] for p in reversed(range(start + 20))] == whole[::-1]


def test_epochs_and_seeds_have_their_own_order() -> None:
    """Two equal orders of 50 rows are one in 50! = 3e64."""
    orders = [ids(50, range(e * 50, e * 50 + 50), seed) for e in range(3) for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 9


@pytest.mark.parametrize("size", [_ENDLESS, 2**31])
def test_endless_data_come_in_order(size: int) -> None:
    """A permutation of 2^31 numbers takes 16 GB, and rows made by a generator are random already."""
    assert ids(size, [0, 1, 5, size - 1, size, size + 1], 7) == [0, 1, 5, size - 1, 0, 1]
