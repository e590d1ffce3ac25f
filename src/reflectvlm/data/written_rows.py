"""Writers of plain rows: JSON lines, and Parquet with images inside as the hub's `Image` feature stores them.

A Parquet column has one kind. Columns of texts, numbers or truth values, and lists of one of these, are
written as such. Any other column (objects, mixed kinds) is JSON text, and marked so in the file, so that
`dataset()` gives back what was there; others see the text. A column that a row lacks is null there.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from PIL import Image

from reflectvlm.curate.types import Question
from reflectvlm.data.fetch import BadImage, ImageLimits, RowImage, fetch
from reflectvlm.data.rows import BadRow
from reflectvlm.data.tables import AS_JSON

Kind: TypeAlias = Literal[
    "string", "bool", "int64", "double", "list string", "list int64", "list double", "json"
]
CORE = ("id", "question", "answer", "images")
_GROUP = 100
"""Rows of a row group: random access reads one."""
_EXACT = 2**53
"""Whole numbers above it are not numbers of a `double`."""


def columns_of(question: Question) -> dict[str, Any]:
    """What stands in a row beside the plain parts; the name of where it comes from is a column, too:
    `source`, or `mixed_from` where the row has a `source` of its own."""
    found = dict(question.columns)
    if question.source:
        found["mixed_from" if "source" in found else "source"] = question.source
    if clash := [name for name in CORE if name in found]:
        detail = f"Column '{clash[0]}' would stand twice."
        raise BadRow(question.id, clash[0], "column twice", f"Rename '{clash[0]}' in the source.", detail)
    return found


def image_bytes(value: RowImage, question: Question, limits: ImageLimits) -> dict[str, Any]:
    """The encoded file as it is, with its name; a decoded image as PNG. Raises BadRow."""
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}
    try:
        data = fetch(value, question.root, limits)
    except BadImage as bad:
        detail = f"Image {bad.value} {bad.rule}."
        raise BadRow(question.id, "images", bad.reason, bad.remedy, detail) from None
    path = value.get("path") if isinstance(value, Mapping) else value
    named = isinstance(path, str | os.PathLike) and "://" not in str(path)[:16] and str(path)[:5] != "data:"
    return {"bytes": data, "path": os.path.basename(str(path)) if named and path else None}


def data_url(record: Mapping[str, Any]) -> str:
    return "data:image;base64," + base64.b64encode(record["bytes"]).decode()


@dataclass
class Kinds:
    """The kind of each column, from all of its values."""

    found: dict[str, Kind | None] = field(default_factory=dict)

    def add(self, columns: Mapping[str, Any]) -> None:
        for name, value in columns.items():
            before = self.found.get(name)
            if name not in self.found:
                self.found[name] = before = None
            if value is not None and before != "json":
                self.found[name] = _joined(before, kind_of(value))

    def final(self) -> dict[str, Kind]:
        """Columns of nothing but nulls hold texts."""
        return {name: kind or "string" for name, kind in self.found.items()}


def kind_of(value: Any) -> Kind:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, str):
        return "string"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, float):
        return "double"
    if isinstance(value, list) and value:
        inner: Kind | None = None
        for one in value:
            inner = _joined(inner, kind_of(one))
        if inner == "string":
            return "list string"
        if inner == "int64":
            return "list int64"
        if inner == "double":
            return "list double"
    return "json"


def _joined(one: Kind | None, other: Kind) -> Kind:
    """1 and 2.5 are numbers; but a number that came as 1 must come back as 1, so they are JSON together."""
    return other if one is None or one == other else "json"


class ParquetFile:
    """One Parquet file that is being written, rows a group at a time."""

    def __init__(self, path: Path, schema: Any) -> None:
        import pyarrow.parquet

        self._schema, self._waiting = schema, list[dict[str, Any]]()
        self._writer = pyarrow.parquet.ParquetWriter(path, schema, compression="zstd")
        self.rows = self.bytes = 0

    def add(self, row: dict[str, Any], size: int) -> None:
        self._waiting.append(row)
        self.rows += 1
        self.bytes += size
        if len(self._waiting) >= _GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow

        if self._waiting:
            self._writer.write_table(pyarrow.Table.from_pylist(self._waiting, schema=self._schema))
            self._waiting.clear()


def features_of(kinds: Mapping[str, Kind], images: bool = True) -> Any:
    """As the `datasets` library describes them."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    values = {
        "json": Value("string"),
        **{name: Value(name) for name in ("string", "bool", "int64")},
        "double": Value("float64"),
        "list string": List(Value("string")),
        "list int64": List(Value("int64")),
        "list double": List(Value("float64")),
    }
    core: dict[str, Any] = {name: Value("string") for name in CORE if name != "images"}
    if images:
        core["images"] = List(ImageFeature())
    return Features({**core, **{name: values[kind] for name, kind in kinds.items()}})


def schema_of(kinds: Mapping[str, Kind], images: bool = True) -> Any:
    """The schema with the hub's description, and a mark at columns of JSON text."""
    schema = features_of(kinds, images).arrow_schema
    for name, kind in kinds.items():
        if kind == "json":
            place = schema.get_field_index(name)
            schema = schema.set(place, schema.field(place).with_metadata(AS_JSON))
    return schema


def table_row(
    question: Question, columns: Mapping[str, Any], kinds: Mapping[str, Kind], images: Iterable[Any] | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"id": question.id, "question": question.question, "answer": question.answer}
    if images is not None:
        row["images"] = list(images)
    for name, kind in kinds.items():
        value = columns.get(name)
        row[name] = as_json(value, question, name) if kind == "json" and value is not None else value
    return row


def as_json(value: Any, question: Question, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        detail = f"Column '{name}' holds what JSON cannot ({error})."
        raise BadRow(question.id, name, "no JSON", "Change or remove the column.", detail) from None


def write_line(file: IO[str], question: Question, columns: Mapping[str, Any], images: list[Any]) -> None:
    row = {"id": question.id, "question": question.question, "answer": question.answer, "images": images}
    file.write(as_json({**row, **columns}, question, "row") + "\n")
