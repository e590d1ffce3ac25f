"""Rows that were seen, found again by what is nearly the same: by bands, never by all pairs.

Memory holds numbers only: about 1.4 kB for a text of 300 characters, half of it for an image. What is found
depends on what was added, in which order, and on nothing else; so a pass over the same rows finds the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from reflectvlm.curate.hashes import Hashes, ImageHash, distances

MOST = 32
"""Rows that are kept under one key. Of more that share it, and are not alike, later ones are not found by
it."""


class Keyed:
    """64-bit keys -> numbers of rows, several for a key: open addressing in two arrays, at most half full."""

    def __init__(self) -> None:
        self._allocate(1 << 12)
        self._count = 0

    def find(self, keys: Hashes) -> list[int]:
        """All rows with one of these keys, in their order, each once."""
        return [int(row) for row in np.unique(self._matches(keys)[1])]

    def add(self, keys: Hashes, row: int) -> None:
        """Keys that already have `MOST` rows stay as they are."""
        times = np.bincount(self._matches(keys)[0], minlength=len(keys))
        new = keys[times < MOST]
        self._count += len(new)
        while 2 * self._count > len(self._rows):
            self._grow()
        self._put(new, np.full(len(new), row, dtype=np.int32))

    def _matches(self, keys: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """(which key, row), for each entry under the keys."""
        which = np.arange(len(keys))
        at = (keys & self._mask).astype(np.int64)
        found: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = []
        while len(which):
            rows = self._rows[at]
            equal = (rows >= 0) & (self._keys[at] == keys[which])
            if equal.any():
                found.append((which[equal], rows[equal]))
            used = rows >= 0
            which, at = which[used], (at[used] + 1) & int(self._mask)
        if not found:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
        return np.concatenate([one for one, _ in found]), np.concatenate([row for _, row in found])

    def _put(self, keys: Hashes, rows: NDArray[np.int32]) -> None:
        at = (keys & self._mask).astype(np.int64)
        while len(keys):
            free = self._rows[at] < 0
            self._keys[at[free]], self._rows[at[free]] = keys[free], rows[free]
            # Of several that took the same place one is there now; the others go on to the next.
            there = (self._rows[at] == rows) & (self._keys[at] == keys)
            keys, rows, at = keys[~there], rows[~there], (at[~there] + 1) & int(self._mask)

    def _grow(self) -> None:
        keys, rows = self._keys, self._rows
        self._allocate(2 * len(rows))
        self._put(keys[rows >= 0], rows[rows >= 0])

    def _allocate(self, size: int) -> None:
        self._mask = np.uint64(size - 1)
        self._keys = np.zeros(size, dtype=np.uint64)
        self._rows = np.full(size, -1, dtype=np.int32)


class Pictures:
    """Images of rows -> numbers of groups: each different tuple of hashes is a group of its own.

    Two tuples are near if they have the same length and each image is near its counterpart: at most
    `distance` of 64 bits of structure and `tint` of colour differ; with `distance=None`, if all pixels are
    the same. Of d bits in 64, one of d + 1 stretches is untouched: only images that share a stretch are
    compared."""

    def __init__(self, distance: int | None, tint: int) -> None:
        self._distance, self._tint = distance, tint
        self._groups: dict[tuple[ImageHash, ...], int] = {}
        self._tuples: list[tuple[ImageHash, ...]] = []
        self._stretches: dict[tuple[int, int], tuple[array[int], array[int]]] = {}
        """By a stretch of structure: groups, and the whole structures of their first images."""

    def near(self, images: tuple[ImageHash, ...]) -> list[tuple[int, int]]:
        """(group, bits of structure that differ), the group of the very same images first."""
        same = self._groups.get(images)
        found = [] if same is None else [(same, 0)]
        if not images or self._distance is None:
            return found
        candidates: set[int] = set()
        for key in self._keys(images[0]):
            if (members := self._stretches.get(key)) is not None:
                near = distances(images[0].structure, np.array(members[1], dtype=np.uint64)) <= self._distance
                candidates.update(members[0][place] for place in np.flatnonzero(near))
        for group in sorted(candidates - {same}):
            apart = self._apart(images, self._tuples[group])
            if apart is not None:
                found.append((group, apart))
        return found

    def add(self, images: tuple[ImageHash, ...]) -> int:
        """The group of these images."""
        known = self._groups.get(images)
        if known is not None:
            return known
        group = self._groups[images] = len(self._tuples)
        self._tuples.append(images)
        if images and self._distance is not None:
            for key in self._keys(images[0]):
                groups, structures = self._stretches.setdefault(key, (array("I"), array("Q")))
                groups.append(group)
                structures.append(images[0].structure)
        return group

    def _apart(self, images: Sequence[ImageHash], others: Sequence[ImageHash]) -> int | None:
        if len(images) != len(others):
            return None
        pairs = list(zip(images, others, strict=True))
        apart = max((one.structure ^ other.structure).bit_count() for one, other in pairs)
        tints = max((one.colour ^ other.colour).bit_count() for one, other in pairs)
        return apart if apart <= (self._distance or 0) and tints <= self._tint else None

    def _keys(self, image: ImageHash) -> list[tuple[int, int]]:
        assert self._distance is not None
        parts = self._distance + 1
        ends = [64 * k // parts for k in range(parts + 1)]
        return [
            (k, (image.structure >> low) & ((1 << (high - low)) - 1))
            for k, (low, high) in enumerate(pairwise(ends))
        ]
