"""`Published`: a folder of Parquet shards with the images inside, and a data card, as the hub takes it.

Two walks: the first finds the kind of each column and the figures of the card, the second writes. A shard is
closed when its images and texts reach `shard_mb`. Nothing of it is visible under its name before it is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from reflectvlm.curate.types import Question
from reflectvlm.data.data_card import Card, card_text
from reflectvlm.data.images import ImageLimits
from reflectvlm.data.written_rows import (
    Kind,
    Kinds,
    ParquetFile,
    columns_of,
    features_of,
    image_bytes,
    schema_of,
    table_row,
)

Rows = Callable[[], Iterator[Question]]
"""Begins the rows anew; both walks must see the same."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Example: `Published(title="My traces")(lambda: questions("rows.jsonl"), Path("folder"))`"""

    title: str
    split: str = "train"
    shard_mb: int = 500
    limits: ImageLimits = field(default_factory=ImageLimits)
    contamination: str | None = None
    """What was found in common with evaluation sets, for the card; None: that nobody looked."""

    def __post_init__(self) -> None:
        if self.shard_mb < 1:
            raise ValueError(f"shard_mb is {self.shard_mb}. It must be at least 1.")
        if not self.split.isidentifier():
            raise ValueError(f"split is {self.split!r}. It must be a name such as train.")

    def __call__(self, rows: Rows, folder: Path) -> Card:
        if folder.exists():
            raise ValueError(f"out={folder} exists. Name a new folder, or delete it.")
        if not folder.parent.is_dir():
            raise ValueError(f"out={folder} lies in no folder. Make {folder.parent} first.")
        card = Card()
        kinds = Kinds()
        for row in rows():
            columns = columns_of(row)
            kinds.add(columns)
            card.add(row, columns)
        hidden = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        try:
            self._shards(rows, hidden, kinds.final(), card)
            text = card_text(
                self.title, self.split, card, features_of(kinds.final()), kinds.final(), self.contamination
            )
            (hidden / "README.md").write_text(text, encoding="utf-8")
            os.rename(hidden, folder)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        return card

    def _shards(self, rows: Rows, folder: Path, kinds: dict[str, Kind], card: Card) -> None:
        schema = schema_of(kinds)
        files: list[Path] = []
        shard: ParquetFile | None = None
        written = 0
        try:
            for row in rows():
                if shard is None:
                    files.append(folder / f"{self.split}-{len(files):05d}.parquet")
                    shard = ParquetFile(files[-1], schema)
                images = [image_bytes(value, row, self.limits) for value in row.images]
                size = sum(len(image["bytes"]) for image in images) + len(row.question) + len(row.answer)
                shard.add(table_row(row, columns_of(row), kinds, images), size)
                card.image_bytes += size
                written += 1
                if shard.bytes >= self.shard_mb * 2**20:
                    shard.close()
                    shard = None
        finally:
            if shard is not None:
                shard.close()
        if written != card.rows:
            raise ValueError(
                f"The rows changed while they were written: {card.rows:,}, then {written:,}. Try again."
            )
        for number, file in enumerate(files):
            file.rename(folder / f"{self.split}-{number:05d}-of-{len(files):05d}.parquet")
        card.shards = len(files)
