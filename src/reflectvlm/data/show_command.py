"""`reflectvlm data show FILE`: rows as people read them, in the terminal or as a page that stands alone.

What is shown is what training will see: the checked sample, its images decoded within the limits. A row that
cannot be used is shown with the reason.
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from reflectvlm.data.images import ImageLimits
from reflectvlm.data.rows import BadRow, Columns, read_row
from reflectvlm.data.sources import Source
from reflectvlm.data.streaming import stream
from reflectvlm.data.tool_words import ROWS, Words
from reflectvlm.html import pieces, tag_color, thumbnail
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.printing import SafeStream
from reflectvlm.train.table import say, visible
from reflectvlm.types import Sample

if TYPE_CHECKING:
    from rich.console import Console

KEYS = (*ROWS, "rows", "out", "width", "side")

HELP = """\
reflectvlm data show FILE [rows=1-3] [out=page.html] [columns.question=problem]

  reflectvlm data show rows.jsonl rows=2,7-9
  reflectvlm data show rows.jsonl rows=1-40 out=page.html

  Rows with their pictures: half-block pixels where the terminal has true colours, else sizes.

  rows=2,7-9       which rows, counted from 1 (default 1-3)     out=FILE.html  a page instead
  width=48         columns of a picture in the terminal         side=240       its pixels on the page
"""

_RANGE = re.compile(r"(\d+)(?:-(\d+))?\Z")
_LONGEST = 2000
"""Characters of a column that are shown."""
_COLORS = ("magenta", "green", "yellow", "red", "cyan", "blue", "bright_red", "bright_magenta")
_HUES = (300, 120, 50, 0, 180, 220, 20, 330)


@dataclass(frozen=True)
class Chosen:
    """Row numbers, from `rows=2,7-9`."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, text: str) -> Chosen:
        found = []
        for part in text.split(","):
            match = _RANGE.match(part.strip())
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            if not 1 <= first <= last:
                raise RecipeError(f"rows is {text!r}. Write numbers from 1 and ranges of them: rows=2,7-9")
            found.append((first, last))
        return cls(tuple(found))

    def __contains__(self, number: object) -> bool:
        return any(first <= cast("int", number) <= last for first, last in self.ranges)

    @property
    def last(self) -> int:
        return max(last for _, last in self.ranges)


def run(words: list[str]) -> int:
    """Runs the command and returns its exit code."""
    read = Words.read(words, "show", KEYS)
    chosen = Chosen.read(read.given.text("rows") or "1-3")
    source, columns = read.source, read.columns
    width, side = read.whole("width", 48, 4) or 0, read.whole("side", 240, 16) or 0
    shown = rows(source, columns, chosen, read.root)
    if (out := read.given.text("out")) is not None:
        count = write_page(Path(out).expanduser(), read.file, shown, side)
    else:
        count = print_rows(shown, width)
    if not count:
        raise RecipeError(
            f"{read.file} has fewer rows than rows={read.given.text('rows') or '1-3'} asks for."
        )
    return 0


Shown = tuple[int, str, Sample | BadRow]


def rows(source: Source, columns: Columns, chosen: Chosen, root: Path | None) -> Iterator[Shown]:
    """(number, place, sample or what is wrong) of the chosen rows."""
    folder, limits = root if root is not None else source.root, ImageLimits()
    for number, (position, row) in enumerate(stream(source), start=1):
        if number > chosen.last:
            return
        if number not in chosen:
            continue
        try:
            if isinstance(row, BadRow):
                raise row
            yield number, position, read_row(row, position, columns, limits, folder)
        except BadRow as bad:
            yield number, position, bad


def parts(sample: Sample) -> Iterator[tuple[str, str]]:
    """(name, text) of all that a sample holds beside its images."""
    yield "question", sample.question
    yield "answer", sample.answer
    for name, value in sample.columns.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_kind)
        yield name, text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"


def _kind(value: Any) -> str:
    return f"<{type(value).__name__}>"


# -- the terminal ---------------------------------------------------------------------------------


def print_rows(shown: Iterator[Shown], width: int, out: Console | None = None) -> int:
    """How many were printed."""
    from rich.console import Console
    from rich.text import Text

    from reflectvlm.data.pixels_shown import half_blocks

    if out is None and not SafeStream(sys.stdout).isatty():
        return _print_plainly(shown)
    out = out or Console(file=cast("Any", SafeStream(sys.stdout)), highlight=False)
    count = 0
    for number, position, row in shown:
        count += 1
        out.print(Text(f"{number}  {_name(position, row)}", style="bold"))
        if isinstance(row, BadRow):
            out.print(Text(visible(str(row)), style="red"))
            continue
        for place, image in enumerate(row.images, start=1):
            if out.color_system == "truecolor":
                out.print(half_blocks(image, width), end="")
            out.print(Text(_size(place, image), style="dim"))
        for name, text in parts(row):
            out.print(Text(f"{visible(name)}: ", style="bold").append(_tagged(text)), soft_wrap=True)
        out.print()
    return count


def _print_plainly(shown: Iterator[Shown]) -> int:
    count = 0
    for number, position, row in shown:
        count += 1
        say(f"{number}  {_name(position, row)}")
        if isinstance(row, BadRow):
            say(f"  {row}")
            continue
        for place, image in enumerate(row.images, start=1):
            say(f"  {_size(place, image)}")
        for name, text in parts(row):
            say(f"  {name}: {' '.join(text.split())}")
    return count


def _name(position: str, row: Sample | BadRow) -> str:
    named = isinstance(row, Sample) and row.id != position
    return visible(f"{position}  id {row.id}") if named else visible(position)  # type: ignore[union-attr]


def _size(place: int, image: Any) -> str:
    return f"[image {place}: {image.width} x {image.height}]"


def _tagged(text: str) -> Any:
    from rich.text import Text

    shown = Text()
    for piece in pieces(text):
        # Line ends are the row's own layout; anything else that moves a cursor is spelled out.
        plain = "\n".join(map(visible, piece.text.split("\n")))
        shown.append(plain, None if piece.tag is None else _COLORS[tag_color(piece.tag, len(_COLORS))])
    return shown


# -- the page -------------------------------------------------------------------------------------

_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 ui-sans-serif, system-ui, sans-serif; }}
body {{ max-width: 60em; margin: 2em auto; padding: 0 1em; }}
article {{ border-top: 1px solid #8888; padding: 1em 0; }}
h2 {{ font-size: 1em; margin: 0 0 .5em; }} h2 small {{ font-weight: normal; opacity: .7; }}
dt {{ font-weight: 600; }} dd {{ margin: 0 0 .5em; white-space: pre-wrap; overflow-wrap: anywhere; }}
.bad {{ color: #c33; }}
figure {{ display: inline-block; margin: 0 .5em .5em 0; }} figcaption {{ opacity: .7; }}
</style></head><body><h1>{title}</h1>
"""


def write_page(path: Path, title: str, shown: Iterator[Shown], side: int) -> int:
    """A page without a script, without a link, whose rows are escaped. Never overwrites a file."""
    count = 0
    try:
        with path.open("x", encoding="utf-8") as page:
            page.write(_HEAD.format(title=html.escape(title)))
            for number, position, row in shown:
                count += 1
                page.write(_article(number, position, row, side))
            page.write("</body></html>\n")
    except OSError as error:
        raise RecipeError(f"out={path} cannot be made ({error.strerror}). Name a new file.") from error
    say(f"{count} rows in {path}")
    return count


def _article(number: int, position: str, row: Sample | BadRow, side: int) -> str:
    head = f"<h2>{number} <small>{html.escape(_name(position, row))}</small></h2>"
    if isinstance(row, BadRow):
        return f"<article>{head}<p class='bad'>{html.escape(str(row))}</p></article>\n"
    pictures = "".join(
        f"<figure>{thumbnail(image, side)}<figcaption>{image.width} x {image.height}</figcaption></figure>"
        for image in row.images
    )
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{_marked(text)}</dd>" for name, text in parts(row))
    return f"<article>{head}{pictures}<dl>{listed}</dl></article>\n"


def _marked(text: str) -> str:
    found = []
    for piece in pieces(text):
        escaped = html.escape(piece.text)
        if piece.tag is not None:
            hue = _HUES[tag_color(piece.tag, len(_HUES))]
            escaped = f"<span style='background:hsla({hue},75%,55%,.28);border-radius:4px'>{escaped}</span>"
        found.append(escaped)
    return "".join(found)
