"""Rollouts and groups as HTML for notebooks and reports.

Everything a model or a data set wrote is escaped. Styles are inline and colours are tints over the
page's own, so a fragment stands alone and reads on light and dark pages. Left out: attention maps.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from reflectvlm.types import Grid, Rollout, ScoredGroup, Text, Visual

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 96
"""Longest side of a picture, in pixels."""
KEPT = 48
"""The same for the picture in an inserted block that shows which tokens were chosen."""

_TAG = re.compile(r"<(/?)([A-Za-z_][\w-]{0,31})>")
_TRIGGERS = ("REFLECTION", "back")
"""Tags that usually ask for the image again; they decide if several tags would fit."""

_BOX = "border:1px solid rgba(128,128,128,.35);border-radius:8px;padding:8px 12px;margin:6px 0;"
_FONT = "font:13px/1.55 ui-sans-serif,system-ui,sans-serif;color:inherit;"
_PRE = "white-space:pre-wrap;overflow-wrap:anywhere;font:12.5px/1.6 ui-monospace,Menlo,Consolas,monospace;"
_FAINT = "opacity:.72;"
_CHIP = "border-radius:10px;padding:0 7px;margin:0 2px;white-space:nowrap;"
_VISUAL = _CHIP + "background:rgba(60,130,246,.22);border:1px solid rgba(60,130,246,.55);"
_HUES = (275, 150, 30, 330, 190, 95, 0, 230)


def rollout_html(rollout: Rollout, *, trigger: str | None = None) -> str:
    """One answer with its question and thumbnails. `trigger`, e.g. `"<back>"`, says at which tag
    the inserted images belong; without it the tag is found where that is unambiguous."""
    return _box(_question(rollout) + _answer(rollout, trigger))


def group_html(group: ScoredGroup, *, trigger: str | None = None) -> str:
    """A prompt once, and each of its answers with every reward by name."""
    if not group.rollouts:
        return _box(f"<div style='{_FAINT}'>An empty group.</div>")
    answers = [
        f"<div style='{_BOX}'>{_rewards(group, index)}{_answer(rollout, trigger)}</div>"
        for index, rollout in enumerate(group.rollouts)
    ]
    return _box(_question(group.rollouts[0]) + "".join(answers))


class Piece(NamedTuple):
    """A stretch of an answer: plain text, or one tag (`tag` is its name without brackets)."""

    text: str
    tag: str | None


def pieces(text: str) -> Iterator[Piece]:
    """Cut a text at its tags: `"a<back>b"` -> `a`, `<back>`, `b`. Joined, they are the text."""
    end = 0
    for match in _TAG.finditer(text):
        if match.start() > end:
            yield Piece(text[end : match.start()], None)
        yield Piece(match[0], match[2])
        end = match.end()
    if end < len(text):
        yield Piece(text[end:], None)


def block_label(block: Visual, grids: Sequence[Grid]) -> str:
    """What an inserted block holds: `"image 0: 8 of 16 tokens"`."""
    tokens = grids[block.image].tokens
    shown = f"all {tokens}" if block.keep is None else f"{len(block.keep)} of {tokens}"
    return f"image {block.image}: {shown} tokens"


def tag_color(tag: str, colors: int) -> int:
    """A number below `colors`, always the same one for a tag's name."""
    return zlib.crc32(tag.lower().encode()) % colors


def _box(body: str) -> str:
    return f"<div style='{_FONT}{_BOX}max-width:60em'>{body}</div>"


def _question(rollout: Rollout) -> str:
    sample = rollout.prompt.sample
    pictures = "".join(thumbnail(image) for image in sample.images)
    gold = f"<div style='margin-bottom:6px'><b>Answer</b> {html.escape(sample.answer)}</div>"
    return (
        f"<div style='{_FAINT}'>sample {html.escape(sample.id)}</div>{pictures}"
        f"<div style='white-space:pre-wrap'><b>Question</b> {html.escape(sample.question)}</div>"
        + (gold if sample.answer else "")
    )


def thumbnail(image: Image, side: int = THUMBNAIL) -> str:
    """A picture as markup that stands alone."""
    return _picture(_small(image, side), "image", "border-radius:4px;margin:4px 6px 4px 0")


def _small(image: Image, side: int) -> Image:
    small = image.convert("RGB")
    small.thumbnail((side, side))
    return small


def _picture(image: Image, name: str, style: str) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='{name}' src='data:image/png;base64,{data}' style='{style}'>"


def _kept(rollout: Rollout, block: Visual) -> str:
    """The image of a block with all cells faded that were not chosen."""
    images, grid = rollout.prompt.sample.images, rollout.prompt.grids[block.image]
    if block.keep is None or block.image >= len(images):
        return ""
    from PIL import Image

    small = _small(images[block.image], KEPT)
    faded = Image.blend(small.convert("L").convert("RGB"), Image.new("RGB", small.size, "grey"), 0.8)
    cells = [255 * (cell in block.keep) for cell in range(grid.rows * grid.columns)]
    mask = Image.frombytes("L", (grid.columns, grid.rows), bytes(cells))
    mask = mask.resize(small.size, Image.Resampling.NEAREST)
    style = "border-radius:3px;margin:2px 0 2px 5px;vertical-align:middle"
    return _picture(Image.composite(small, faded, mask), "chosen tokens", style)


def _rewards(group: ScoredGroup, index: int) -> str:
    scored = group.scored[index]
    shown: Mapping[str, float] = {name: values[index] for name, values in group.parts.items()}
    total = f"reward {_number(group.rewards[index])}" if scored else "not scored"
    chips = "".join(
        f"<span style='{_CHIP}background:rgba(128,128,128,.18)'>{html.escape(name)} {_number(value)}</span>"
        for name, value in shown.items()
    )
    return f"<div><b>#{index} · {total}</b> {chips}</div>"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def _answer(rollout: Rollout, trigger: str | None) -> str:
    chips = list(_chips(rollout))
    places = _places(rollout, chips, trigger) if chips else []
    body = _body(rollout.text, chips if places else [], places)
    after = _chip_list(chips) if chips and not places else ""
    foot = f"stop: {rollout.stop} · {len(rollout.sampled_ids)} sampled tokens"
    return f"<div style='{_PRE}'>{body}</div>{after}<div style='{_FAINT}'>{foot}</div>"


class _Chip(NamedTuple):
    markup: str
    offset: int
    """Text tokens in front of the insertion."""
    before: bool


def _chips(rollout: Rollout) -> Iterator[_Chip]:
    offset = 0
    for span in rollout.spans:
        if isinstance(span, Text):
            offset += len(span.ids)
        else:
            label = f"⟦{block_label(span, rollout.prompt.grids)}⟧{_kept(rollout, span)}"
            yield _Chip(f"<span style='{_VISUAL}'>{label}</span>", offset, span.before_sampled)


def _places(rollout: Rollout, chips: Sequence[_Chip], trigger: str | None) -> list[int]:
    """The character at which each insertion stands; empty if that is unknown."""
    if rollout.offsets:
        return [(*rollout.offsets, len(rollout.text))[chip.offset] for chip in chips]
    tag = _tag_of_insertions(rollout, trigger)
    if tag is None:
        return []
    ends = [(match.start(), match.end()) for match in re.finditer(re.escape(tag), rollout.text)]
    return [start if chip.before else end for chip, (start, end) in zip(chips, ends, strict=True)]


def _tag_of_insertions(rollout: Rollout, trigger: str | None) -> str | None:
    """The tag whose every occurrence belongs to one insertion, if exactly one tag can be it.

    Without `offsets` a rollout knows the places of its insertions in tokens, not in characters; equal
    counts give the place in the text. Blocks of both kinds (in front of the tag, behind it) are not
    told apart.
    """
    found = rollout.insertions
    if not found or len({span.before_sampled for span in found}) > 1:
        return None
    tags = [match[0] for match in _TAG.finditer(rollout.text) if not match[1]]
    fits = [tag for tag in dict.fromkeys(tags) if tags.count(tag) == len(found)]
    if trigger is not None:
        return trigger if trigger in fits else None
    if len(fits) > 1:
        fits = [tag for tag in fits if tag.strip("<>") in _TRIGGERS]
    return fits[0] if len(fits) == 1 else None


def _body(text: str, chips: Sequence[_Chip], places: Sequence[int]) -> str:
    """The text in colours, with each insertion in front of its character."""
    waiting = sorted(zip(places, chips, strict=True), key=lambda pair: pair[0])
    out, end = [], 0
    for piece in pieces(text):
        start, end = end, end + len(piece.text)
        while waiting and waiting[0][0] < end:
            place, chip = waiting.pop(0)
            out += [_colored(text[start:place], piece.tag), chip.markup]
            start = max(start, place)
        out.append(_colored(text[start:end], piece.tag))
    return "".join([*out, *(chip.markup for _, chip in waiting)])


def _colored(text: str, tag: str | None) -> str:
    if tag is None or not text:
        return html.escape(text)
    hue = _HUES[tag_color(tag, len(_HUES))]
    style = f"background:hsla({hue},75%,55%,.28);border-radius:4px;padding:0 3px;font-weight:600"
    return f"<span style='{style}'>{html.escape(text)}</span>"


def _chip_list(chips: list[_Chip]) -> str:
    items = "".join(f"<div>{chip.markup} after {chip.offset} tokens</div>" for chip in chips)
    return f"<div style='margin:4px 0'><b>Inserted</b>{items}</div>"
