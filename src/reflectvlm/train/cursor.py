"""Where training stands in its data. A pure function of (seed, position), so it needs no state but
the position, and a resumed run takes the rows the unbroken one would have taken."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from reflectvlm.types import Sample

_ENDLESS = 2**24
"""From this size on rows are made when asked for and taken in order; shuffling them says nothing."""


def row_at(data: Sequence[Sample], position: int, seed: int) -> Sample:
    """Row number `position` of endless epochs, each in its own random order."""
    size = len(data)
    if size >= _ENDLESS:
        return data[position % size]
    epoch, place = divmod(position, size)
    return data[int(_order(size, seed, epoch)[place])]


@functools.lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 17]).permutation(size)
