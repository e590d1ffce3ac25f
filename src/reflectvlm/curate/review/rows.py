"""A source's rows as people see them: read one at a time, images only when one is shown.

Laxer than `read_row`, because a row without an answer or with a broken image is one that somebody should
see; what `read_row` thinks of it is told beside it (`problem`), so that nobody accepts by mistake what
training will refuse. Opening walks through the rows once and keeps ids and hashes, no texts.

Left out: rows of messages and of videos.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from reflectvlm.curate.review.votes import Vote, disagree, votes_of
from reflectvlm.data.fetch import ImageLimits, RowImage, fetch
from reflectvlm.data.filtered import Rows, Skipped
from reflectvlm.data.images import load_image
from reflectvlm.data.rows import BadRow, Columns, Row, plain, read_row
from reflectvlm.data.sources import Source

EDITABLE = ("question", "answer", "trace")
_SIGNS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Which column holds what. Example: `Fields(columns=Columns(question="problem"), trace="solution")`"""

    columns: Columns = field(default_factory=Columns)
    trace: str = "trace"
    votes: str = "votes"
    """May be absent; `about.votes` of a row is read then."""

    def __post_init__(self) -> None:
        if self.columns.messages is not None:
            raise ValueError("Rows of messages cannot be reviewed. Write them as question, answer and trace.")
        names = (self.columns.question, self.columns.answer, self.columns.id, *self.columns.image_names)
        for name, value in (("trace", self.trace), ("votes", self.votes)):
            if value in names or self.trace == self.votes:
                raise ValueError(f"{name} is the column {value!r}, which holds another part. Name its own.")

    def column(self, part: str) -> str | None:
        """The column of `question`, `answer` or `trace`."""
        return {"question": self.columns.question, "answer": self.columns.answer}.get(part, self.trace)


@dataclass(frozen=True, eq=False)
class Shown:
    """One row as people see it."""

    id: str
    position: str
    row: Row
    question: str
    answer: str
    trace: str
    images: tuple[RowImage, ...]
    votes: tuple[Vote, ...]
    others: Mapping[str, Any]
    first_answer: str = ""
    """What stood in the trace's place, where that was rewritten."""
    first_votes: tuple[Vote, ...] = ()
    """On `first_answer`: nobody has judged what is shown."""

    @cached_property
    def digest(self) -> str:
        """Of what is judged: a decision holds for these words and images, and for no others."""
        parts = [self.question, self.answer, self.trace, [_image_key(image) for image in self.images]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def words(self) -> str:
        """What a search looks at."""
        said = (f"{vote.judge} {vote.verdict} {vote.why}" for vote in (*self.votes, *self.first_votes))
        return " \n".join((self.id, self.question, self.answer, self.trace, *said)).lower()


@dataclass(frozen=True, eq=False)
class ReviewRows:
    """All rows that can be shown; `places[i]` is where row i stands in the source. Threads may share it."""

    name: str
    source: Rows
    root: Path
    fields: Fields
    limits: ImageLimits
    places: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    mixed: bytearray = field(default_factory=bytearray)
    """1 where judges disagree."""
    unread: list[Skipped] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.Lock)

    @classmethod
    def open(
        cls, source: Source, name: str, fields: Fields, limits: ImageLimits, root: Path | None = None
    ) -> ReviewRows:
        rows = cls(name, source.open(), root or source.root, fields, limits)
        seen: dict[str, int] = {}
        known: set[str] = set()
        for place in range(len(rows.source)):
            try:
                shown = rows._read(place)
                known.update(shown.row)
                if shown.id in seen:
                    detail = f"Id '{shown.id}' is already the id of {rows.source.position(seen[shown.id])}."
                    raise BadRow(
                        shown.position,
                        fields.columns.id,
                        "duplicate id",
                        "Give every row its own id.",
                        detail,
                    )
            except BadRow as bad:
                rows.unread.append(Skipped(bad.position, bad.reason, str(bad)))
                continue
            seen[shown.id] = place
            rows.places.append(place)
            rows.ids.append(shown.id)
            rows.digests.append(shown.digest)
            rows.mixed.append(disagree(shown.votes))
        _check(rows, known)
        return rows

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Shown:
        return self._read(self.places[index])

    def raw(self, index: int) -> Row:
        with self._lock:
            return self.source[self.places[index]]

    def changed(self, row: Row, texts: Mapping[str, str]) -> dict[str, Any]:
        """The row with other texts for some of `EDITABLE`."""
        columns = {self.fields.column(part): text for part, text in texts.items()}
        return {**row, **{name: text for name, text in columns.items() if name is not None}}

    def problem(self, shown: Shown, texts: Mapping[str, str]) -> str:
        """Why training would refuse the row with these texts, images included; empty if it would not."""
        row = self.changed(shown.row, texts)
        try:
            read_row(row, shown.position, self.fields.columns, self.limits, self.root)
        except BadRow as bad:
            return f"{bad.detail} {bad.remedy}".strip()
        return ""

    def image(self, index: int, number: int) -> tuple[str, bytes]:
        """(type, encoded bytes) of an image that training would take. Raises BadImage."""
        value = self[index].images[number]
        data = fetch(value, self.root, self.limits)
        image = load_image(data, self.root, self.limits)
        if (kind := _kind(data)) is not None:
            return kind, data
        file = io.BytesIO()  # a browser shows no TIFF and no PPM
        image.save(file, "PNG")
        return "image/png", file.getvalue()

    def _read(self, place: int) -> Shown:
        with self._lock:  # a Parquet file's cache is for one thread
            row = self.source[place]
        return _shown(row, self.source.position(place), self.fields)


def as_text(value: Any) -> str:
    """A cell as text; nothing for an empty one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=False, default=lambda one: f"({type(one).__name__})")
    except (TypeError, ValueError, RecursionError):
        return f"({type(value).__name__})"


def _shown(row: Row, position: str, fields: Fields) -> Shown:
    columns = fields.columns
    name = as_text(row.get(columns.id)) or position
    votes = row.get(fields.votes)
    about = row.get("about")
    about = about if isinstance(about, Mapping) else {}
    if votes is None:
        votes = about.get("votes")
    first_votes = votes_of(about.get("first_votes"))
    used = {columns.question, columns.answer, columns.id, *columns.image_names, fields.trace, fields.votes}
    texts = (row.get(columns.question), columns.answer and row.get(columns.answer), row.get(fields.trace))
    question, answer, trace = map(as_text, texts)
    return Shown(
        id=name,
        position=position,
        row=row,
        question=question,
        answer=answer,
        trace=trace,
        images=tuple(one for column in columns.image_names for one in _listed(row.get(column))),
        votes=votes_of(votes),
        others={key: value for key, value in row.items() if key not in used},
        first_answer=as_text(about.get("first_answer")) if first_votes else "",
        first_votes=first_votes,
    )


def _listed(value: Any) -> list[RowImage]:
    """One entry per image; a cell of text may hold a JSON list of them."""
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
        return inner if isinstance(inner, list) else [value]
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None or value in ("", b"") else [value]


def _image_key(value: RowImage) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _image_key(one) for key, one in sorted(value.items())}
    if isinstance(value, bytes | bytearray | memoryview):
        return hashlib.sha256(value).hexdigest()
    return value if isinstance(value, str | int | None) else repr(type(value))


def _kind(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for sign, kind in _SIGNS.items() if data.startswith(sign)), None)


def _check(rows: ReviewRows, known: set[str]) -> None:
    columns = plain(", ".join(sorted(known)))
    if not len(rows):
        first = f" The first: {rows.unread[0].message}" if rows.unread else ""
        raise ValueError(f"{rows.name} has no row that can be shown.{first}")
    wanted = [("trace", rows.fields.trace), ("columns.question", rows.fields.columns.question)]
    if (images := rows.fields.columns.images) not in (None, "images"):
        wanted += [
            ("columns.images", name) for name in ([images] if isinstance(images, str) else images or [])
        ]
    if rows.fields.columns.answer is not None:
        wanted.append(("columns.answer", rows.fields.columns.answer))
    for key, name in wanted:
        if name not in known:
            raise ValueError(
                f"No row of {rows.name} has a column {name!r}; the columns are {columns}. Name the right "
                f"one: {key}=NAME."
            )
