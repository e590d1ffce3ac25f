"""The files of a cache of prompts: shards of Arrow rows, what each holds, and what all were made with.

    cache.json          what decides the prompts, and, when it is complete, how many rows there are
    shard-00000.arrow   rows: id, question, answer, ids, images, columns (JSON)
    shard-00000.json    how many rows of the source it covers, which could not be used, and their digest

`ids` are the prompt's tokens; -1 - k stands for image k. An image is its pixels after the image processor's
resizing, 3 bytes each: cut into patches and normalised it would take 8 times as much, and that part is quick.
A shard is there when it is whole: both files are written under other names and renamed, the rows last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
CARD = "cache.json"
BATCH = 32
"""Rows of a record batch: one is read to get any of its rows."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What a finished shard holds."""

    walked: int
    """Rows of the source that it covers, good and bad."""
    rows: int
    """Rows in it."""
    digest: str
    """Of the content of all rows that it covers."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""


@dataclass(frozen=True, kw_only=True)
class CacheCard:
    """What a cache was made with."""

    settings: Mapping[str, str]
    shard_rows: int
    source: str
    columns: str
    """The columns of the rows, as `Columns` prints."""
    complete: bool = False
    shards: int = 0
    rows: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> CacheCard | None:
        """None: there is no cache. Raises ValueError for one that this version cannot read."""
        path = folder / CARD
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text("utf-8"))
            if found.get("format") != FORMAT:
                raise ValueError(f"format {found.get('format')}, and this version reads {FORMAT}")
            return cls(**found)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}). Make the cache again in a new folder."
            ) from None

    def write(self, folder: Path) -> None:
        write_whole(folder / CARD, json.dumps(asdict(self), indent=1) + "\n")

    def differences(self, settings: Mapping[str, str]) -> list[str]:
        """The parts that are not those of the cache."""
        names = sorted({*self.settings, *settings})
        return [name for name in names if self.settings.get(name) != settings.get(name)]


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.arrow"


def read_shard(folder: Path, number: int) -> Shard | None:
    """None: it is not finished."""
    path = shard_path(folder, number)
    about = path.with_suffix(".json")
    if not path.is_file() or not about.is_file():
        return None
    try:
        return Shard(**json.loads(about.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{about} cannot be read ({error}). Delete it, and the cache is mended.") from None


def finish_shard(folder: Path, number: int, shard: Shard, written: Path) -> None:
    path = shard_path(folder, number)
    write_whole(path.with_suffix(".json"), json.dumps(asdict(shard)) + "\n")
    with written.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(written, path)
    _sync_folder(folder)


def write_whole(path: Path, text: str) -> None:
    """All of it or nothing, whenever the process ends."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def schema() -> Any:
    import pyarrow as pa

    image = pa.struct([("width", pa.int32()), ("height", pa.int32()), ("pixels", pa.large_binary())])
    return pa.schema(
        [
            ("id", pa.string()),
            ("question", pa.string()),
            ("answer", pa.string()),
            ("ids", pa.list_(pa.int32())),
            ("images", pa.list_(image)),
            ("columns", pa.string()),
        ]
    )
