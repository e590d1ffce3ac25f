"""What the readers share: finding files, converting rows one at a time, texts with tags and braces."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from reflectvlm.data.filtered import Rows
from reflectvlm.data.rows import BadRow, Row
from reflectvlm.data.tables import ParquetRows

Convert = Callable[[Row, str, int], Row]
"""A row as it comes, its place and its number, from 1 on over all files -> a plain row. Raises BadRow."""

_NUMBERED = re.compile(r"<image ?\d+>")


@dataclass(frozen=True, eq=False)
class Converted:
    """Rows of a layout as plain rows, each converted when it is asked for."""

    rows: Rows
    convert: Convert

    def __len__(self) -> int:
        return len(self.rows)

    def position(self, index: int) -> str:
        return self.rows.position(index)

    def __getitem__(self, index: int) -> Row:
        return self.convert(self.rows[index], self.position(index), index + 1)


def missing(title: str, folder: Path, *ways: str) -> ValueError:
    """Each way: where it comes from, and the files that it then is."""
    found = (
        ", ".join(sorted(path.name for path in islice(folder.iterdir(), 50))[:8]) if folder.is_dir() else ""
    )
    here = f"It holds {found}." if found else "There is no such folder, or nothing in it."
    return ValueError(f"{title} is not in '{folder}'. {here} Wanted: {'; or '.join(ways)}.")


def first_file(folder: Path, *names: str) -> Path | None:
    """The first of these that is there."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def parquet_files(folder: Path, split: str) -> list[Path]:
    """`train-00000-of-00002.parquet`, `train.parquet` or `train/0000.parquet`, at any depth."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.rglob("*.parquet")
        if re.split(r"[-.]", path.name)[0] == split or path.parent.name == split
    )


def hub_tables(title: str, folder: Path, split: str, where: str) -> ParquetRows:
    """The Parquet files of a split of a set of the hub. ValueError: there are none."""
    files = parquet_files(folder, split)
    if not files:
        raise missing(title, folder, f"the hub's {where}: data/{split}-….parquet")
    return ParquetRows(files)


def check_choice(owner: str, name: str, value: str, known: Sequence[str]) -> None:
    """ValueError: a reader's setting is none of those that it knows."""
    if value not in known:
        told = " or ".join((", ".join(map(repr, known[:-1])), repr(known[-1])))
        raise ValueError(f"{owner}.{name} is {value!r}. It must be {told}.")


def image_root(folder: Path, names: Sequence[str], rows: Rows, image: str, title: str) -> Path:
    """The first of these folders in which the image of one of the first rows lies."""
    wanted: list[str] = []
    for index in range(min(len(rows), 20)):
        try:
            value = rows[index].get(image)
        except BadRow:
            continue
        wanted += [value] if isinstance(value, str) and value else []
    for name in names:
        if any((folder / name / value).is_file() for value in wanted):
            return folder / name
    tried = ", ".join(f"'{folder / name}'" for name in names)
    example = f", such as '{wanted[0]}'," if wanted else ""
    raise ValueError(
        f"The images of {title}{example} are in none of {tried}. Unpack its archive of images there."
    )


def text_of(row: Row, column: str, position: str) -> str:
    """The text of a column. Raises BadRow for none."""
    value = row.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        known = ", ".join(sorted(map(str, row)))
        detail = f"Column '{column}' holds no text; the row's columns: {known}."
        raise BadRow(
            position, column, f"missing {column}", "Fetch the file again, or remove the row.", detail
        )
    return value


def exchanges(row: Row, position: str, column: str = "conversations") -> list[tuple[str, str]]:
    """Question and reply of each exchange of a LLaVA-style conversation:
    `[{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]`."""
    turns = row.get(column)
    sides = [turn.get("from") if isinstance(turn, Mapping) else None for turn in turns or ()]
    texts = [turn.get("value") if isinstance(turn, Mapping) else None for turn in turns or ()]
    whole = len(sides) >= 2 and len(sides) % 2 == 0 and sides == ["human", "gpt"] * (len(sides) // 2)
    if not whole or not all(isinstance(text, str) for text in texts):
        detail = (
            f"The turns are {', '.join(map(str, sides[:6])) or 'none'}, not human, gpt in turn, with texts."
        )
        raise BadRow(
            position, column, "broken conversation", "Fetch the file again, or remove the row.", detail
        )
    return list(zip(map(str, texts[::2]), map(str, texts[1::2]), strict=True))


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question with a line for each option; options that are only letters stand in the picture."""
    letters = [chr(ord("A") + place) for place in range(len(choices))]
    if not choices or [choice.strip() for choice in choices] == letters:
        return question
    shown = [f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join([question, "Choices:", *shown])


def one_marker(question: str) -> str:
    """`<image1>` as `<image>`, where a row has one image: the first of them, the others are left out."""
    seen = False

    def replaced(_: re.Match[str]) -> str:
        nonlocal seen
        first, seen = not seen, True
        return "<image>" if first else ""

    return _NUMBERED.sub(replaced, question)


def braced(text: str, command: str) -> Iterator[str]:
    """What stands in the braces of each `\\command{…}`, inner braces and all; one that is not closed is none.

    Example: `list(braced(r"\\boxed{a{b}} \\boxed{c}", "boxed")) == ["a{b}", "c"]`
    """
    opening = f"\\{command}{{"
    at = text.find(opening)
    while at >= 0:
        begin = at + len(opening)
        depth, end = 1, begin
        while end < len(text) and depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        if depth == 0:
            yield text[begin : end - 1].strip()
        at = text.find(opening, end if depth == 0 else begin)


def others(row: Row, *used: str) -> dict[str, Any]:
    """The columns that no part of a plain row was made of."""
    return {name: value for name, value in row.items() if name not in used}
