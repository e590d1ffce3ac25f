"""Evaluation sets as the words of a command name them, as rows that a set can be held against.

    data overlap rows.jsonl with=mathvista,mine.jsonl with.question=problem
    data coldstart …        without=mathvista,mine.jsonl without.question=problem

A name is a benchmark's, whose files lie below `data_dir`, or a file, folder, `NAME:FOLDER` of a ready reader
or name on the hub. A row whose images cannot be read is there with its text, as in `held_in_task`; one that
has not even that is counted and named: what was not compared must not look like what was not found.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from reflectvlm.curate.contamination import EvaluationIndex, Held, held_in_task
from reflectvlm.curate.hashes import image_hash
from reflectvlm.data.rows import BadRow, Columns
from reflectvlm.generate_options import Given, value_of
from reflectvlm.recipe_check import RecipeError, nearest
from reflectvlm.train.printing import put

if TYPE_CHECKING:
    from reflectvlm.data.filtered import Dataset
    from reflectvlm.types import Sample

log = logging.getLogger("reflectvlm")

PARTS = ("question", "answer", "images", "id", "messages")
INDEX = ("n", "share", "common", "distance", "tint")
"""Settings of the index that a command offers."""
_EVERY = 10.0
"""Seconds between two lines about how far a pass is."""


class Placed(NamedTuple):
    """A row of a file: whole, or at least its question, or why there is neither."""

    sample: Sample | None
    position: str
    why: str = ""
    question: str = ""
    """Of a row that is not whole; may be empty."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSets:
    """Example: `EvaluationSets(given=given, key="without").held()`"""

    given: Given
    key: str
    """`with` or `without`; settings stand below it, `without.question`."""
    unread: dict[str, list[str]] = field(default_factory=dict, init=False)
    """By set, one line for each row of which nothing could be read."""
    by_text: dict[str, str] = field(default_factory=dict, init=False)
    """By set, why the first row that is there with its text alone is not whole."""

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            text = self.given.text(self.key)
            raise RecipeError(f"{self.key} is {text!r}, which names one twice. Name each once.")
        for name in self.names:
            self._check(name)

    @property
    def names(self) -> tuple[str, ...]:
        names = (name.strip() for name in (self.given.text(self.key) or "").split(","))
        return tuple(name for name in names if name)

    def held(self, told: Callable[[str, int], None] = lambda *_: None) -> list[Held]:
        """All rows. `told` is given each name and how many rows it has. ValueError: one has none."""
        found: list[Held] = []
        for name in self.names:
            rows = self._held(name)
            if not rows:
                lines = self.unread.get(self._label(name)) or ["it is empty"]
                raise RecipeError(
                    f"{self.key}={name}: no row of it can be read ({lines[0]}), so nothing could be "
                    "compared. Repair it, or leave it out."
                )
            told(name, len(rows))
            found += rows
        return found

    def index(self, held: Sequence[Held]) -> EvaluationIndex:
        """By the settings below the key, `without.n=8`."""
        hints = get_type_hints(EvaluationIndex)
        given = self.given.below(self.key)
        values = {
            name: value_of(f"{self.key}.{name}", given[name], hints[name]) for name in INDEX if name in given
        }
        return EvaluationIndex(held=held, **values)

    def doubts(self, held: Sequence[Held]) -> list[str]:
        """One line for each thing that will not be compared."""
        lines = [
            f"{len(bad):,} rows of {name} could not be read and were not compared, the first: {bad[0]}"
            for name, bad in self.unread.items()
        ]
        for name in dict.fromkeys(one.set for one in held):
            rows = [one for one in held if one.set == name]
            if without := sum(not one.images for one in rows):
                why = f", the first that is not whole: {self.by_text[name]}" if name in self.by_text else ""
                lines.append(
                    f"{without:,} of {len(rows):,} rows of {name} have no image, or none that can be read: "
                    f"only their texts are compared{why}"
                )
        return lines

    def _check(self, name: str) -> None:
        from reflectvlm.eval.named import TASKS

        near = None if name in TASKS else nearest(name, TASKS)
        if near and "/" not in name and not os.path.exists(os.path.expanduser(name)):
            raise RecipeError(f"{self.key}={name} is no benchmark and no file. Did you mean {near}?")

    def _held(self, name: str) -> list[Held]:
        """A benchmark if one has this name, else rows."""
        from reflectvlm.eval.named import TASKS, make_task

        if name in TASKS:
            folder = Path(os.path.expanduser(self.given.text("data_dir") or "data"))
            return list(held_in_task(make_task(name), folder))
        answer = self.given.below(self.key).get("answer", "answer")
        rows = (self._row(self._label(name), one, answer) for one in placed(name, self.given, f"{self.key}."))
        return [row for row in rows if row is not None]

    def _row(self, name: str, one: Placed, answer: str) -> Held | None:
        if (sample := one.sample) is None:
            if one.question.strip():
                self.by_text.setdefault(name, one.why)
                return Held(set=name, id=one.position, question=one.question)
            self.unread.setdefault(name, []).append(one.why)
            return None
        images = tuple(map(image_hash, sample.images))
        text = answer_of(sample, answer)
        return Held(set=name, id=sample.id, question=sample.question, answer=text, images=images)

    def _label(self, name: str) -> str:
        """The file's own name, unless another has the same."""
        short = Path(name).name
        return short if [Path(one).name for one in self.names].count(short) == 1 else name


def placed(path: str, given: Given, before: str, most: int | None = None) -> Iterator[Placed]:
    """The rows of a file, each decoded once; it is opened now. `before` stands before the words about it:
    `with.`, `without.`, or nothing for `columns.question`, `split` and `root`."""
    from reflectvlm.data.readers import named
    from reflectvlm.data.sources import dataset, pick

    path = os.path.expanduser(path)
    split = given.text(f"{before}split")
    columns = _columns(given.below(before.removesuffix(".") or "columns"))
    data = dataset(
        named(path) if split is None else pick(path, split),
        root=given.text(f"{before}root"),
        columns=columns,
        on_bad="error",
        max_rows=most,
        check=False,
    )
    return _walk(data, columns, _teller(path, len(data)))


def _walk(data: Dataset, columns: Columns, tell: Callable[[int], None]) -> Iterator[Placed]:
    for place in range(len(data)):
        position = data.rows.position(place)
        tell(place)
        try:
            yield Placed(data[place], position)
        except BadRow as bad:
            yield Placed(None, position, str(bad), _question(data.rows, place, columns))


def answer_of(sample: Sample, column: str) -> str:
    """Gold answers may be missing: nobody grades here, so their column is read beside the others."""
    value = sample.columns.get(column, sample.answer)
    return str(value) if isinstance(value, str | int | float) else ""


def _columns(below: dict[str, str]) -> Columns:
    found: dict[str, Any] = {key: text for key, text in below.items() if key in PARTS and key != "answer"}
    if images := found.get("images"):
        names = [name.strip() for name in images.split(",")]
        found["images"] = None if [name.lower() for name in names] in (["null"], ["none"]) else names
    return Columns(**found, answer=None)


def _question(rows: Any, place: int, columns: Columns) -> str:
    """The text of a row that is not whole; empty where it has none that could be compared."""
    try:
        row = rows[place]
    except BadRow:
        return ""
    value = None if columns.messages is not None else row.get(columns.question)
    return value if isinstance(value, str) else ""


def _teller(path: str, total: int) -> Callable[[int], None]:
    started = last = time.monotonic()

    def tell(place: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _EVERY:
            last = now
            put(f"{path}: {place:,} of {total:,} rows, {place / (now - started):,.0f} a second\n")

    return tell
