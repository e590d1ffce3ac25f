"""`questions`: the rows of any source as `Question`s, images unread. Memory holds a hash of each id."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from reflectvlm.curate.types import Question
from reflectvlm.data.fetch import ImageLimits
from reflectvlm.data.filtered import OnBad
from reflectvlm.data.findings import Finding, Tally
from reflectvlm.data.looks import Named
from reflectvlm.data.rows import BadRow, Columns, Row, defects, listed
from reflectvlm.data.sources import PathLike, Source
from reflectvlm.data.streaming import stream

log = logging.getLogger("reflectvlm")


def questions(
    source: Source | str | Path,
    *,
    columns: Columns | None = None,
    name: str = "",
    root: PathLike | None = None,
    limits: ImageLimits | None = None,
    on_bad: OnBad = "skip",
    max_bad: float = 0.05,
    max_rows: int | None = None,
    tally: Tally | None = None,
) -> Iterator[Question]:
    """Checked rows, one after the other; what `dataset()` would leave out is left out, named and counted.

    Images are looked at by their names only. More than `max_bad` bad rows are an error, at the end of the
    walk: by then the good ones have been handed out.

    Args:
        source: a source, or a path as `dataset()` takes it, or `geo170k:FOLDER` (`readers.named`).
        name: what goes into `Question.source`.
        tally: gets what is wrong with each row that is left out.
    """
    from reflectvlm.data.readers import named

    source = named(str(source)) if isinstance(source, str | Path) else source
    columns, limits = columns or Columns(), limits or ImageLimits()
    opened: Source = source
    folder = Path(root) if root is not None else opened.root
    tally = tally if tally is not None else Tally()
    reader = QuestionReader(columns, limits, folder, name)
    total = bad = 0
    for position, row in stream(opened):
        if max_rows is not None and total >= max_rows:
            break
        total += 1
        found = reader(position, row)
        if isinstance(found, Question):
            yield found
            continue
        if on_bad == "error":
            raise found[0]
        bad += 1
        for one in found:
            tally.add(Finding.of(one))
    _check_share(total, bad, max_bad, tally)


class QuestionReader:
    """Reads a row, and remembers the ids of those before it."""

    def __init__(self, columns: Columns, limits: ImageLimits, root: Path, name: str) -> None:
        self.columns, self.limits, self.root, self.name = columns, limits, root, name
        self.look = Named(root, limits)
        self.seen: set[int] = set()

    def __call__(self, position: str, row: Row | BadRow) -> Question | list[BadRow]:
        if isinstance(row, BadRow):
            return [row]
        columns = self.columns
        if columns.messages is not None:
            from reflectvlm.data.messages import plain_row

            try:
                row, columns = plain_row(row, position, columns, self.limits, self.root, None)
            except BadRow as bad:
                return [bad]
        if found := defects(row, position, columns, self.look):
            return found
        value = row.get(columns.id)
        name = position if value in (None, "") else str(value)
        digest = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
        if digest in self.seen:
            detail = f"Id '{name}' is already that of an earlier row."
            return [BadRow(position, columns.id, "duplicate id", "Give every row its own id.", detail)]
        self.seen.add(digest)
        used = {columns.question, columns.answer, columns.id, *columns.image_names}
        images = [value for column in columns.image_names for value in listed(row.get(column))]
        return Question(
            id=name,
            question=str(row[columns.question]),
            answer="" if columns.answer is None else str(row[columns.answer]),
            images=tuple(images),
            root=self.root,
            source=self.name,
            columns={key: value for key, value in row.items() if key not in used},
        )


def _check_share(total: int, bad: int, max_bad: float, tally: Tally) -> None:
    kinds = [
        f"{reason} {count:,} ({first[0].position})" for _, reason, count, first in tally.kinds("problem")
    ]
    told = f"kept {total - bad:,} of {total:,} rows"
    told += f"; {bad:,} left out: {', '.join(kinds[:8])}" if bad else ""
    if bad == total:
        raise ValueError(f"No row is left: {told}. At least one good row is needed.")
    if bad > max_bad * total:
        raise ValueError(f"Too many bad rows, max_bad={max_bad:g}: {told}. Repair them, or raise max_bad.")
    log.log(logging.WARNING if bad else logging.INFO, "%s", told)
