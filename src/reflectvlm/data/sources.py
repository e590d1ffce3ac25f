"""`dataset`: a user's files -> a checked `Dataset`. And the kinds of files there are.

    data = dataset("rows.jsonl", columns={"question": "problem"})
    data = dataset("lmms-lab/some-set", split="test", columns={"images": "image"})

Left out: streaming from the network, and mixtures of sources.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from reflectvlm.data.filtered import Dataset, OnBad, Rows, checked, unchecked
from reflectvlm.data.images import ImageLimits
from reflectvlm.data.records import open_csv, open_json_lines
from reflectvlm.data.rows import Columns, read_row
from reflectvlm.data.tables import ArrowRows, ParquetRows

PathLike: TypeAlias = str | os.PathLike[str]

_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")


class Source(Protocol):
    """Somewhere rows come from. `root` is the folder that image paths are relative to."""

    @property
    def root(self) -> Path: ...
    def open(self) -> Rows: ...


@dataclass(frozen=True, slots=True)
class JsonLines:
    """One JSON object per line, plain or `.gz`."""

    path: PathLike

    @property
    def root(self) -> Path:
        return Path(self.path).parent

    def open(self) -> Rows:
        return open_json_lines(_file(self.path))


@dataclass(frozen=True, slots=True)
class Csv:
    """A table as text with a header line, plain or `.gz`. Several images in one cell are a JSON list."""

    path: PathLike
    delimiter: str = ","

    @property
    def root(self) -> Path:
        return Path(self.path).parent

    def open(self) -> Rows:
        return open_csv(_file(self.path), self.delimiter)


@dataclass(frozen=True, slots=True)
class Parquet:
    """A Parquet file, or several in the order given."""

    path: PathLike | Sequence[PathLike]

    @property
    def paths(self) -> tuple[Path, ...]:
        several = [self.path] if isinstance(self.path, str | os.PathLike) else self.path
        return tuple(map(Path, several))

    @property
    def root(self) -> Path:
        return self.paths[0].parent

    def open(self) -> Rows:
        return ParquetRows([_file(path) for path in self.paths])


@dataclass(frozen=True, slots=True)
class HuggingFace:
    """A data set of the `datasets` library: saved by `save_to_disk`, a folder it can load, or the
    name of one on the Hub."""

    path: PathLike
    split: str | None = None
    subset: str | None = None

    @property
    def root(self) -> Path:
        if Path(self.path).exists():
            return Path(self.path)
        import datasets

        # Files that came with a data set of the Hub lie in the library's cache.
        return Path(datasets.config.HF_CACHE_HOME)

    def open(self) -> Rows:
        import datasets

        loaded = self._load()
        if isinstance(loaded, datasets.DatasetDict | datasets.IterableDatasetDict):
            if self.split not in loaded:
                known = ", ".join(map(str, loaded))
                raise ValueError(f"{self.path} has no split {self.split!r}. Choose one: {known}.")
            loaded = loaded[self.split]
        elif self.split is not None and str(loaded.split or self.split) != self.split:
            raise ValueError(
                f"{self.path} holds the split '{loaded.split}', not {self.split!r}. Leave it out."
            )
        name = Path(self.path).name
        return ArrowRows(loaded, f"{name}[{self.split}]" if self.split else name)

    def _load(self) -> Any:
        import datasets

        try:
            if any((Path(self.path) / name).exists() for name in _SAVED):
                return datasets.load_from_disk(os.fspath(self.path))
            return datasets.load_dataset(os.fspath(self.path), self.subset)
        except Exception as error:  # boundary: loaders and their network raise anything
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise ValueError(
                f"'{self.path}' is no file or folder here, and `datasets` cannot load it ({why}). "
                "Check the spelling, or the connection."
            ) from error


def dataset(
    path: PathLike | Source,
    *,
    split: str | None = None,
    subset: str | None = None,
    columns: Columns | Mapping[str, Any] | None = None,
    limits: ImageLimits | Mapping[str, Any] | None = None,
    root: PathLike | None = None,
    on_bad: OnBad = "skip",
    max_bad: float = 0.05,
    max_rows: int | None = None,
    check: bool = True,
) -> Dataset:
    """Open a source, check its rows, and say what was kept.

    Args:
        path: a `.jsonl`, `.csv`, `.tsv` (each also `.gz`) or `.parquet` file; a folder of them; a
            folder written by `datasets`; the name of a data set on the Hub; or a source object.
        split, subset: for a folder or the Hub.
        columns: which column holds what.
        limits: what an image may cost.
        root: the folder image paths are relative to and may not leave; default: the file's own.
        on_bad: "error" stops at the first bad row, "skip" leaves it out and reports it.
        max_bad: with "skip", the largest share of bad rows; more is an error.
        max_rows: only the first rows of the source, good or bad.
        check: False skips the scan: a bad row then raises when it is reached, duplicates of an id
            go unseen, and `on_bad` must be "error".
    """
    _check_options(on_bad, max_bad, max_rows, check)
    source = pick(path, split, subset) if isinstance(path, str | os.PathLike) else path
    if source is path and (split or subset):
        raise ValueError("split and subset belong into the source object. Give them there.")
    columns = columns if isinstance(columns, Columns) else Columns(**(columns or {}))
    limits = limits if isinstance(limits, ImageLimits) else ImageLimits(**(limits or {}))
    rows = source.open()
    folder = Path(root) if root is not None else source.root
    read = partial(read_row, columns=columns, limits=limits, root=folder)
    count = len(rows) if max_rows is None else min(max_rows, len(rows))
    if not check:
        return unchecked(rows, read, count)
    return checked(rows, read, count, columns, on_bad, max_bad)


def pick(path: PathLike, split: str | None = None, subset: str | None = None) -> Source:
    """The source for a path, by its suffix or by what lies in the folder."""
    here = Path(path)
    if here.is_dir():
        return _of_folder(here, split, subset)
    name = here.name.lower()
    if name.endswith(_SUFFIXES):
        if split or subset:
            raise ValueError(f"'{path}' is one file and has no split or subset. Leave them out.")
        return _of_file(here)
    text = os.fspath(path)
    if not here.exists() and not text.startswith((".", "/", "~")) and text.count("/") <= 1:
        return HuggingFace(text, split, subset)
    problem = "is of no known kind" if here.exists() else "does not exist"
    raise ValueError(
        f"'{path}' {problem}. Give a folder, a name on the Hub, or one of {', '.join(_SUFFIXES)}."
    )


def _of_file(path: Path) -> Source:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return JsonLines(path)
    if name.endswith(".parquet"):
        return Parquet(path)
    return Csv(path, "\t" if name.endswith(".tsv") else ",")


def _of_folder(folder: Path, split: str | None, subset: str | None) -> Source:
    """`train.jsonl`, or the shards `train-00000-of-00002.parquet …`; else `datasets` may know it."""
    if any((folder / name).exists() for name in _SAVED):
        if subset:
            raise ValueError(f"'{folder}' was saved without subsets. Leave subset={subset!r} out.")
        return HuggingFace(folder, split)
    files = sorted(file for file in folder.iterdir() if file.name.lower().endswith(_SUFFIXES))
    if subset or not files:
        return HuggingFace(folder, split, subset)
    if split is not None:
        wanted = [file for file in files if file.name.split(".")[0].split("-")[0] == split]
    else:
        wanted = files
    if wanted and all(file.suffix == ".parquet" for file in wanted):
        return Parquet(wanted)
    if len(wanted) == 1:
        return _of_file(wanted[0])
    found = ", ".join(file.name for file in files[:8])
    raise ValueError(
        f"'{folder}' has {len(wanted)} files for split={split!r}. Name one split or file of: {found}."
    )


def _file(path: PathLike) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"'{path}' is not a file. Check the path; it is taken from {Path.cwd()}.")
    return Path(path)


def _check_options(on_bad: str, max_bad: float, max_rows: int | None, check: bool) -> None:
    if on_bad not in ("skip", "error"):
        raise ValueError(f"on_bad is {on_bad!r}. It must be 'skip' or 'error'.")
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad is {max_bad}. It is a share of the rows, between 0 and 1.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}. It must be at least 1, or None for all.")
    if not check and on_bad != "error":
        raise ValueError("check=False cannot skip bad rows: they are not known. Set on_bad='error'.")
