"""Where training stands in its data. A pure function of (seed, position), so it needs no state but
the position, and a resumed run takes the rows the unbroken one would have taken."""

from __future__ import annotations

import functools

import numpy as np

_ENDLESS = 2**24
"""From this size on rows are made when asked for and taken in order; shuffling them says nothing."""


def place_at(size: int, position: int, seed: int) -> int:
    """Where in `size` rows number `position` of endless epochs stands, each in its own random order."""
    if size >= _ENDLESS:
        return position % size
    epoch, place = divmod(position, size)
    return int(_order(size, seed, epoch)[place])


@functools.lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 17]).permutation(size)
