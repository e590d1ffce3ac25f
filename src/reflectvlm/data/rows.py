"""One row of a user's data -> one checked `Sample`, or a `BadRow` that says what is wrong where.

Text is never altered: a question that contains `<|im_end|>` or `</think>` keeps it, and the policy
encodes it as plain text. Rows of messages become plain rows first (`messages.py`). Left out: duplicates
of an id and over-long prompts, which only the whole data set and the tokenizer can see.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from reflectvlm.data.frames import FrameReader
from reflectvlm.data.images import BadImage, ImageLimits, RowImage, load_image
from reflectvlm.types import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

Row: TypeAlias = Mapping[str, Any]

IMAGE_MARKER = "<image>"
"""Where an image stands in a question."""
_LONGEST_DETAIL = 800


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which column holds what; every other one goes to `Sample.columns`.

    Example: `Columns(question="problem", images="image")`
    """

    question: str = "question"
    answer: str | None = "answer"
    """None: the rows have no gold answers, as where a model is only asked; each is then empty."""
    images: str | Sequence[str] | None = "images"
    """One column with an image or a list of them; several columns, read in this order; None: the
    rows have no images, which must be said so that a misspelt name cannot train a blind model."""
    id: str = "id"
    """May be absent: an id is then the row's place, `rows.jsonl:17`."""
    messages: str | None = None
    """The column with a list of Qwen-style messages, from which question, images and answer come then
    (`messages.py`). `images` and `answer` are read beside it where a row has them; `question` is not."""
    turn: str = "trace"
    """With `messages`: the column of `Sample.columns` that gets the assistant's turn. SFT trains on it."""
    system: str | None = "You are a helpful assistant."
    """With `messages`: the system turn that a row may spell out, because the run has the same. None: what
    a row has there is left out, and the run's own stands."""

    def __post_init__(self) -> None:
        answer = () if self.answer is None else (self.answer,)
        messages = () if self.messages is None else (self.messages, self.turn)
        names = (self.question, *answer, self.id, *messages, *self.image_names)
        if len(set(names)) != len(names):
            raise ValueError(f"Columns names one column twice: {names}. Each part needs its own.")

    @property
    def image_names(self) -> tuple[str, ...]:
        if self.images is None:
            return ()
        return (self.images,) if isinstance(self.images, str) else tuple(self.images)


class BadRow(ValueError):
    """A row that cannot be used, at the scan or later, when its image has gone since.

    `position` is its place, e.g. `"rows.jsonl:17"`; `reason` is short, for counting; the text is one
    line, for reading.
    """

    def __init__(self, position: str, field: str, reason: str, remedy: str, detail: str = "") -> None:
        detail = plain(detail)
        # Everything in `args`, so that the error survives pickling on its way out of a worker.
        super().__init__(position, field, reason, remedy, detail)
        self.position, self.field, self.reason, self.remedy = position, field, reason, remedy
        self.detail = detail or f"{reason} in column '{plain(field)}'."

    def __str__(self) -> str:
        return f"{plain(self.position)}: {self.detail} {self.remedy}".strip()


def plain(text: str) -> str:
    """What a row spells, such as an id or a column's name, on one line of a log: it may be of any length
    and hold line ends or a terminal's control characters."""
    if len(text) > _LONGEST_DETAIL:
        text = f"{text[: _LONGEST_DETAIL // 2]} … {text[-_LONGEST_DETAIL // 2 :]}"
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.splitlines()))


def read_row(
    row: Row,
    position: str,
    columns: Columns,
    limits: ImageLimits,
    root: Path,
    frames: FrameReader | None = None,
) -> Sample:
    """Check one row and decode its images. `position` is its place, e.g. `"rows.jsonl:17"`. `frames` takes
    the frames out of a video; None is qwen-vl-utils.

    Example: `{"question": "Area?", "answer": 12, "images": ["a.png"], "level": 3}` becomes
    `Sample(id="rows.jsonl:17", question="Area?", answer="12", images=(…,), columns={"level": 3})`.
    """
    if columns.messages is not None:
        from reflectvlm.data.messages import plain_row  # it needs this file

        row, columns = plain_row(row, position, columns, limits, root, frames)
    question = _question(row, position, columns.question)
    answer = "" if columns.answer is None else _answer(row, position, columns.answer)
    name = _id(row, position, columns.id)
    values = [value for column in columns.image_names for value in listed(row.get(column))]
    _check_markers(question, len(values), position, name, columns)
    images = tuple(_image(value, position, columns, limits, root) for value in values)
    used = {columns.question, columns.answer, columns.id, *columns.image_names}
    others = {key: value for key, value in row.items() if key not in used}
    for key, value in others.items():
        if isinstance(value, str):  # it may be a gold answer to train on, and goes into logs
            _text(value, position, key, "text")
    return Sample(id=name, question=question, answer=answer, images=images, columns=others)


def defects(row: Row, position: str, columns: Columns, look: Callable[[RowImage], object]) -> list[BadRow]:
    """Everything that `read_row` would object to, where it stops at the first: for a report of a whole file.

    `look` is what is done to each image; a BadImage that it raises is one more entry. Rows of messages
    (`Columns.messages`) have to become plain rows first.
    """
    found: list[BadRow] = []

    def kept(part: Callable[..., Any], *values: Any) -> Any:
        try:
            return part(*values)
        except BadRow as bad:
            found.append(bad)
            return None

    question = kept(_question, row, position, columns.question)
    if columns.answer is not None:
        kept(_answer, row, position, columns.answer)
    name = kept(_id, row, position, columns.id)
    images = [(column, value) for column in columns.image_names for value in listed(row.get(column))]
    if question is not None:
        kept(_check_markers, question, len(images), position, name or position, columns)
    for column, value in images:
        try:
            look(value)
        except BadImage as bad:
            found.append(_of_image(bad, position, column))
    used = {columns.question, columns.answer, columns.id, *columns.image_names}
    for key, value in row.items():
        if isinstance(value, str) and key not in used:
            kept(_text, value, position, key, "text")
    return found


def _question(row: Row, position: str, column: str) -> str:
    value = _present(row, position, column, "question")
    if not isinstance(value, str):
        remedy = "Write the question as one text."
        raise BadRow(
            position, column, "question is no text", remedy, f"Column '{column}' holds {_kind(value)}."
        )
    return _text(value, position, column, "question")


def _answer(row: Row, position: str, column: str) -> str:
    value = _present(row, position, column, "answer")
    if isinstance(value, str):
        return _text(value, position, column, "answer")
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if number and _finite(value):
        return str(value)
    remedy = "Write the answer as one text or number."
    detail = f"Column '{column}' holds {value if number else _kind(value)}."
    raise BadRow(position, column, "answer is no text", remedy, detail)


def _finite(value: int | float | Decimal) -> bool:
    """Also of what is larger than any float, and of a signalling NaN."""
    return value.is_finite() if isinstance(value, Decimal) else isinstance(value, int) or math.isfinite(value)


def _present(row: Row, position: str, column: str, part: str) -> Any:
    if column not in row:
        known = ", ".join(sorted(map(str, row))) or "none"
        detail = f"The row has no column '{column}'; its columns: {known}."
        raise BadRow(position, column, f"missing {part}", f"Add it, or set columns.{part}.", detail)
    value = row[column]
    # A table's empty cell comes back as a float NaN from some writers.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise BadRow(position, column, f"missing {part}", "Fill it, or remove the row.")
    if isinstance(value, str) and not value.strip():
        raise BadRow(position, column, f"empty {part}", "Fill it, or remove the row.")
    return value


def _text(value: str, position: str, column: str, part: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        remedy = "Write the character whole: half of a surrogate pair is no text."
        detail = f"Column '{column}' has a lone surrogate at character {error.start}."
        raise BadRow(position, column, f"{part} is no Unicode", remedy, detail) from None
    return value


def _id(row: Row, position: str, column: str) -> str:
    value = row.get(column)
    if value is None or value == "":
        return position
    if isinstance(value, str):
        return _text(value, position, column, "id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    remedy = "Use a text or a whole number, or leave it out."
    raise BadRow(position, column, "id is no text", remedy, f"Column '{column}' holds {_kind(value)}.")


def listed(value: Any) -> list[RowImage]:
    """One entry per image. A CSV cell can hold several as a JSON list: `["a.png", "b.png"]`."""
    if value is None or (isinstance(value, str | bytes) and not value):
        return []
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            return [value]  # a file whose name happens to begin with a bracket
        return inner if isinstance(inner, list) else [value]
    return [value]


def _check_markers(question: str, images: int, position: str, name: str, columns: Columns) -> None:
    markers = question.count(IMAGE_MARKER)
    if markers in (0, images):
        return
    has = f"{images} image{'s' * (images != 1)}"
    says = f"{markers} '{IMAGE_MARKER}' marker{'s' * (markers != 1)}"
    detail = f"Sample '{name}' has {has} but its question has {says}."
    remedy = "Put one marker per image, or none to place them first."
    raise BadRow(position, columns.question, "markers differ from images", remedy, detail)


def _image(value: RowImage, position: str, columns: Columns, limits: ImageLimits, root: Path) -> Image:
    try:
        return load_image(value, root, limits)
    except BadImage as bad:
        # `from None`: the cause would hold on to the frames, and so to the image's bytes.
        raise _of_image(bad, position, ", ".join(columns.image_names)) from None


def _of_image(bad: BadImage, position: str, column: str) -> BadRow:
    return BadRow(position, column, bad.reason, bad.remedy, f"Image {bad.value} {bad.rule}.")


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
