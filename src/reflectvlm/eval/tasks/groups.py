"""Rows that count together: all questions of an image, all rotations of a question, all of a category."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from reflectvlm.data.rows import Row
from reflectvlm.eval.types import Item, Mark

_SHORTEST_IMAGE = 64


def grouped(items: Sequence[Item], marks: Sequence[Mark], column: str) -> dict[str, list[tuple[Item, Mark]]]:
    """Rows by a column of their item, in the order in which its values come."""
    groups: dict[str, list[tuple[Item, Mark]]] = {}
    for item, mark in zip(items, marks, strict=True):
        groups.setdefault(str(item.columns[column]), []).append((item, mark))
    return groups


def all_right(marks: Iterable[Mark]) -> float | None:
    """1 if all are right, 0 as soon as one is wrong, None while that hangs on one that is not scored."""
    values = [mark.value for mark in marks]
    if any(value is not None and value < 1 for value in values):
        return 0.0
    return None if None in values else 1.0


def of(column: str) -> Callable[[Item], list[str]]:
    """For `figures.accuracies`: an item's group by one of its columns; none where that is empty."""

    def groups(item: Item) -> list[str]:
        value = str(item.columns.get(column, ""))
        return [value] if value else []

    return groups


def cell(row: Row, column: str) -> str:
    """A cell as text. Empty for none, and for the NaN that writers of tables leave in an empty cell, which
    becomes the text "nan" in a column of texts."""
    value = row.get(column)
    shown = "" if value is None else str(value)
    return "" if shown == "nan" else shown


def row_index(row: Row) -> int:
    """Of a row of VLMEvalKit's tables."""
    return int(float(row["index"]))


def images_by_index(rows: Iterable[Row]) -> dict[int, Any]:
    return {row_index(row): row.get("image") for row in rows}


def shared_image(row: Row, images: Mapping[int, Any]) -> Any:
    """The image cell of a row of VLMEvalKit's tables, which may name another row that has its image."""
    value = row.get("image")
    if isinstance(value, str) and len(value) <= _SHORTEST_IMAGE and value.strip().isdecimal():
        return images.get(int(value), value)
    return value


def stored_image(value: object) -> object:
    """What a table's image cell is to `load_image`: base64 text becomes a data URL, which says so.

    An empty cell stays an image, one that is missing: without any, the question would be asked blindly.
    """
    if isinstance(value, str) and value and not value.startswith("data:"):
        return f"data:image/unknown;base64,{value}"
    return value or {"bytes": None, "path": None}
