"""`stream`: the rows of a source one after the other, however many there are, in flat memory.

`dataset()` keeps the place of every row, so that any may be asked for; whoever only walks through (`data
check`, `mix`, `to-hub`, `cache`) needs no places. A row is named and read as `dataset()` names and reads it:
the same parsers, the same limits. Left out: shuffling, which needs places.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from reflectvlm.data.records import (
    LONGEST,
    Lines,
    Records,
    after_bom,
    csv_spans,
    empty_records,
    header_of,
    long_cells,
    parse_csv,
    parse_json,
)
from reflectvlm.data.rows import BadRow, Row
from reflectvlm.data.sources import Csv, JsonLines, Parquet, Source
from reflectvlm.data.tables import json_columns, with_json

Placed: TypeAlias = tuple[str, Row | BadRow]
"""A row's place, as `rows.jsonl:17`, and the row, or why it cannot be read."""

_PIECE = 2**20
_BATCH = 64


@dataclass
class Seen:
    """What a walk through a file met beside its rows; it grows while the walk goes on."""

    blank: int = 0
    """Blank lines, which are no rows."""
    bom: bool = False
    """The file begins with a byte order mark, which is passed over."""
    crlf: int = 0
    """Lines that end as on Windows."""
    cut: bool = False
    """The last line has no end."""
    bytes: int = 0
    """How far the walk has come."""


def stream(source: Source, seen: Seen | None = None) -> Iterator[Placed]:
    """Every row of a source with its place, in order.

    Example: `for place, row in stream(JsonLines("rows.jsonl")): …`
    """
    seen = seen if seen is not None else Seen()
    if isinstance(source, JsonLines):
        return _json_lines(_existing(Path(source.path)), seen)
    if isinstance(source, Csv):
        return _csv(_existing(Path(source.path)), source.delimiter, seen)
    if isinstance(source, Parquet):
        return _parquet(source, seen)
    return _by_number(source)


def _json_lines(path: Path, seen: Seen) -> Iterator[Placed]:
    records = empty_records(path, parse_json)
    name = records.name
    with records.file.open("rb") as file:
        seen.bytes = after_bom(file)
        seen.bom = seen.bytes > 0
        number = 0
        while line := file.readline(_PIECE):
            number += 1
            begun, whole = seen.bytes, line.endswith(b"\n")
            seen.bytes += len(line)
            if not whole and len(line) == _PIECE:
                line, length = _rest(file, line, begun)
                seen.bytes, whole = begun + length, line.endswith(b"\n")
            if not line:
                yield f"{name}:{number}", _too_large(f"{name}:{number}", seen.bytes - begun)
                continue
            if line.isspace():
                seen.blank += 1
                continue
            seen.crlf += line.endswith(b"\r\n")
            seen.cut = not whole
            yield _parsed(records, line, f"{name}:{number}")


def _rest(file: io.BufferedReader, line: bytes, begun: int) -> tuple[bytes, int]:
    """A line longer than a piece, and its length; without its bytes if it is longer than a row may be. Its
    end is looked for first, so that a file without line ends fills no memory."""
    length = len(line)
    while piece := file.readline(_PIECE):
        length += len(piece)
        if piece.endswith(b"\n"):
            break
    if length > LONGEST:
        return b"", length
    file.seek(begun)
    return file.read(length), length


def _csv(path: Path, delimiter: str, seen: Seen) -> Iterator[Placed]:
    records = empty_records(path, parse_json)
    with records.file.open("rb") as file, records.file.open("rb") as again:
        start = after_bom(file)
        seen.bom = start > 0
        spans = _with_long_cells(csv_spans(Lines(file, start, path.name), delimiter, path.name))
        first = next(spans, None)
        if first is None:
            raise ValueError(f"{path} has no header line. The first line must name the columns.")
        again.seek(first[0])
        header = header_of(again.read(first[1] - first[0]), delimiter, path)
        parse = partial(parse_csv, header=header, delimiter=delimiter)
        for begin, end, number in spans:
            again.seek(begin)
            line = again.read(end - begin)
            seen.bytes = end
            seen.crlf += line.endswith(b"\r\n")
            seen.cut = not line.endswith(b"\n")
            position = f"{records.name}:{number}"
            try:
                yield position, parse(line, position)
            except BadRow as bad:
                yield position, bad


def _with_long_cells(spans: Iterator[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """The csv module's limit is the process's: it is lifted while a span is looked for, and no longer."""
    while True:
        with long_cells():
            span = next(spans, None)
        if span is None:
            return
        yield span


def _parquet(source: Parquet, seen: Seen) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    for path in source.paths:
        rows = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                texts = json_columns(file.schema_arrow)
                for batch in file.iter_batches(batch_size=_BATCH):
                    for row in batch.to_pylist():
                        rows += 1
                        yield _with_json(row, texts, f"{path.name}:{rows}")
                    seen.bytes += batch.nbytes
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
            # Which row it is, and which can still be read, the reader by number says.
            yield from _by_number(Parquet(path), rows)


def _with_json(row: dict[str, Any], names: Sequence[str], position: str) -> Placed:
    try:
        return position, with_json(row, names, position)
    except BadRow as bad:
        return position, bad


def _by_number(source: Source, start: int = 0) -> Iterator[Placed]:
    rows = source.open()
    for index in range(start, len(rows)):
        position = rows.position(index)
        try:
            yield position, rows[index]
        except BadRow as bad:
            yield position, bad


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"'{path}' is not a file. Check the path; it is taken from {Path.cwd()}.")
    return path


def _parsed(records: Records, line: bytes, position: str) -> Placed:
    try:
        return position, records.parse(line, position)
    except BadRow as bad:
        return position, bad


def _too_large(position: str, length: int) -> BadRow:
    detail = f"The row has {length:,} bytes, and {LONGEST:,} are read."
    return BadRow(position, "", "row too large", "Give each row its own line; name images by paths.", detail)
