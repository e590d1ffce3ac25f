"""Small made-up data of benchmarks in the forms of their authors and of the Hub, and replies to it."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from reflectvlm.data.images import load_image
from reflectvlm.eval.types import Item, Mark, Reply


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, format="PNG")
    return file.getvalue()


def record(colour: str = "red") -> dict[str, Any]:
    """As the Hub stores an image."""
    return {"bytes": png(colour), "path": None}


def b64(colour: str = "red") -> str:
    return base64.b64encode(png(colour)).decode()


def parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)


def saved(folder: Path, split: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """What `save_to_disk` writes."""
    import datasets

    made = datasets.Dataset.from_list([dict(row) for row in rows])
    datasets.DatasetDict({split: made}).save_to_disk(folder)


def tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def image(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(colour))


def colour_of(item: Item, number: int = 0) -> tuple[int, int, int]:
    """Of the upper left pixel of one of its images, read as evaluation reads it."""
    found = load_image(item.images[number], item.root).getpixel((0, 0))
    assert isinstance(found, tuple)
    return found  # type: ignore[return-value]


RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


def item(answer: str = "", **given: Any) -> Item:
    return Item(**{"id": "1", "question": "?", "answer": answer, **given})


def replies(items: Sequence[Item], *texts: str) -> list[Reply]:
    return [Reply(item=one, text=text) for one, text in zip(items, texts, strict=True)]


def values(marks: Sequence[Mark]) -> list[float | None]:
    return [mark.value for mark in marks]
