"""Rows of a text file, JSON lines or CSV, found by their place in the file.

Opening walks through the file once and keeps only where each record begins and ends; a record is
parsed when it is asked for. So a file larger than memory works, and a broken line costs itself
only. A `.gz` file is unpacked into a temporary file, because gzip has no random access. Memory holds one
record, and none above `LONGEST`: a file without line ends, or a quote that is never closed, is no row.
"""

from __future__ import annotations

import atexit
import csv
import gzip
import io
import json
import os
import sys
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from reflectvlm.data.rows import BadRow, Row

LONGEST = 128 * 2**20
"""Bytes of a record; parsed, they can take twenty times as many. An image of `ImageLimits.max_bytes` fits."""
_BOM = b"\xef\xbb\xbf"
_PIECE = 2**20
_BOMB = (2**30, 200)
"""A packed file is refused when it unpacks to more than so many bytes and so many times its size."""


@dataclass(frozen=True, eq=False)
class Records:
    """Byte ranges of a file, each parsed on access. Picklable: it holds no open file."""

    name: str
    """The user's file name, for positions such as `rows.jsonl:17`."""
    file: Path
    """Where the bytes are: the user's file, or the unpacked copy."""
    parse: Callable[[bytes, str], Row]
    stamp: tuple[int, int]
    """Size and modification time when the ranges were taken."""
    starts: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))
    lines: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.starts)

    def position(self, index: int) -> str:
        return f"{self.name}:{self.lines[index]}"

    def __getitem__(self, index: int) -> Row:
        start, end = self.starts[index], self.ends[index]
        with self.file.open("rb") as file:
            if _stamp(file.fileno()) != self.stamp:
                raise ValueError(f"{self.name} has changed since it was opened. Open it again.")
            if end - start > LONGEST:
                detail = f"The row has {end - start:,} bytes, and {LONGEST:,} are read."
                remedy = "Give each row its own line; name images by paths."
                raise BadRow(self.position(index), "", "row too large", remedy, detail)
            file.seek(start)
            return self.parse(file.read(end - start), self.position(index))

    def add(self, start: int, end: int, line: int) -> None:
        self.starts.append(start)
        self.ends.append(end)
        self.lines.append(line)


def open_json_lines(path: Path) -> Records:
    """One object per line; blank lines are passed over but counted."""
    records = empty_records(path, parse_json)
    with records.file.open("rb") as file:
        for number, (start, end) in enumerate(line_spans(file, after_bom(file)), start=1):
            if end > start:
                records.add(start, end, number)
    return records


def line_spans(file: io.BufferedReader, start: int) -> Iterator[tuple[int, int]]:
    """Where each line begins and ends; a blank one ends where it begins. Memory holds a piece of a line."""
    end, blank = start, True
    while piece := file.readline(_PIECE):
        end += len(piece)
        blank = blank and not piece.strip()
        if piece.endswith(b"\n"):
            yield start, start if blank else end
            start, blank = end, True
    if end > start:
        yield start, start if blank else end


def open_csv(path: Path, delimiter: str) -> Records:
    """The first record names the columns. A quoted cell may span lines."""
    records = empty_records(path, parse_json)
    with records.file.open("rb") as file:
        lines = Lines(file, after_bom(file), path.name)
        with long_cells():
            spans = list(csv_spans(lines, delimiter, path.name))
        if not spans:
            raise ValueError(f"{path} has no header line. The first line must name the columns.")
        file.seek(spans[0][0])
        header = header_of(file.read(spans[0][1] - spans[0][0]), delimiter, path)
    records = Records(
        path.name, records.file, partial(parse_csv, header=header, delimiter=delimiter), records.stamp
    )
    for span in spans[1:]:
        records.add(*span)
    return records


def parse_json(data: bytes, position: str) -> Row:
    """One line -> one object, strictly: no NaN, no duplicate key, nothing after the object."""
    text = _decoded(data, position)
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise BadRow(position, "", "broken JSON", "Nest it less.", "The line is nested too deeply.") from None
    except json.JSONDecodeError as error:
        cut = " It has no line end: the file may be cut." if not data.endswith(b"\n") else ""
        detail = f"The line is no JSON at character {error.pos + 1} ({error.msg}).{cut}"
        raise BadRow(position, "", "broken JSON", "Write one JSON object per line.", detail) from None
    except ValueError as error:
        raise BadRow(
            position, "", "broken JSON", "Write it in strict JSON.", f"The line has {error}."
        ) from None
    if not isinstance(value, dict):
        detail = f"The line is a {type(value).__name__}, not an object."
        raise BadRow(position, "", "row is no object", "Write one JSON object per line.", detail)
    return value


def parse_csv(data: bytes, position: str, header: tuple[str, ...], delimiter: str) -> Row:
    text = _decoded(data, position)
    try:
        with long_cells():
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise BadRow(
            position, "", "broken CSV", "Quote the cell properly.", f"The row has {error}."
        ) from None
    if len(rows) != 1:  # a carriage return alone ends a record for this reader, too
        detail = f"The row holds {len(rows)} records: it has a carriage return outside of quotes."
        raise BadRow(position, "", "broken CSV", "Quote the cell, or end rows by a line feed.", detail)
    (cells,) = rows
    if len(cells) != len(header):
        detail = f"The row has {len(cells)} cells and the header {len(header)}."
        raise BadRow(position, "", "wrong number of cells", "Quote cells with delimiters in them.", detail)
    return dict(zip(header, cells, strict=True))


def empty_records(path: Path, parse: Callable[[bytes, str], Row]) -> Records:
    file = _unpacked(path) if path.suffix == ".gz" else path
    with file.open("rb") as stream:
        stamp = _stamp(stream.fileno())
    return Records(path.name, file, parse, stamp)


def _unpacked(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix="reflectvlm-", suffix=".rows")
    try:
        with gzip.open(path, "rb") as packed, open(handle, "wb") as plain:
            _copy(packed, plain, path)
    except (OSError, EOFError, zlib.error) as error:
        os.unlink(name)
        raise ValueError(f"{path} cannot be unpacked ({error}). Copy or pack it again.") from error
    except BaseException:
        os.unlink(name)
        raise
    # Not when the rows are dropped: a pickled copy of them may still read the file.
    atexit.register(_delete, name, os.getpid())
    return Path(name)


def _copy(packed: gzip.GzipFile, plain: IO[bytes], path: Path) -> None:
    least, times = _BOMB
    most = max(least, times * path.stat().st_size)
    size = 0
    while piece := packed.read(_PIECE):
        size += len(piece)
        if size > most:
            raise ValueError(
                f"{path} unpacks to more than {most:,} bytes, {times} times its size, which no rows do. "
                "Unpack it yourself if that is right."
            )
        plain.write(piece)


def _delete(name: str, owner: int) -> None:
    """Remove a temporary file when the process that made it ends, not when a forked worker does."""
    if os.getpid() == owner and os.path.exists(name):
        os.unlink(name)


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def after_bom(file: io.BufferedReader) -> int:
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    return start


def _decoded(data: bytes, position: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"Byte {error.start + 1} of the row is not valid UTF-8."
        raise BadRow(position, "", "invalid UTF-8", "Save the file as UTF-8.", detail) from None


def _no_constant(name: str) -> float:
    raise ValueError(f"the value {name}, which JSON does not have")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r} twice")
    return values


@dataclass
class Lines:
    """The lines of a file for `csv.reader`, and how far it has read. Latin-1 keeps every byte, and
    delimiters and quotes are ASCII, so invalid UTF-8 is found later, in its own row."""

    file: io.BufferedReader
    offset: int
    name: str
    number: int = 0
    begun: int = 0
    """Where the record that is being read begins."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline(LONGEST + 1)
        if not line:
            raise StopIteration
        self.offset += len(line)
        self.number += 1
        if self.offset - self.begun > LONGEST:
            # Without its end, nobody can say where the next row begins: stop.
            raise ValueError(
                f"{self.name}:{self.number}: the row that ends here has more than {LONGEST:,} bytes. "
                "Close its quote, or give each row its own line."
            )
        return line.decode("latin-1")


def csv_spans(lines: Lines, delimiter: str, name: str) -> Iterator[tuple[int, int, int]]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start, first = lines.offset, lines.number + 1
        lines.begun = start
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A stray quote swallows the rows after it, and nobody can say how many: stop.
            if lines.number > first:
                raise ValueError(
                    f"{name}:{first}: a quote opened here is not closed properly ({error}). "
                    f"Close it: up to line {lines.number}, rows cannot be told apart."
                ) from None
        else:
            if not cells:
                continue
        yield start, lines.offset, first


def header_of(data: bytes, delimiter: str, path: Path) -> tuple[str, ...]:
    try:
        text = io.StringIO(data.decode("utf-8"), newline="")
        cells, *more = csv.reader(text, delimiter=delimiter, strict=True)
        if more:
            raise csv.Error("it has a carriage return outside of quotes")
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"The header of {path} cannot be read ({error}). Save the file as UTF-8 CSV."
        ) from error
    if len(set(cells)) != len(cells) or "" in cells:
        raise ValueError(f"The header of {path} is {cells}. Every column needs a name of its own.")
    return tuple(cells)


@contextmanager
def long_cells() -> Iterator[None]:
    """The csv module refuses cells over 128 kB, for the whole process; base64 images are longer."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
