"""A name for a data set by its content, so that a resumed run notices other rows than those it began with.

It depends on how many rows there are, on which rows of a file are used, and on the text of at most 64 rows
at fixed places; of rows in memory also on a few pixels of their images. Left out: a change between those
places that keeps the number of rows, and images that a row only names (their files are not opened).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reflectvlm.data.curriculum import Curriculum
from reflectvlm.data.filtered import Dataset
from reflectvlm.data.rows import BadRow
from reflectvlm.types import Sample

if TYPE_CHECKING:
    from hashlib import _Hash

_PLACES = 64
_ENDLESS = 2**24
"""From this size on rows are made when asked for, which costs time: a quarter of the places is enough."""


def fingerprint(data: Sequence[Sample]) -> str:
    """`"<rows>-<16 figures>"`; equal for equal data in any process, on any machine.

    Example: `fingerprint(Digits(size=100))` is `"100-"` and 16 figures.
    """
    digest = hashlib.sha256()
    _add_data(digest, data)
    return f"{len(data)}-{digest.hexdigest()[:16]}"


def places(size: int) -> list[int]:
    """Where a data set of this size is looked at: all over it, first and last row included."""
    count = min(size, _PLACES if size < _ENDLESS else _PLACES // 4)
    return sorted({i * (size - 1) // max(count - 1, 1) for i in range(count)})


def _add_data(digest: _Hash, data: Sequence[Sample]) -> None:
    _add(digest, len(data))
    if isinstance(data, Dataset):
        _add_dataset(digest, data)
    elif isinstance(data, Curriculum):
        _add(digest, list(data.rows))
        for part in data.parts:
            _add_data(digest, part)
    else:
        for place in places(len(data)):
            try:
                sample = data[place]
            except BadRow as bad:
                _add(digest, [place, bad.position])
            else:
                _add(digest, [sample.id, sample.question, sample.answer, sample.columns])
                _add(digest, list(sample.images))


def _add_dataset(digest: _Hash, data: Dataset) -> None:
    """Raw rows, so that no image is decoded, and none that has gone since makes a difference."""
    kept = data.kept
    digest.update(repr(kept).encode() if isinstance(kept, range) else np.asarray(kept, np.int64).tobytes())
    for place in places(len(data)):
        try:
            row = data.rows[kept[place]]
        except BadRow as bad:
            _add(digest, [place, bad.position])
        else:
            _add(digest, row)


def _add(digest: _Hash, value: Any) -> None:
    """Plain values by content; anything else by its kind, since its text may hold an address."""
    if isinstance(value, Mapping):
        _begin(digest, "map", len(value))
        for key in sorted(value, key=str):
            _add(digest, str(key))
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        _begin(digest, "list", len(value))
        for inner in value:
            _add(digest, inner)
    elif isinstance(value, bytes | bytearray):
        _begin(digest, "bytes", len(value))
        digest.update(value)
    elif isinstance(value, str):
        _add(digest, value.encode("utf-8", "surrogatepass"))
    elif value is None or isinstance(value, bool | int | float):
        _begin(digest, repr(value), 0)
    elif hasattr(value, "getpixel"):
        _begin(digest, f"image {value.mode} {value.size}", 0)
        # The nearest of 8 x 8 pixels: their number is the same for any size.
        digest.update(value.resize((8, 8), resample=0).tobytes() if min(value.size) else b"")
    else:
        _begin(digest, type(value).__name__, 0)


def _begin(digest: _Hash, what: str, length: int) -> None:
    """Kind and length first, so that no two different values give the same bytes."""
    digest.update(f"{what}:{length};".encode())
