"""Rows of Arrow tables: Parquet files, and data sets of the `datasets` library.

Images stay what the table stores, encoded bytes or a path: `datasets` would decode them itself,
without our limits and without a way past a broken one.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reflectvlm.data.rows import BadRow, Row

AS_JSON = {"reflectvlm": "json"}
"""Metadata of a column whose texts are JSON: it held objects, or values of several kinds, and does so again
when it is read here."""
_CACHE_BYTES = 512 * 2**20


def json_columns(schema: Any) -> tuple[str, ...]:
    """The columns of an Arrow schema that are marked `AS_JSON`."""
    (key, mark), *_ = AS_JSON.items()
    return tuple(
        one.name for one in schema if one.metadata and one.metadata.get(key.encode()) == mark.encode()
    )


def with_json(row: dict[str, Any], names: Sequence[str], position: str) -> dict[str, Any]:
    """The row with the values of those columns. Raises BadRow."""
    for name in names:
        if row[name] is not None:
            try:
                row[name] = json.loads(row[name])
            except (ValueError, RecursionError):
                raise BadRow(position, name, "broken JSON", "Write the table again.") from None
    return row


class ParquetRows:
    """Rows of one or more Parquet files, read a row group at a time.

    The groups used last stay in memory, up to half a gigabyte or one group. Random access over a
    larger file reads a group per row: write small groups (100 rows with images is usual).
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._groups: list[tuple[Path, int, int, int]] = []  # file, group, its first row there, bytes
        self._starts: list[int] = []
        self._total = 0
        self._cache: OrderedDict[int, Any] = OrderedDict()
        for path in self._paths:
            self._index(path)

    def __reduce__(self) -> tuple[type[ParquetRows], tuple[tuple[Path, ...]]]:
        return ParquetRows, (self._paths,)

    def __len__(self) -> int:
        return self._total

    def position(self, index: int) -> str:
        number = bisect_right(self._starts, index) - 1
        path, _, first, _ = self._groups[number]
        return f"{path.name}:{first + index - self._starts[number] + 1}"

    def __getitem__(self, index: int) -> Row:
        import pyarrow

        number = bisect_right(self._starts, index) - 1
        try:
            table = self._group(number)
            row: dict[str, Any] = table.slice(index - self._starts[number], 1).to_pylist()[0]
        except UnicodeDecodeError:
            raise BadRow(self.position(index), "", "invalid UTF-8", "Write the text as UTF-8.") from None
        except (pyarrow.ArrowException, OSError) as error:
            detail = f"Its row group cannot be read ({str(error).splitlines()[0][:120]})."
            raise BadRow(self.position(index), "", "broken Parquet", "Copy the file again.", detail) from None
        return with_json(row, json_columns(table.schema), self.position(index))

    def _index(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        try:
            metadata = pyarrow.parquet.read_metadata(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no readable Parquet file ({error}). Copy it again.") from error
        first = 0
        for group in range(metadata.num_row_groups):
            part = metadata.row_group(group)
            # An empty group shares its start with the next one; bisect_right finds the later of the two.
            self._groups.append((path, group, first, part.total_byte_size))
            self._starts.append(self._total)
            first += part.num_rows
            self._total += part.num_rows

    def _group(self, number: int) -> Any:
        import pyarrow.parquet

        if number not in self._cache:
            path, group, _, size = self._groups[number]
            while self._cache and size + sum(self._groups[n][3] for n in self._cache) > _CACHE_BYTES:
                self._cache.popitem(last=False)
            with pyarrow.parquet.ParquetFile(path) as file:
                self._cache[number] = file.read_row_group(group)
        self._cache.move_to_end(number)
        return self._cache[number]


class ArrowRows:
    """Rows of a `datasets.Dataset`, undecoded; class labels by their names."""

    def __init__(self, table: Any, name: str) -> None:
        features = table.features or {}
        self._names = {key: value.names for key, value in features.items() if hasattr(value, "int2str")}
        self._table, self._name = table.with_format("arrow"), name

    def __len__(self) -> int:
        return len(self._table)

    def position(self, index: int) -> str:
        return f"{self._name}:{index + 1}"

    def __getitem__(self, index: int) -> Row:
        row: dict[str, Any] = self._table[index].to_pylist()[0]
        for key, names in self._names.items():
            # -1 stands for "no label"
            if row[key] is not None:
                row[key] = names[row[key]] if row[key] >= 0 else None
        return row
