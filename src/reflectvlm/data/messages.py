"""`plain_row`: a row of Qwen-style messages -> a plain row with a question, its images and a gold answer.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png", "max_pixels": 200704},
                                               {"type": "text", "text": "What is the area?"}]},
                  {"role": "assistant", "content": "<think>3 x 4</think> \\\\boxed{12}"}], "answer": "12"}

A `Sample` is one question with one answer. So the turns are: a system turn, if it is the run's own; one
user turn, whose parts become a question with `<image>` markers, in order and without a character between
them, as Qwen's chat template writes them; and the assistant's turn, which is the gold answer and what SFT
trains on, unless the row has columns of its own for these. Earlier turns are refused: a model would be asked
about a conversation that it did not lead. Images beside the messages (`images`, with `<image>` in a text or
parts `{"type": "image"}` as places) are read as well. Nulls count as absent, because a table gives every
part the keys of all others.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflectvlm.data.fetch import BadImage, ImageLimits
from reflectvlm.data.frames import FrameReader, load_frames
from reflectvlm.data.images import load_image
from reflectvlm.data.rows import IMAGE_MARKER, BadRow, Columns, Row

if TYPE_CHECKING:
    from PIL.Image import Image

_SIZES = ("resized_height", "resized_width", "min_pixels", "max_pixels")
_WHOLE = (*_SIZES, "nframes", "min_frames", "max_frames", "total_pixels")
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "text": (),
    "image": _SIZES,
    "image_url": _SIZES,
    "video": (*_WHOLE, "fps", "video_start", "video_end", "sample_fps", "raw_fps"),
}
"""Kinds of parts, which are the names of their values too, and the other keys that each may have."""
_ROLES = ("system", "user", "assistant")
_MOST = 10**9


def plain_row(
    row: Row, position: str, columns: Columns, limits: ImageLimits, root: Path, frames: FrameReader | None
) -> tuple[Row, Columns]:
    """The row without messages, and the columns by which it is read. Raises BadRow."""
    assert columns.messages is not None
    reader = _Reader(position, columns.messages, limits, root, frames)
    turns = _turns(reader, row)
    _check_system(reader, turns.get("system"), columns.system)
    question, images = _shown(reader, turns["user"])
    beside = [name for name in columns.image_names if not _absent(row.get(name))]
    if images and beside:
        remedy = "Keep the images in one place."
        raise reader.bad("images twice", f"Images stand in column '{beside[0]}' and in the messages.", remedy)
    left = {columns.messages, *(columns.image_names if images else ())}
    made = {name: value for name, value in row.items() if name not in left}
    if "assistant" in turns:
        gold = reader.text(turns["assistant"], "assistant")
        for name in filter(None, (columns.answer, columns.turn)):
            if _absent(made.get(name)):
                made[name] = gold
    # Under the messages' own name: what is wrong with the question is told in terms of the row.
    made[columns.messages] = question
    where = f"{columns.messages}: images"
    if images:
        made[where] = images
    return made, dataclasses.replace(
        columns,
        messages=None,
        question=columns.messages,
        images=where if images else columns.images,
    )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """One row's place and column, for messages; and what its images may cost."""

    position: str
    column: str
    limits: ImageLimits
    root: Path
    frames: FrameReader | None

    def bad(self, reason: str, detail: str, remedy: str) -> BadRow:
        return BadRow(self.position, self.column, reason, remedy, detail)

    def parts(self, content: Any, role: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(kind, part without nulls) of a turn's content, a text or a list of parts."""
        listed = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(listed, Sequence):
            detail = f"The {role} turn has no content: it is {type(content).__name__}."
            raise self.bad("broken messages", detail, "Write a text, or a list of parts.")
        for number, part in enumerate(listed, start=1):
            kept = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {}
            kind = kept.get("type") or next((name for name in _OPTIONS if name in kept), None)
            # An image without its value is a place for one of the row's own images.
            if not isinstance(kind, str) or kind not in _OPTIONS or kind not in {*kept, "image"}:
                detail = f"Part {number} of the {role} turn is no {', '.join(_OPTIONS)} with its value."
                remedy = "Write {'type': 'image', 'image': …}, and so on."
                raise self.bad("broken messages", detail, remedy)
            self._check_options(kind, kept, number, role)
            yield kind, kept

    def _check_options(self, kind: str, part: Mapping[str, Any], number: int, role: str) -> None:
        """Keys and values that qwen-vl-utils would overlook or stumble over."""
        where, known = f"part {number} of the {role} turn", _OPTIONS[kind]
        if unknown := sorted(str(key) for key in part if key not in (*known, "type", kind)):
            detail = f"Key '{unknown[0]}' in {where} is unknown; known: {', '.join((kind, *known))}."
            raise self.bad("unknown key in messages", detail, "Correct or remove it.")
        for name in filter(part.__contains__, known):
            value, whole = part[name], name in _WHOLE
            if not _is_number(value, whole):
                rule = f"{'a whole number from 1' if whole else 'a number from 0'} to {_MOST:,}"
                raise self.bad("broken messages", f"{name} in {where} is not {rule}.", "Correct it.")
        if wrong := _disagreement(part):
            raise self.bad("broken messages", f"In {where} {wrong}.", "Correct it.")

    def text(self, content: Any, role: str) -> str:
        """The text of a turn that can hold nothing else."""
        found = []
        for kind, part in self.parts(content, role):
            if kind != "text":
                detail = f"The {role} turn holds a part of kind '{kind}'."
                raise self.bad("image in an answer", detail, "Only the user shows images: move it there.")
            found.append(self.string(part["text"], role))
        return "".join(found)

    def string(self, value: Any, role: str) -> str:
        if not isinstance(value, str):
            detail = f"A text of the {role} turn is of type {type(value).__name__}."
            raise self.bad("broken messages", detail, "Write it as a text.")
        return value

    def images(self, kind: str, part: dict[str, Any]) -> tuple[Image, ...]:
        """What a visual part shows: an image, or the frames of a video."""
        options = {name: part[name] for name in _OPTIONS[kind] if name in part}
        try:
            if kind == "video":
                return load_frames(part[kind], options, self.root, self.limits, self.frames)
            value = part[kind]
            if kind == "image_url" and isinstance(value, Mapping):  # as OpenAI's clients write it
                value = value.get("url")
            return (_resized(load_image(value, self.root, self.limits), options),)
        except BadImage as bad:
            detail = f"{'Video' if kind == 'video' else 'Image'} {bad.value} {bad.rule}."
            raise BadRow(self.position, self.column, bad.reason, bad.remedy, detail) from None


def _turns(reader: _Reader, row: Row) -> dict[str, Any]:
    """Content by role: `user`, and perhaps `system` before it and `assistant` after it."""
    value = row.get(reader.column)
    if isinstance(value, str) and value[:1] == "[":  # a cell of a CSV file
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise reader.bad("broken messages", "The messages are no JSON.", "Write a JSON list.") from None
    if _absent(value) or not isinstance(value, list | tuple) or not value:
        known = ", ".join(sorted(map(str, row))) or "none"
        detail = f"Column '{reader.column}' holds no list of messages; the row's columns: {known}."
        raise reader.bad("missing messages", detail, "Fill it, or set columns.messages.")
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in value]
    if strange := [role for role in roles if role not in _ROLES]:
        detail = f"A message has the role {str(strange[0])[:40]!r}."
        raise reader.bad("broken messages", detail, f"Roles are {', '.join(_ROLES)}.")
    if roles != [role for role in _ROLES if role in roles] or "user" not in roles:
        remedy = "One question and one answer make a row: split the conversation into rows."
        detail = f"The turns are {', '.join(map(str, roles[:6]))}{', …' if len(roles) > 6 else ''}."
        raise reader.bad("several turns", detail, remedy)
    return {role: message.get("content") for role, message in zip(roles, value, strict=True)}


def _check_system(reader: _Reader, content: Any, expected: str | None) -> None:
    if content is None or expected is None:
        return
    if (found := reader.text(content, "system")) != expected:
        detail = f"The system turn is {found[:80]!r}, and the run's is {expected[:80]!r}."
        remedy = (
            "Set instruction.system and data.columns.system to that of the rows, or data.columns.system=null "
            "to leave theirs out."
        )
        raise reader.bad("another system turn", detail, remedy)


def _shown(reader: _Reader, content: Any) -> tuple[str, list[Image]]:
    """The user's turn as a question with markers, and the images they stand for."""
    pieces: list[str] = []
    images: list[Image] = []
    spelled = places = False
    for kind, part in reader.parts(content, "user"):
        if kind == "text":
            text = reader.string(part["text"], "user")
            spelled = spelled or IMAGE_MARKER in text
            pieces.append(text)
        elif kind not in part:
            places = True
            pieces.append(IMAGE_MARKER)
        else:
            found = reader.images(kind, part)
            images += found
            pieces.append(IMAGE_MARKER * len(found))
    if spelled + places + bool(images) > 1:
        ways = f"parts with images, parts without, '{IMAGE_MARKER}' in a text"
        detail = f"Images are placed in several ways: {ways}."
        raise reader.bad("markers differ from images", detail, "Use one of them.")
    return "".join(pieces), images


def _resized(image: Image, wish: Mapping[str, Any]) -> Image:
    if not wish:
        return image
    from reflectvlm.models.item_size import item_size

    try:
        size = item_size(*image.size, {name: int(value) for name, value in wish.items()})
    except ValueError as error:
        raise BadImage("image too narrow", "of the messages", str(error), "Correct its size.") from None
    return image.resize(size)


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return (1 if whole else 0) <= value <= _MOST and not (whole and value != int(value))


def _disagreement(part: Mapping[str, Any]) -> str | None:
    if ("resized_height" in part) != ("resized_width" in part):
        return "resized_height and resized_width do not stand together"
    if part.get("min_pixels", 0) > part.get("max_pixels", math.inf):
        return "min_pixels is more than max_pixels"
    if "fps" in part and "nframes" in part:
        return "fps and nframes both say how many frames are taken"
    return None


def _absent(value: Any) -> bool:
    """Null, or a table's empty cell."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
