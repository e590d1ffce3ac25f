"""`reflectvlm data mix a.jsonl:2 b.parquet:1 out=mixed.jsonl`: one file out of several, by weights."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from reflectvlm.curate.types import Question
from reflectvlm.data.findings import Tally
from reflectvlm.data.images import ImageLimits
from reflectvlm.data.mix import Mixture, Part
from reflectvlm.data.readers import named
from reflectvlm.data.readers.asked import questions
from reflectvlm.data.rows import Columns
from reflectvlm.data.tool_words import COLUMNS, Words
from reflectvlm.data.written_rows import (
    Kinds,
    ParquetFile,
    columns_of,
    data_url,
    image_bytes,
    schema_of,
    table_row,
    write_line,
)
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.table import Table, say

KEYS = (*COLUMNS, "out", "rows", "seed", "images", "max_bad")

HELP = """\
reflectvlm data mix a.jsonl:2 b.parquet:1 geo170k:FOLDER out=mixed.jsonl [rows=30000] [seed=0]

  reflectvlm data mix a.jsonl:2 b.parquet:1 out=mixed.jsonl
  reflectvlm data mix geo170k:downloads/geo170k digits.jsonl out=mixed.parquet rows=30000 images=embed

  One file out of several. Behind a file stands its weight (1). The same words give the same file.
  Ids begin with the file's name; files of one name are called by their folders.

  out=FILE       .jsonl or .parquet, a new file
  rows=N         that many, small sources come again; without, every row once
  images=paths   as they are, if out= lies above them; images=embed puts the files into the rows
  max_bad=0.05   largest share of rows of a source that may be left out
  columns.NAME=COLUMN  for all sources alike; ready readers (geo170k:FOLDER and others) need none
"""


def run(words: list[str]) -> int:
    """Runs the command and returns its exit code."""
    read = Words.read(words, "mix", KEYS)
    out = read.out()
    if not out.name.endswith((".jsonl", ".parquet")):
        raise RecipeError(f"out={out} is of no known kind. End it in .jsonl or .parquet.")
    embed = read.given.value("images", Literal["paths", "embed"], None) == "embed" or out.suffix == ".parquet"
    parts = _parts(read.files, read.columns, read.given.value("max_bad", float, 0.05))
    seed = read.whole("seed", 0, 0) or 0
    mixture = partial(Mixture, parts=parts, rows=read.whole("rows", None), seed=seed)
    mixed = write(mixture, out, embed)
    _report(mixed, out)
    return 0


def _parts(files: tuple[str, ...], columns: Columns, max_bad: float) -> list[Part]:
    if not files:
        raise RecipeError("data mix needs files: reflectvlm data mix a.jsonl:2 b.parquet:1 out=mixed.jsonl")
    paths = [weighted(text)[0] for text in files]
    places = [_place(path) for path in paths]
    if again := [path for place, path in enumerate(paths) if places[place] in places[:place]]:
        raise RecipeError(f"{again[0]} is named twice. Give it once, with a weight: {again[0]}:2.")
    parts = [_part(text, columns, max_bad) for text in files]
    return _told_apart(parts, paths)


def _place(path: str) -> str:
    """Where it lies, however it is written, `a.jsonl`, `./a.jsonl` or a link; also of `geo170k:./a`."""
    path = os.path.expanduser(path)
    if os.path.exists(path):
        return os.path.realpath(path)
    reader, colon, folder = path.partition(":")
    folder = os.path.expanduser(folder)
    return f"{reader}:{os.path.realpath(folder)}" if colon and os.path.exists(folder) else path


def _told_apart(parts: Sequence[Part], paths: Sequence[str]) -> list[Part]:
    """Files of one name, as every made set has its rows.jsonl, are called by their folders; what is then
    still alike, as two parts of one data set are, by its number."""
    alike = Counter(part.name for part in parts)
    named_by = [
        _folder(path) or part.name if alike[part.name] > 1 else part.name
        for part, path in zip(parts, paths, strict=True)
    ]
    found: Counter[str] = Counter()
    for place, name in enumerate(named_by):
        found[name] += 1
        named_by[place] = name if found[name] == 1 else f"{name}-{found[name]}"
    return [dataclasses.replace(part, name=name) for part, name in zip(parts, named_by, strict=True)]


def _folder(path: str) -> str:
    """Of a file; empty for others."""
    found = Path(os.path.abspath(os.path.expanduser(path)))
    return found.parent.name if found.is_file() else ""


def _part(text: str, columns: Columns, max_bad: float) -> Part:
    path, weight = weighted(text)
    source = named(os.path.expanduser(path))

    def rows() -> Iterator[Question]:
        # What is wrong with a source is told once, by the walk that reaches its end first.
        return questions(source, columns=columns, max_bad=max_bad, tally=Tally())

    reader, colon, folder = path.partition(":")
    name = reader if colon and folder else Path(path).name.split(".")[0]
    return Part(name=name, rows=rows, weight=weight)


def weighted(text: str) -> tuple[str, float]:
    """`a.jsonl:2` is a file and its weight; a file of that very name is a file."""
    path, colon, number = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    try:
        return path, float(number)
    except ValueError:
        if os.path.exists(path):
            raise RecipeError(f"{number!r} is no weight. Write a number behind the file: {path}:2.") from None
        return text, 1.0


# -- writing --------------------------------------------------------------------------------------


def write(mixture: Any, out: Path, embed: bool) -> Mixture:
    """The file is there when it is whole, not before."""
    partial_file = out.with_name(f".{out.name}.partial")
    if out.exists():
        raise RecipeError(f"out={out} exists. Name a new file, or delete it.")
    if not out.parent.is_dir():
        raise RecipeError(f"out={out} lies in no folder. Make {out.parent} first.")
    mixed: Mixture = mixture()
    try:
        if out.suffix == ".parquet":
            _write_table(mixture(), mixed, partial_file)
        else:
            with ExitStack() as stack:
                file = stack.enter_context(partial_file.open("w", encoding="utf-8"))
                for row in mixed:
                    images = [_image(value, row, out.parent, embed) for value in row.images]
                    write_line(file, row, columns_of(row), images)
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial_file, out)
    finally:
        partial_file.unlink(missing_ok=True)
    return mixed


def _write_table(first: Mixture, mixed: Mixture, path: Path) -> None:
    """Walks twice: a table's columns must be known before its first row is written."""
    found = Kinds()
    for row in first:
        found.add(columns_of(row))
    kinds = found.final()
    table = ParquetFile(path, schema_of(kinds))
    try:
        for row in mixed:
            images = [image_bytes(value, row, ImageLimits()) for value in row.images]
            table.add(table_row(row, columns_of(row), kinds, images), sum(len(i["bytes"]) for i in images))
    finally:
        table.close()


def _image(value: Any, row: Question, folder: Path, embed: bool) -> str:
    remote = isinstance(value, str) and (value[:5].lower() == "data:" or "://" in value[:16])
    if remote and not embed:
        return str(value)
    if embed or not isinstance(value, str | os.PathLike):
        return data_url(image_bytes(value, row, ImageLimits()))
    path = os.path.relpath(os.path.join(os.path.abspath(row.root), os.fspath(value)), os.path.abspath(folder))
    if path.startswith(".."):
        raise RecipeError(
            f"Image '{value}' of {row.id} does not lie below {folder}, and rows name images below their own "
            "folder. Put out= into a folder above all images, or add images=embed."
        )
    return path


def _report(mixed: Mixture, out: Path) -> None:
    drawn = Table("Shares of the mixture", ("source", "rows", "share", "asked for", "rounds"))
    for name, (asked, has) in mixed.shares.items():
        drawn.add(name, f"{mixed.given[name]:,}", f"{has:.3f}", f"{asked:.3f}", str(mixed.rounds[name]))
    drawn.show()
    say(f"{sum(mixed.given.values()):,} rows in {out}")
