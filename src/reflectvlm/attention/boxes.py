"""Where the objects of an image are, and how much of the attention to the image lies on them.

A row knows by its columns: `boxes`, name -> [left, top, right, bottom] in pixels of its first image, and
`asked`, the names of those that the question is about (all, where it is missing). A page of digits knows
without them: a digit stands somewhere in its quarter of the page, which is its box here, and `looks` are the
places that the question is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from reflectvlm.data.digits import PLACES
from reflectvlm.types import Sample


class Box(NamedTuple):
    """Shares of the image's width and height, from its upper left corner."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)

    def overlaps(self, other: Box) -> bool:
        return min(self.right, other.right) > max(self.left, other.left) and min(
            self.bottom, other.bottom
        ) > max(self.top, other.top)


@dataclass(frozen=True, kw_only=True)
class Objects:
    """What is known of a row's first image."""

    boxes: Mapping[str, Box]
    asked: tuple[str, ...]

    @property
    def wanted(self) -> tuple[Box, ...]:
        return tuple(self.boxes[name] for name in self.asked)

    @property
    def others(self) -> dict[str, Box]:
        return {name: box for name, box in self.boxes.items() if name not in self.asked}


def objects_of(sample: Sample) -> Objects | None:
    """None where nothing is known. Raises ValueError for boxes that are none."""
    if sample.columns.get("boxes") is not None:
        return _given(sample)
    digits, looks = sample.columns.get("digits"), sample.columns.get("looks")
    if not isinstance(digits, Sequence) or len(digits) != len(PLACES) or looks is None:
        return None
    # An empty quarter is a place too: a question may ask about it.
    boxes = {
        name: Box(n % 2 / 2, n // 2 / 2, n % 2 / 2 + 0.5, n // 2 / 2 + 0.5) for n, name in enumerate(PLACES)
    }
    return Objects(boxes=boxes, asked=tuple(PLACES[place] for place in looks))


def _given(sample: Sample) -> Objects:
    width, height = sample.images[0].size if sample.images else (0, 0)
    given, boxes = sample.columns["boxes"], {}
    for name, corners in given.items() if isinstance(given, Mapping) else ():
        left, top, right, bottom = map(float, corners) if len(corners) == 4 else (0.0,) * 4
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"Row {sample.id!r} has the box {name!r} = {corners!r} on an image of {width} x {height}. "
                f"A box "
                "is [left, top, right, bottom] in pixels, inside of the image."
            )
        boxes[str(name)] = Box(left / width, top / height, right / width, bottom / height)
    asked = sample.columns.get("asked")
    names = tuple(boxes) if asked is None else tuple(map(str, asked))
    if not boxes or not names or not set(names) <= set(boxes):
        raise ValueError(
            f"Row {sample.id!r} has boxes={given!r} and asked={asked!r}. boxes is an object of names and "
            f"boxes, "
            "and asked a list of some of these names."
        )
    return Objects(boxes=boxes, asked=names)


def coverage(boxes: Sequence[Box], rows: int, columns: int) -> Float[np.ndarray, "rows columns"]:
    """How much of each cell of an image's grid lies in any of the boxes, from 0 to 1; exact where boxes do
    not overlap, else the largest of them."""
    covered = np.zeros((rows, columns))
    for box in boxes:
        down = _overlap(box.top * rows, box.bottom * rows, rows)
        across = _overlap(box.left * columns, box.right * columns, columns)
        covered = np.maximum(covered, down[:, None] * across[None, :])
    return covered


def _overlap(start: float, stop: float, count: int) -> Float[np.ndarray, " n"]:
    """How much of each of the cells [0, 1), [1, 2), … lies between start and stop."""
    edges = np.arange(count)
    return np.clip(np.minimum(stop, edges + 1) - np.maximum(start, edges), 0, 1)
