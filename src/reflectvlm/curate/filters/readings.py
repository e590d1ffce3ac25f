"""What a text says of a picture that can be pointed at: numbers, colours, places, things, names of points,
quoted labels.

A heuristic in English: lists of words, no understanding. Numbers, names of points and quoted labels are
found in any language."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

Kind = Literal["number", "colour", "place", "thing", "point", "label"]


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


COLOURS = _listed(
    "red green blue yellow orange purple pink brown black white grey gray cyan magenta violet golden "
    "silver beige teal turquoise maroon dark bright shaded striped dashed dotted coloured colored"
)
PLACES = _listed(
    "left right top bottom upper lower above below under beneath beside behind front between middle "
    "centre center central corner edge inside outside side row column axis background foreground "
    "horizontal vertical diagonal parallel perpendicular adjacent opposite nearest leftmost rightmost "
    "topmost"
)
THINGS = _listed(
    "triangle square rectangle circle polygon pentagon hexagon octagon trapezoid trapezium "
    "parallelogram rhombus quadrilateral cube cuboid cylinder cone sphere pyramid prism line segment "
    "ray arc arrow curve graph chart plot bar slice tick legend table grid cell node vertex vertices "
    "angle radius diameter chord tangent shape dot point label sign letter digit number map person "
    "people man woman boy girl child hand face eye hat shirt dog cat bird horse cow sheep car bus truck "
    "train bicycle bike motorcycle boat plane tree flower grass sky cloud sun water road street "
    "building house window door wall floor chair bed book cup bottle plate bowl ball clock phone screen "
    "keyboard fruit apple banana"
)
NUMBERS = _listed("zero one two three four five six seven eight nine ten eleven twelve")

_SUFFIX = "(?:s|es)?"
_WORDS: dict[Kind, tuple[str, ...]] = {"colour": COLOURS, "place": PLACES, "thing": THINGS}
_NUMBER = re.compile(rf"\d+(?:[.,]\d+)*|\b(?:{'|'.join(NUMBERS[2:])})\b", re.IGNORECASE)
_POINT = re.compile(r"(?<![^\W\d_])(?:[B-HJ-Z]|[A-Z]{2,4})(?![^\W\d_]|')")
_LABEL = re.compile(
    r"\"[^\"\n]{1,60}\"|“[^”\n]{1,60}”|‘[^’\n]{1,60}’|「[^」\n]{1,60}」|`[^`\n]{1,60}`|(?<!\w)'[^'\n]{1,60}'(?!\w)"
)
_SIGNS = "+-*/=×÷·^<>−"
_SAID_OF = re.compile(r"[A-Za-z°}]\s*[=:<>]\s*$")
_CORRECT = re.compile(
    r"\b(?:is|are|was|were|be|seems|not|all|that's|it's) (?:quite |also )?(?:right|left)\b(?! of)",
    re.IGNORECASE,
)
"""What is right is no place, and neither is what is left."""
_SHOUTED = re.compile(r"\b[A-Z]{5,}\b")


class Reading(NamedTuple):
    kind: Kind
    text: str
    start: int
    end: int


def readings(text: str, things: Sequence[str] = ()) -> list[Reading]:
    """All of them in their order; `things` are further words.

    A number inside arithmetic ("3 + 4 = 7") is worked out and not read; one that something is said to be
    ("AB = 7") counts. "One" is a pronoun and "I" and "A" are words, so they do not."""
    found = [
        Reading("number", one.group(), *one.span()) for one in _NUMBER.finditer(text) if _is_read(text, one)
    ]
    found += [
        Reading("point", one.group(), *one.span()) for one in _POINT.finditer(_SHOUTED.sub(_blank, text))
    ]
    found += [Reading("label", one.group(), *one.span()) for one in _LABEL.finditer(text)]
    text = _CORRECT.sub(_blank, text)
    for kind, listed in _WORDS.items():
        more = tuple(map(re.escape, things)) if kind == "thing" else ()
        pattern = re.compile(rf"\b(?:{'|'.join((*listed, *more))}){_SUFFIX}\b", re.IGNORECASE)
        found += [Reading(kind, one.group(), *one.span()) for one in pattern.finditer(text)]
    return sorted(found, key=lambda one: (one.start, one.end))


def _is_read(text: str, number: re.Match[str]) -> bool:
    behind = text[number.end() : number.end() + 4].lstrip(" \\$)")[:1]
    if (
        behind
        and behind in _SIGNS
        and not re.match(r"\s*-\w*[A-Za-z]", text[number.end() : number.end() + 8])
    ):
        return False
    before = text[max(number.start() - 12, 0) : number.start()].rstrip(" \\$(")
    if not before or before[-1] not in _SIGNS:
        return True
    return _SAID_OF.search(before) is not None


def _blank(match: re.Match[str]) -> str:
    return " " * len(match.group())
