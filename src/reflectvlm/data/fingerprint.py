"""A name for a data set by its content, so that a resumed run notices other rows than those it began with.

It depends on how many rows there are, on which rows of a file are used, and on the text of at most 64 rows
at fixed places; of rows in memory also on a few pixels of their images. Rows that are made when asked for
are read more than once: what chance has a hand in, such as augmented images, cannot be compared and does not
count. Left out: a change between those places that keeps the number of rows, images that a row only names
(their files are not opened), and whatever a row that cannot be read holds beside its place.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from reflectvlm.data.curriculum import Curriculum
from reflectvlm.data.filtered import Dataset
from reflectvlm.data.rows import BadRow
from reflectvlm.types import Sample

if TYPE_CHECKING:
    from hashlib import _Hash

log = logging.getLogger("reflectvlm")

_PLACES = 64
_COMPARED = 32
"""So many second looks at least, for few rows several at each: one coin that falls the same side twice must
not pass for a rule."""
_ENDLESS = 2**24
"""From this size on rows are made when asked for, which costs time: a quarter of the places is enough."""


def fingerprint(data: Sequence[Sample]) -> str:
    """`"<rows>-<16 figures>"`; equal for equal data in any process, on any machine.

    Example: `fingerprint(Digits(size=100))` is `"100-"` and 16 figures.
    """
    digest = hashlib.sha256()
    random: set[str] = set()
    _add_data(digest, data, random)
    if random:
        log.warning(
            "%s of the data differ each time that a row is read, so a resumed run cannot tell whether "
            "they are those that it began with%s",
            " and ".join(part for part in _PARTS if part in random),
            ": only the number of rows is compared" if random.issuperset(_PARTS) else "",
        )
    return f"{len(data)}-{digest.hexdigest()[:16]}"


def places(size: int) -> list[int]:
    """Where a data set of this size is looked at: all over it, first and last row included."""
    count = min(size, _PLACES if size < _ENDLESS else _PLACES // 4)
    return sorted({i * (size - 1) // max(count - 1, 1) for i in range(count)})


def _add_data(digest: _Hash, data: Sequence[Sample], random: set[str]) -> None:
    """Adds to `random` the parts of rows that are left out."""
    _add(digest, len(data))
    if isinstance(data, Dataset):
        _add_dataset(digest, data)
    elif isinstance(data, Curriculum):
        _add(digest, list(data.rows))
        for part in data.parts:
            _add_data(digest, part, random)
    else:
        rows, differing = _looked_at(data)
        random |= differing
        for place, row in rows.items():
            kept = [row[part] for part in _PARTS if part not in differing] if row else [place]
            _add(digest, kept)


def _add_dataset(digest: _Hash, data: Dataset) -> None:
    """Raw rows, so that no image is decoded, and none that has gone since makes a difference."""
    kept = data.kept
    digest.update(repr(kept).encode() if isinstance(kept, range) else np.asarray(kept, np.int64).tobytes())
    for place in places(len(data)):
        try:
            row = data.rows[kept[place]]
        except BadRow as bad:
            _add(digest, [place, bad.position])
            continue
        try:
            _add(digest, content_of(row))
        except Exception:  # noqa: BLE001 - an image inside of it is cut; the run meets the row and names it
            _add(digest, place)


# -- rows that are made when asked for ------------------------------------------------------------

_PARTS = ("ids", "questions", "answers", "columns", "images")

_Row: TypeAlias = Mapping[str, bytes]
"""A digest of each part; empty for a row that cannot be read."""


def _looked_at(data: Sequence[Sample]) -> tuple[dict[int, _Row], set[str]]:
    """Rows by their places, and which of their parts are not the same each time."""
    where = places(len(data))
    rows = {place: _row(data, place) for place in where}
    differing: set[str] = set()
    for _ in range(-(-_COMPARED // max(len(where), 1))):
        for place in where:
            again = _row(data, place)
            if rows[place] and again:
                differing |= {part for part in _PARTS if again[part] != rows[place][part]}
            rows[place] = rows[place] or again  # a source that failed once
    return rows, differing


def _row(data: Sequence[Sample], place: int) -> _Row:
    try:
        sample = data[place]
        parts = (sample.id, sample.question, sample.answer, sample.columns, list(sample.images))
        return {name: content_of(part) for name, part in zip(_PARTS, parts, strict=True)}
    except Exception:  # noqa: BLE001 - a user's own code and images; the run meets the row and names it
        return {}


# -- bytes of a value -----------------------------------------------------------------------------


def content_of(value: Any) -> bytes:
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.digest()


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
