"""`Dataset`: the good rows of a source, and a `Report` of all others, so that nothing is lost silently.

A scan reads and decodes every row once and keeps only the *places* of the good ones; `dataset[i]`
reads and decodes again. Memory therefore holds the images in use and no others, whatever the size
of the data. The order is the source's, and the same files give the same data set every time.
"""

from __future__ import annotations

import dataclasses
import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias, overload

from reflectvlm.data.rows import BadRow, Columns, Row, plain
from reflectvlm.recipe_check import nearest
from reflectvlm.types import Sample

_log = logging.getLogger("reflectvlm")

OnBad: TypeAlias = Literal["skip", "error"]
Check: TypeAlias = Callable[[Sample], str | None]
"""Says in a few words why a sample is not wanted, e.g. `"prompt too long"`; None keeps it."""


class Rows(Protocol):
    """Raw rows by number. Reading one may raise `BadRow`; `position` names it for a human."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...
    def position(self, index: int, /) -> str: ...


class Skipped(NamedTuple):
    """A row that is not used."""

    position: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of the rows. `str(report)` is the summary line, `report.lines()` names every row.

    Example: `kept 998 of 1,000 rows; 2 skipped: missing image 1 (rows.jsonl:17), empty answer 1
    (rows.jsonl:40)`
    """

    total: int
    kept: int
    skipped: tuple[Skipped, ...] = ()
    without_images: int = 0
    """Kept rows that have no image."""

    def lines(self) -> list[str]:
        """The summary, then one line for each skipped row: its place, what is wrong, the remedy."""
        return [str(self), *(" ".join(row.message.splitlines()) for row in self.skipped)]

    @property
    def reasons(self) -> Mapping[str, tuple[str, ...]]:
        """Positions by reason, the commonest reason first."""
        found: dict[str, list[str]] = {}
        for row in self.skipped:
            found.setdefault(row.reason, []).append(row.position)
        return {reason: tuple(found[reason]) for reason in sorted(found, key=lambda key: -len(found[key]))}

    def __str__(self) -> str:
        line = f"kept {self.kept:,} of {self.total:,} rows"
        if 0 < self.without_images < self.kept:
            line += f" ({self.without_images:,} without images)"
        if not self.skipped:
            return line
        parts = [f"{reason} {len(rows):,} ({_some(rows)})" for reason, rows in self.reasons.items()]
        return f"{line}; {len(self.skipped):,} skipped: {', '.join(parts)}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset(Sequence[Sample]):
    """Good rows as `Sample`s, read when asked for.

    Since a row is read again, one that was good may have become bad: an image deleted, a web address
    gone. `data[i]` then raises `BadRow` (`reflectvlm.data.rows`), whose `position` names the row and
    whose text is one line; other rows are not touched by it. A file of rows that changed after it was
    opened is a `ValueError`: the places kept are then those of another file.
    """

    rows: Rows
    read: Callable[[Row, str], Sample]
    kept: Sequence[int]
    """Places of the good rows in `rows`."""
    report: Report

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        place = self.kept[index]
        return self.read(self.rows[place], self.rows.position(place))

    def filter(self, check: Check) -> Dataset:
        """The samples to which `check` has no objection; the report records the others.

        Example: `data.filter(lambda s: "question too long" if len(s.question) > 4000 else None)`
        """
        kept, skipped, bare = array("q"), [], 0
        for i, sample in enumerate(self):
            reason = check(sample)
            if reason is None:
                kept.append(self.kept[i])
                bare += not sample.images
            else:
                position = self.rows.position(self.kept[i])
                skipped.append(Skipped(position, reason, f"{position}: {reason}."))
        report = Report(
            total=self.report.total,
            kept=len(kept),
            skipped=self.report.skipped + tuple(skipped),
            without_images=bare,
        )
        _tell(report)
        return dataclasses.replace(self, kept=kept, report=report)


def unchecked(rows: Rows, read: Callable[[Row, str], Sample], count: int) -> Dataset:
    """All rows, none of them looked at: a bad one raises `BadRow` when it is reached."""
    _tell(report := Report(total=count, kept=count))
    return Dataset(rows=rows, read=read, kept=range(count), report=report)


def checked(
    rows: Rows,
    read: Callable[[Row, str], Sample],
    count: int,
    columns: Columns,
    on_bad: OnBad,
    max_bad: float,
) -> Dataset:
    """Read the first `count` rows once and keep the places of the good ones."""
    kept, skipped, bare = array("q"), [], 0
    ids: dict[str, int] = {}
    seen: set[str] = set()
    for place in range(count):
        position = rows.position(place)
        try:
            row = rows[place]
            seen.update(row)
            sample = read(row, position)
            first = ids.setdefault(sample.id, place)
            if first != place:
                detail = f"Id '{sample.id}' is already the id of {rows.position(first)}."
                raise BadRow(position, columns.id, "duplicate id", "Give every row its own id.", detail)
        except BadRow as bad:
            if on_bad == "error":
                raise
            skipped.append(Skipped(position, bad.reason, str(bad)))
        else:
            kept.append(place)
            bare += not sample.images
    report = Report(total=count, kept=len(kept), skipped=tuple(skipped), without_images=bare)
    check_columns(columns, seen)
    _check_share(report, max_bad)
    _tell(report)
    return Dataset(rows=rows, read=read, kept=kept, report=report)


def check_columns(columns: Columns, seen: set[str]) -> None:
    """A misspelt image column would give a data set of text rows and a run that never sees."""
    asked = [("images", name) for name in columns.image_names if columns.messages is None]
    if columns.id != Columns().id:
        asked.append(("id", columns.id))
    missing = [(part, name) for part, name in asked if name not in seen]
    if seen and missing:
        part, name = missing[0]
        near = nearest(name, sorted(seen))
        without = ", or data.columns.images=null if the rows have no images" if part == "images" else ""
        if "messages" in seen:
            without += ", or data=messages (data.columns.messages=messages) for rows of messages"
        raise ValueError(
            f"No row has a column '{name}'; the columns are {plain(', '.join(sorted(seen)))}. "
            f"Name the right one, data.columns.{part}={near or 'NAME'}{without} "
            f"(generate: without 'data.'; Python: columns={{'{part}': …}})."
        )


def _check_share(report: Report, max_bad: float) -> None:
    if report.kept and len(report.skipped) <= max_bad * report.total:
        return
    first = f" The first: {report.skipped[0].message}" if report.skipped else ""
    if not report.kept:
        raise ValueError(f"No row is left: {report}. A data set needs at least one good row.{first}")
    raise ValueError(
        f"Too many bad rows, max_bad={max_bad:g} allows {int(max_bad * report.total):,}: {report}. "
        f"Repair them, or raise max_bad.{first}"
    )


def _tell(report: Report) -> None:
    if not report.kept:
        raise ValueError(f"No row is left: {report}. A data set needs at least one good row.")
    _log.log(logging.WARNING if report.skipped else logging.INFO, "%s", report)


def _some(positions: Sequence[str]) -> str:
    return ", ".join(positions[:3]) + (", …" if len(positions) > 3 else "")
