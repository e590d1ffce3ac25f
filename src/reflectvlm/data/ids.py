"""Which rows of a set of any size have the id of an earlier row, in bounded memory.

Ids go to a temporary file as 16 bytes of a hash and 8 of the row's place. They are compared a part at a time:
the part of an id follows from its hash, so equal ids are in one. Two different ids are taken for equal with a
chance of about 1e-20 in a set of a billion rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import IO, Any

import numpy as np

PART = 2**18
"""Ids compared at one time; they take 24 bytes each, and as much again to sort."""
_ENTRY = np.dtype([("a", "<u8"), ("b", "<u8"), ("place", "<u8")])
_FILES = 40
_BUFFER = 2**18


@dataclass
class Ids:
    """Example: `ids.add("x", "rows.jsonl:3"); list(ids.repeated()) == [("rows.jsonl:9", "rows.jsonl:3")]`"""

    _file: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    _names: dict[str, int] = field(default_factory=dict)
    _waiting: bytearray = field(default_factory=bytearray)
    _count: int = 0

    def add(self, name: str, position: str) -> None:
        """`position` is a file's name and the number of the row in it, which is how all rows are named."""
        file, _, number = position.rpartition(":")
        place = (self._names.setdefault(file, len(self._names)) << _FILES) | int(number)
        digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        self._waiting += digest + place.to_bytes(8, "little")
        self._count += 1
        if len(self._waiting) > _BUFFER:
            self._flush()

    def repeated(self) -> Iterator[tuple[str, str]]:
        """(row, the first row with its id), by file and number within a part."""
        self._flush()
        parts = -(-self._count // PART) or 1
        for part in range(parts):
            entries = np.concatenate([chunk[chunk["a"] % parts == part] for chunk in self._chunks()])
            yield from self._among(entries)

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        self._file.write(self._waiting)
        self._waiting.clear()

    def _chunks(self) -> Iterator[Any]:
        self._file.seek(0)
        yield np.empty(0, _ENTRY)
        while data := self._file.read(_ENTRY.itemsize * 2**16):
            yield np.frombuffer(data, _ENTRY)

    def _among(self, entries: Any) -> Iterator[tuple[str, str]]:
        ordered = entries[np.lexsort((entries["place"], entries["b"], entries["a"]))]
        same = (ordered["a"][1:] == ordered["a"][:-1]) & (ordered["b"][1:] == ordered["b"][:-1])
        if not same.any():
            return
        # Where a run of equal ids begins, carried on to all of its members.
        starts = np.concatenate([[True], ~same])
        first = ordered["place"][np.flatnonzero(starts)][np.cumsum(starts) - 1]
        again = np.flatnonzero(~starts)
        for index in again[np.argsort(ordered["place"][again])]:
            yield self._position(int(ordered["place"][index])), self._position(int(first[index]))

    def _position(self, place: int) -> str:
        file = list(self._names)[place >> _FILES]
        return f"{file}:{place & ((1 << _FILES) - 1)}"
