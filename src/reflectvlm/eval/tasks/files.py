"""Where a benchmark's files are, and their rows: JSON, JSON lines, tables, and what the hub serves.

A benchmark looks for its files below `data_dir`, in the forms its authors and the hub give them. Where
there is none, `missing` says what to fetch and where to put it; no benchmark is downloaded. Images that its
rows name by web address alone, as MMHal-Bench's may, are fetched when they are asked about.

Images of tables stay in the table until a question is asked (`StoredImage`): the test set of TallyQA holds
several gigabytes of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectvlm.data.fetch import BadImage
from reflectvlm.data.filtered import Rows
from reflectvlm.data.rows import BadRow, Row
from reflectvlm.eval.types import MissingData

_ASIDE = re.compile(r"; | \(or ")
"""Where the first files that a way names end."""
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")


def first(data_dir: Path, *names: str) -> Path | None:
    """The first of these files or folders that is there; none as it is spelt, one whose first part is spelt
    in other capitals."""
    exact = (data_dir / name for name in names if (data_dir / name).exists())
    return next(exact, None) or next((path for name in names for path in _in_any_case(data_dir, name)), None)


def folders(data_dir: Path, *names: str) -> list[Path]:
    """Those of these folders that are there, in whatever capitals."""
    found = [data_dir / name for name in names if (data_dir / name).is_dir()]
    found += [path for name in names for path in _in_any_case(data_dir, name) if path.is_dir()]
    return list(dict.fromkeys(found))


def _in_any_case(data_dir: Path, name: str) -> list[Path]:
    head, *rest = Path(name).parts
    there = sorted(data_dir.iterdir()) if data_dir.is_dir() else []
    same = [path.joinpath(*rest) for path in there if path.name.lower() == head.lower()]
    return [path for path in same if path.exists()]


def missing(title: str, data_dir: Path, *ways: str) -> MissingData:
    """Each way: what to fetch, and the files it then is, e.g. `from …: mathvista/testmini.json, …`."""
    lines = "".join(f"\n- {way}" for way in ways)
    source, _, files = ways[0].partition(": ")
    return MissingData(
        f"{title} is not in {data_dir}. Give data_dir=…, or put it there "
        f"{'in one of these ways' if len(ways) > 1 else 'in this way'}:{lines}",
        short=f"fetch {source}, as {_ASIDE.split(files)[0]}",
    )


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:  # also what is no UTF-8
        raise ValueError(f"{path} is no readable JSON ({error}). Fetch the file again.") from None


def json_rows(path: Path) -> list[dict[str, Any]]:
    """A list of objects; or an object of objects, as `{"1": {...}}`; or, in `.jsonl`, one object per line."""
    if path.suffix == ".jsonl":
        lines = path.read_text("utf-8-sig").split("\n")
        rows = [_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        found = read_json(path)
        rows = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no list of objects. Fetch the file again.")
    return rows


def _line(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no readable JSON ({error}). Fetch the file again.") from None


def table_rows(path: Path) -> list[Row]:
    """Rows of a `.tsv` file with a header line."""
    from reflectvlm.data.records import open_csv

    rows = open_csv(path, "\t")
    return [rows[index] for index in range(len(rows))]


def hub_rows(folder: Path, split: str, subset: str | None = None) -> list[Row] | None:
    """Rows of a data set of the hub: a downloaded folder with Parquet files, or one of `save_to_disk`.
    None: the folder holds no such thing."""
    if any((folder / name).exists() for name in _SAVED):
        return _lazy(_saved(folder, split))
    paths = _parquet_files(folder, split, subset)
    if not paths:
        return None
    from reflectvlm.data.tables import ParquetRows

    return _lazy(ParquetRows(paths))


def _parquet_files(folder: Path, split: str, subset: str | None) -> list[Path]:
    """`testmini-00000-of-00002.parquet`, `testmini.parquet` or `testmini/0000.parquet`, at any depth."""

    def belongs(path: Path) -> bool:
        around = path.relative_to(folder).parts[:-1]
        named = path.name.split(".")[0].split("-")[0] == split or split in around[-1:]
        return named and (subset is None or subset in around)

    return sorted(path for path in folder.rglob("*.parquet") if belongs(path)) if folder.is_dir() else []


def _saved(folder: Path, split: str) -> Rows:
    from reflectvlm.data.sources import HuggingFace

    return HuggingFace(folder, split).open()


def _lazy(rows: Rows) -> list[Row]:
    """The rows with their images left where they are."""
    return [_without_bytes(rows[index], rows, index) for index in range(len(rows))]


def _without_bytes(row: Row, rows: Rows, index: int) -> Row:
    return {name: _stored(value, rows, index, name) for name, value in row.items()}


def _stored(value: Any, rows: Rows, index: int, column: str) -> Any:
    if _is_image(value):
        return StoredImage(rows, index, column)
    if isinstance(value, list) and value and all(map(_is_image, value)):
        return [StoredImage(rows, index, column, place) for place in range(len(value))]
    return value


def _is_image(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"bytes", "path"} and value["bytes"] is not None


@dataclass(frozen=True, eq=False)
class StoredImage(Mapping[str, Any]):
    """The record `{"bytes", "path"}` of an image that is read from its table whenever it is asked for."""

    rows: Rows
    index: int
    column: str
    place: int | None = None
    """In a column of lists."""

    def __getitem__(self, key: str) -> Any:
        if key not in ("bytes", "path"):
            raise KeyError(key)
        try:
            value = self.rows[self.index][self.column]
        except BadRow as bad:
            raise BadImage("unreadable image", f"of row {bad.position}", bad.detail, bad.remedy) from None
        return (value if self.place is None else value[self.place])[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("bytes", "path"))

    def __len__(self) -> int:
        return 2


def unique(names: Sequence[str]) -> list[str]:
    """The names, each only once: one that is empty or was there before gets its place behind it."""
    seen: set[str] = set()
    kept = []
    for place, name in enumerate(names, 1):
        while not name or name in seen:
            name = f"{name}#{place}"
        seen.add(name)
        kept.append(name)
    return kept
