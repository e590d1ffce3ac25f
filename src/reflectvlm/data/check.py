"""`FileCheck`: all that is wrong with a file of rows, in one walk through it and in flat memory.

What makes a row unusable is what `dataset()` would object to (`rows.defects`), all of it, not the first only.
Beside it stand warnings about rows that can be used: special tokens spelled in a question (they stay text),
columns of mixed kinds or in few rows, rows without images among rows with, odd pictures. Left out: whether
answers are right, which no file can say.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reflectvlm.data.filtered import check_columns
from reflectvlm.data.findings import Finding, Tally
from reflectvlm.data.forms import Forms
from reflectvlm.data.ids import Ids
from reflectvlm.data.images import ImageLimits, RowImage
from reflectvlm.data.looks import Decoded, Named
from reflectvlm.data.rows import BadRow, Columns, Row, defects
from reflectvlm.data.sources import Source
from reflectvlm.data.streaming import Seen, stream

_SPECIAL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?(?:think|answer|back|REFLECTION)>|[\ue000\ue001]")
_PIXELS = re.compile(r"<\|(?:image_pad|video_pad|vision_start|vision_end|vision_pad)\|>")

Length = Callable[[str, list[tuple[int, int]]], str | None]
"""Why a question with images of these sizes is too long, or None (`prompt_length.py`)."""


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """Example: `FileCheck(images=True)(JsonLines("rows.jsonl"), Tally()).bad`"""

    columns: Columns = field(default_factory=Columns)
    limits: ImageLimits = field(default_factory=ImageLimits)
    root: Path | None = None
    """The folder of image paths; None: the file's own."""
    images: bool = False
    """Decode every image. Otherwise a path must name a file, and nothing is opened."""
    length: Length | None = None
    batch: int = 1
    """Rows of a step: fewer in all are told."""
    max_rows: int | None = None

    def __call__(self, source: Source, tally: Tally) -> Checked:
        walk = _Walk(self, tally, self.root if self.root is not None else source.root)
        started = time.perf_counter()
        try:
            return walk.through(source, started)
        finally:
            walk.ids.close()


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was walked through. The findings are in the tally."""

    rows: int
    bad: int
    """Rows with at least one problem of their own; repeated ids and what concerns the file count apart."""
    without_images: int
    seconds: float
    seen: Seen
    columns: dict[str, int]
    """How many rows have each column."""


class _Walk:
    """The state of one walk: what was seen so far."""

    def __init__(self, check: FileCheck, tally: Tally, root: Path) -> None:
        self.check, self.tally, self.root = check, tally, root
        self.forms, self.ids, self.seen = Forms(), Ids(), Seen()
        self.rows = self.bad = self.bare = 0
        self.first_bare = self.first_shown = ""
        self.missing = {name for name in check.columns.image_names if check.columns.messages is None}
        if check.columns.id != Columns().id:
            self.missing.add(check.columns.id)
        self.position = ""
        self.sizes: list[tuple[int, int]] = []
        self.named = Named(root, check.limits)
        self.decoded = Decoded(root, check.limits, self._odd)

    def through(self, source: Source, started: float) -> Checked:
        name, walk = _name(source), stream(source, self.seen)
        try:
            for position, row in walk:
                self.position = position
                if self.check.max_rows is not None and self.rows >= self.check.max_rows:
                    break
                self.rows += 1
                self._row(row, position)
        except ValueError as error:  # the file as a whole: a quote never closed, a packed file cut off
            self._problem(Finding(self.position or name, "", "file cannot be read on", str(error)))
        self._ids()
        self._whole(name)
        return Checked(
            rows=self.rows,
            bad=self.bad,
            without_images=self.bare,
            seconds=time.perf_counter() - started,
            seen=self.seen,
            columns=self.forms.columns,
        )

    def _row(self, row: Row | BadRow, position: str) -> None:
        if isinstance(row, BadRow):
            self.bad += 1
            self._problem(Finding.of(row))
            return
        self.forms.add(row, position)
        if self.missing:
            self.missing -= row.keys()
        columns = self.check.columns
        if columns.messages is not None:
            from reflectvlm.data.messages import plain_row

            try:
                row, columns = plain_row(row, position, columns, self.check.limits, self.root, None)
            except BadRow as broken:
                self.bad += 1
                self._problem(Finding.of(broken))
                return
        self.sizes.clear()
        found = defects(row, position, columns, self._look)
        for bad in found:
            self._problem(Finding.of(bad))
        self.bad += bool(found)
        self._id(row.get(columns.id), position)
        self._shown(row, columns, position)
        self._texts(row, columns, position, whole=not found)

    def _look(self, value: RowImage) -> None:
        if not self.check.images:
            self.named(value)
        else:
            self.sizes.append(self.decoded(value))

    def _id(self, value: Any, position: str) -> None:
        if value is None or value == "":
            self.ids.add(position, position)
        elif isinstance(value, str | int) and not isinstance(value, bool):
            self.ids.add(str(value), position)

    def _shown(self, row: Row, columns: Columns, position: str) -> None:
        if any(row.get(name) for name in columns.image_names):
            self.first_shown = self.first_shown or position
        elif columns.image_names:
            self.bare += 1
            self.first_bare = self.first_bare or position

    def _texts(self, row: Row, columns: Columns, position: str, *, whole: bool) -> None:
        question = row.get(columns.question)
        if not isinstance(question, str):
            return
        if ("<" in question or "\ue000" in question or "\ue001" in question) and (
            match := _SPECIAL.search(question)
        ):
            detail = f"It spells {match[0]!r}, which stays text: no token of the chat template."
            self._warn(position, columns.question, "special token in a question", detail)
        for name, value in row.items():
            if (
                name != columns.question
                and isinstance(value, str)
                and "<|" in value
                and _PIXELS.search(value)
            ):
                detail = "It spells a token that stands for pixels; as a gold answer it cannot be trained."
                self._warn(position, name, "pixel token in a text", detail)
        if whole and self.check.length is not None and (why := self.check.length(question, self.sizes)):
            self.bad += 1
            self._problem(Finding(position, columns.question, "prompt too long", why))

    def _odd(self, reason: str, detail: str) -> None:
        self._warn(self.position, ", ".join(self.check.columns.image_names), reason, detail)

    def _ids(self) -> None:
        for position, first in self.ids.repeated():
            detail = f"Its id is already that of {first}. Give every row its own id."
            self._problem(Finding(position, self.check.columns.id, "duplicate id", detail))

    def _whole(self, name: str) -> None:
        """What only the end of the walk can say."""
        if self.missing and self.rows and self.check.max_rows is None:
            try:
                check_columns(self.check.columns, set(self.forms.columns))
            except ValueError as error:
                self._problem(Finding(name, ", ".join(sorted(self.missing)), "no such column", str(error)))
        good = self.rows - self.bad
        if good == 0:
            detail = f"Of {self.rows:,} rows none can be used. A data set needs at least one."
            self._problem(Finding(name, "", "no row is left", detail))
        elif good < self.check.batch:
            detail = (
                f"{good:,} rows can be used and a step takes {self.check.batch:,}: some come twice in it."
            )
            self._warn(name, "", "fewer rows than a step takes", detail)
        for finding, count in self.forms.findings():
            self.tally.add(finding, count)
        if self.first_bare and self.first_shown:
            few = 2 * self.bare <= self.rows
            first, count = (self.first_bare, self.bare) if few else (self.first_shown, self.rows - self.bare)
            detail = f"{self.bare:,} of {self.rows:,} rows have no image, the others have."
            fields = ", ".join(self.check.columns.image_names)
            self.tally.add(Finding(first, fields, "rows with and without images", detail, "warning"), count)
        self._file(name)

    def _file(self, name: str) -> None:
        seen = self.seen
        for count, reason, detail in (
            (int(seen.bom), "byte order mark", "The file begins with one. It is passed over."),
            (seen.crlf, "lines end as on Windows", "They end in CR LF, which is read as a line's end."),
            (seen.blank, "blank lines", "They are passed over and counted as lines."),
            (int(seen.cut), "no end of the last line", "A copy may have been cut off there."),
        ):
            if count:
                self.tally.add(Finding(name, "", reason, detail, "warning"), count)

    def _problem(self, finding: Finding) -> None:
        self.tally.add(finding)

    def _warn(self, position: str, column: str, reason: str, detail: str) -> None:
        self.tally.add(Finding(position, column, reason, detail, "warning"))


def _name(source: Source) -> str:
    path = getattr(source, "path", getattr(source, "folder", ""))
    several = isinstance(path, list | tuple)
    return ", ".join(Path(one).name for one in path) if several else Path(str(path)).name
