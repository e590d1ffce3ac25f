r"""Answers that sympy would never finish with: `9**9**9**9`, `99999999!`, brackets a thousand deep.

A worker that tries is killed in the end, but each costs its whole time-out. What is seen here, from the text
alone and in linear time, is wrong unless it is the gold answer itself. No answer that a person means is like
this: exponents have up to six digits, factorials up to five, brackets nest up to 40 deep.
"""

from __future__ import annotations

import math
import re

MOST_POWER = 10**6
MOST_DEPTH = 40

_POWER = r"\s*(?:\*\*|\^)[\s{(]*[-+]?\s*"
_POSITIVE = r"\s*(?:\*\*|\^)[\s{(]*\+?\s*"
"""A power of a negative exponent is small: `2^{10^{-9}}` is nearly 1."""
_TOWER = re.compile(rf"(?=((?<!\d)\d{{1,40}}){_POWER}(\d{{1,40}}){_POSITIVE}(\d{{1,40}}))")
_EXCLAIMED = re.compile(r"\A(\s*\d{6,})\s*!+\s*\Z")
_HUGE = re.compile(rf"{_POWER}\d{{7,}}|(?<![\d.])\d{{6,}}\s*!|(?<!\w)factorial\s*\(\s*\d{{6,}}")


def hopeless(answer: str) -> bool:
    r"""Whether to compute this is out of the question. `9^{9^{9}}` is, `2^{2^{3}}` and `2^{10^{-9}}` are
    not."""
    return (
        bool(_HUGE.search(answer)) or any(map(_huge, _TOWER.finditer(answer))) or _depth(answer) > MOST_DEPTH
    )


def without_exclamation(answer: str) -> str:
    """`1000000!` as `1000000`: nobody means a factorial of a million digits. `12!` stays."""
    return _EXCLAIMED.sub(r"\1", answer)


def _huge(tower: re.Match[str]) -> bool:
    """a ** b ** c, of which b ** c is the exponent."""
    base, inner, top = (int(part) for part in tower.groups())
    return base > 1 and inner > 1 and top * math.log10(inner) > math.log10(MOST_POWER)


def _depth(text: str) -> int:
    depth = most = 0
    for character in text:
        if character in "([{":
            depth += 1
            most = max(most, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    return most
