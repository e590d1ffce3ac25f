"""Does a text have the gold answer as a value of its own, somewhere or at its start?

A choice is its capital letter; a number any number of the same value, spelled out up to twelve; everything
else its characters without white space and mark-up, not inside of a longer word."""

from __future__ import annotations

import re
from fractions import Fraction

from reflectvlm.curate.filters.readings import NUMBERS
from reflectvlm.rewards.answers import extract_letter, extract_number, kind_of

_OPENING = re.compile(r"(?:[\s$*_\"'“‘`(\[{]|\\[(\[]|\\(?:boxed|text|mathrm|mathbf)\s*\{)+")
_NUMBER = re.compile(
    rf"[-+−]?(?:\\[dt]?frac\{{\d+\}}\{{\d+\}}|\d[\d,]*(?:\.\d+)?(?:/\d+)?)|\b(?:{'|'.join(NUMBERS)})\b",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"(?:the|an?)\s+(?=\S)", re.IGNORECASE)
_LONGEST = 40
"""Characters of a number."""


def mentions(gold: str, text: str) -> bool:
    """Example: `mentions("7", "upper left 7, upper right 17")`, and not `mentions("7", "17")`."""
    kind = kind_of(gold)
    if kind == "choice":
        letter = re.escape(extract_letter(gold) or gold.strip())
        return re.search(rf"(?<![^\W_]){letter}(?![^\W_]|')", text) is not None
    if kind == "number":
        wanted = extract_number(gold)
        # "AB-7" and "3-7" are 7 here, too: a sign behind a word or number may be a dash.
        values = (_value(one.group()) for one in _NUMBER.finditer(text))
        return any(
            value == wanted or (value is not None and wanted is not None and -value == wanted > 0)
            for value in values
        )
    return _found(_compact(gold), _compact(text)) is not None


def begins_with(gold: str, text: str) -> int:
    """Where the gold answer ends if the text begins with it, brackets, quotes and `$` left aside; else 0."""
    opening = _OPENING.match(text)
    start = opening.end() if opening else 0
    kind = kind_of(gold)
    if kind == "choice":
        letter = (extract_letter(gold) or gold.strip()).upper()
        word = r"(?! (?!because|since|as\b|or\b|and\b)[a-z])" if letter in "AI" else ""  # "A square", "I see"
        return (
            start + 1 if re.match(rf"{re.escape(letter)}(?![^\W_]|'){word}", text[start : start + 20]) else 0
        )
    if kind == "number":
        number = _NUMBER.match(text, start)
        value = _value(number.group()) if number else None
        return number.end() if number and value is not None and value == extract_number(gold) else 0
    article = _ARTICLE.match(text, start)
    return _prefix(
        _compact(gold).removeprefix("the ").removeprefix("an ").removeprefix("a "),
        text,
        article.end() if article else start,
    )


def _value(number: str) -> Fraction | None:
    spelled = number.lower().lstrip("-+−")
    if spelled in NUMBERS:
        return Fraction(NUMBERS.index(spelled))
    return extract_number(number.rstrip(",")) if len(number) <= _LONGEST else None


def _compact(text: str) -> str:
    """Words with one space between them, so that `\\sqrt{2} cm` and `\\sqrt{2}cm` are different and letters
    keep apart."""
    return " ".join(re.sub(r"[$*_`\"“”]|\\[()\[\]]", " ", text).casefold().split())


def _found(gold: str, text: str) -> int | None:
    start = text.find(gold) if gold else -1
    while start >= 0:
        if _apart(text[start - 1 : start] if start else "", gold[0]) and _apart(
            text[start + len(gold) : start + len(gold) + 1], gold[-1]
        ):
            return start
        start = text.find(gold, start + 1)
    return None


def _prefix(gold: str, text: str, start: int) -> int:
    """About the end of the gold answer in `text`: mark-up inside of it is not counted."""
    if not gold:
        return 0
    said = _compact(text[start : start + 2 * len(gold) + 20])
    if not said.startswith(gold) or not _apart(said[len(gold) : len(gold) + 1], gold[-1]):
        return 0
    return start + len(gold)


def _apart(neighbour: str, edge: str) -> bool:
    return not (neighbour.isalnum() and edge.isalnum())
