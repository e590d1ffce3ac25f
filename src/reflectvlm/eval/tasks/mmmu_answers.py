"""How MMMU and MMMU-Pro (arXiv 2311.16502, 2409.02813) read an answer out of a reply, oddities included.

A choice: `(B)`, else ` B `, else, in a reply of more than five words, the text of an option; of several the
one that occurs last; else a guess. The authors' guess comes from one random generator for the whole run, so
that a score depends on the order of the rows; ours is drawn from the row's id. An open answer: the ends of
the lines that announce one, and the numbers in them, rounded to two places.

All of it is linear in the reply's length.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

_ENDS = (",", ".", "!", "?", ";", ":", "'")
_ANNOUNCE = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset({":", ",", ".", "!", "?", ";", "'"})
# As published, but for what keeps a run of digits from being tried again at each of its digits.
_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d++")
_SIMPLE = re.compile(r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d)(?![,\d])")


def choice(reply: str, options: Sequence[str], seed: str) -> tuple[str, bool]:
    """The letter that MMMU's rule takes a reply to name, and whether it is a guess."""
    said = f" {_stripped(reply)} "
    letters = letters_of(options)
    for form in (_bracketed, _spaced):
        if found := {letter: said.rfind(form(letter)) for letter in letters if form(letter) in said}:
            return _last(found), False
    return _by_text(said, options) or (_guess(letters, seed), True)


def choice_pro(reply: str, options: Sequence[str], seed: str) -> tuple[str, bool]:
    """The same by MMMU-Pro's rule: the only letter behind the last "Answer:", else `(B)`, `B ` or `B.`.

    "B " needs no space in front, so that "I think" names option I; and where several letters are found
    without brackets, the last ` B ` with spaces on both sides counts, or else the first letter.
    """
    letters = letters_of(options)
    _, announced, tail = reply.rpartition("Answer:")
    named = [letter for letter in letters if letter in tail] if announced else []
    if len(named) == 1:
        return named[0], False
    said = f" {_stripped(reply)} "
    if found := {letter: said.rfind(_bracketed(letter)) for letter in letters if _bracketed(letter) in said}:
        return _last(found), False
    for end in (" ", "."):
        if found := {letter: said.rfind(_spaced(letter)) for letter in letters if letter + end in said}:
            return _last(found), False
    return _by_text(said, options) or (_guess(letters, seed), True)


def open_answers(reply: str) -> list[str | float]:
    """What an open reply may have given as its answer: the announced texts and the numbers in them.

    The authors split sentences at capitals after lower-casing the reply, so in effect only lines.
    """
    keys = _announced(reply.strip().strip(".").lower())
    numbers = [number for key in keys for number in numbers_in(key)]
    return [form for key in (*keys, *numbers) for form in normal_forms(key)]


def equals_open(golds: Sequence[str], answers: Sequence[str | float]) -> bool:
    """A gold text that occurs in an answer text, or an equal number."""
    wanted = [form for gold in golds for form in normal_forms(gold)]
    for answer in answers:
        if isinstance(answer, str):
            if any(isinstance(gold, str) and gold in answer for gold in wanted):
                return True
        elif any(not isinstance(gold, str) and gold == answer for gold in wanted):
            return True
    return False


def normal_forms(text: str) -> list[str | float]:
    """A number rounded to two places, or the text in lower case, one character with a space on a side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def numbers_in(text: str) -> list[str]:
    """Numbers with commas, in scientific notation, and plain ones; one may be found in several ways."""
    return [*_WITH_COMMAS.findall(text), *_SCIENTIFIC.findall(text), *_SIMPLE.findall(text)]


def letters_of(options: Sequence[str]) -> list[str]:
    return [chr(ord("A") + place) for place in range(len(options))]


def _announced(reply: str) -> list[str]:
    """Of each line the shortest end behind a word that announces an answer; else the whole reply."""
    keys = []
    lines = reply.split("\n")
    for number, line in enumerate(lines, start=1):
        words = (*_ANNOUNCE, "=") if number == len(lines) else _ANNOUNCE
        shortest = ""
        for word in words:
            _, found, end = line.rpartition(word)
            end = end.strip()
            if found and (not shortest or len(end) < len(shortest)):
                shortest = end
        if shortest and shortest not in _TRIVIAL:
            keys.append(shortest)
    return keys or [reply]


def _by_text(said: str, options: Sequence[str]) -> tuple[str, bool] | None:
    if len(said.split()) <= 5:
        return None
    said = said.lower()
    texts = dict(zip(letters_of(options), map(str.lower, options), strict=True))
    found = {letter: said.rfind(text) for letter, text in texts.items() if text in said}
    return (_last(found), False) if found else None


def _last(places: Mapping[str, int]) -> str:
    """The letter whose place comes last; of equal ones the first letter."""
    return max(places, key=lambda letter: places[letter])


def _guess(letters: Sequence[str], seed: str) -> str:
    return random.Random(f"guess {seed}").choice(letters)


def _stripped(reply: str) -> str:
    for end in _ENDS:
        reply = reply.strip(end)
    return reply


def _bracketed(letter: str) -> str:
    return f"({letter})"


def _spaced(letter: str) -> str:
    return f" {letter} "
