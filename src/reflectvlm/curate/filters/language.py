"""Is the trace written in the script of its question? Scripts, not languages: English and German look alike
here."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reflectvlm.curate.types import Trace

_NEUTRAL = frozenset(
    {
        "MATHEMATICAL",
        "DOUBLE",
        "SCRIPT",
        "BLACK",
        "MICRO",
        "KELVIN",
        "ANGSTROM",
        "MODIFIER",
        "FEMININE",
        "MASCULINE",
        "PLANCK",
        "PARENTHESIZED",
    }
)
"""First words of the names of letters that no language writes."""
_WRITTEN = 0.25
"""Share of a question's letters in a script that it is written in."""
_EAST = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO"})
_GREEK = re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]{1,2}(?![\u0370-\u03ff\u1f00-\u1fff])")


@dataclass(frozen=True, kw_only=True)
class Language:
    """At least `share` of the letters are of the allowed scripts.

    Not counted: LaTeX commands, letters made for mathematics, Greek words of one or two letters, and what
    the question or the gold answer contains, which a trace may quote. Chinese, Japanese and Korean letters
    count as one script."""

    scripts: Sequence[str] | None = None
    """As Unicode names them: `LATIN`, `CJK`, `CYRILLIC`, …; None: those in which a quarter of the
    question's letters are, and Latin, which formulas are in."""
    share: float = 0.98
    name: ClassVar[str] = "language"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(
                f"Language.share is {self.share}. It is a share of the letters, above 0 and at most 1."
            )
        if isinstance(self.scripts, str):
            raise ValueError(f"Language.scripts is {self.scripts!r}. It is a list: [{self.scripts!r}].")  # noqa: TRY004 - what a user wrote in a recipe
        if self.scripts is not None and (not self.scripts or any(one != one.upper() for one in self.scripts)):
            raise ValueError(f"Language.scripts is {self.scripts}. Name them in capitals, e.g. ['LATIN'].")

    def __call__(self, trace: Trace, /) -> str | None:
        asked = f"{trace.question.question} {trace.question.answer}"
        allowed = {"LATIN", *_scripts(trace.question.question)} if self.scripts is None else {*self.scripts}
        if allowed & _EAST:
            allowed |= {"CJK"}
        if trace.text.isascii() and "LATIN" in allowed:
            return None
        found = _letters(re.sub(r"\\[A-Za-z]+", " ", trace.text), frozenset(asked))
        total = sum(found.values())
        other = {script: times for script, times in found.items() if script not in allowed}
        if total and sum(other.values()) > (1 - self.share) * total:
            most = max(other, key=lambda script: other[script])
            wanted = " or ".join(sorted(allowed))
            return f"{sum(other.values()):,} of {total:,} letters are not {wanted}, most of them {most}"
        return None


def _scripts(question: str) -> list[str]:
    """Those that a question is written in; a label that it quotes makes none."""
    found = _letters(question)
    return [script for script, times in found.items() if times >= _WRITTEN * sum(found.values())]


def _letters(text: str, quoted: frozenset[str] = frozenset()) -> Counter[str]:
    """Letters by script."""
    found: Counter[str] = Counter()
    for letter, times in Counter(_GREEK.sub(_short_greek, text)).items():
        script = _script(letter)
        if script and (letter.isascii() or letter not in quoted):
            found[script] += times
    return found


def _short_greek(match: re.Match[str]) -> str:
    """One or two Greek letters by themselves are a formula's; the end of a longer word is none."""
    start = match.start()
    before = match.string[start - 1] if start else ""
    return match.group() if _script(before) == "GREEK" else " "


@functools.lru_cache(maxsize=2**14)
def _script(letter: str) -> str:
    """`LATIN`, `CJK`, …; empty for what is no letter of a language."""
    if not letter or not unicodedata.category(letter).startswith("L"):
        return ""
    if letter.isascii():
        return "LATIN"
    script = (
        unicodedata.name(letter, "")
        .replace("FULLWIDTH ", "")
        .replace("HALFWIDTH ", "")
        .split(" ")[0]
        .split("-")[0]
    )
    if script in _EAST:
        return "CJK"
    return "" if script in _NEUTRAL else script
