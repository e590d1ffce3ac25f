"""Hallucination in the digits task: digits that an answer names at a place where the page has another one
or none. The counterpart of CHAIR-i (arXiv 1809.02156), with a (place, digit) pair as the object.

Read is the form in which traces state what they saw, `digits.reading`: "upper left 7". Left out: the mean
over answers weighs each answer alike, where CHAIR-i counts all objects of a data set together; what is on
the page and never named (recall); numbers without a place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, NamedTuple

from reflectvlm.data.digits import PLACES
from reflectvlm.types import Rollout, Sample

_MENTION = re.compile(rf"\b({'|'.join(PLACES)}) (none|\d+)\b", re.IGNORECASE | re.ASCII)
_CHOICES = ("last", "all")


class Mention(NamedTuple):
    """A digit said to stand at a place; `digit` as it is written, None for "none"."""

    place: int
    digit: str | None


@dataclass(frozen=True, kw_only=True)
class Hallucination:
    """Share of the named digits that are not there; None for an answer that names none.

    "none" claims that a place is empty. It names no object, so it is never a hallucination, also where a
    digit stands; but as the last word on a place it takes back a digit named there before.
    A number of several figures is a digit that no page has.
    Give it weight 0 to measure, or a negative weight to punish.

    Example: where the page has 7 and nothing beside it, "upper left 1, upper right 3. Looking again: upper
    left 7, upper right none." is 0.0, and with mentions="all" 2/3.
    """

    mentions: Literal["last", "all"] = "last"
    """last: the last mention of each place counts, what the answer finally claims. all: every one does."""
    rowwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.mentions not in _CHOICES:
            near = get_close_matches(str(self.mentions), _CHOICES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"Hallucination.mentions is {self.mentions!r}, not one of {list(_CHOICES)}. "
                f"Did you mean {near!r}?"
            )

    def __call__(self, group: Sequence[Rollout], /) -> list[Any]:
        """A number each, or None: "does not apply", as a rubric understands it."""
        return [self.share(one.text, one.prompt.sample) for one in group]

    def share(self, text: str, sample: Sample) -> float | None:
        """The same for a plain text."""
        digits = _page(sample)
        found = mentions(text)
        if self.mentions == "last":
            found = [*{mention.place: mention for mention in found}.values()]
        named = [mention for mention in found if mention.digit is not None]
        if not named:
            return None
        return sum(digits[mention.place] != mention.digit for mention in named) / len(named)


def mentions(text: str) -> list[Mention]:
    """All mentions of a place with a digit or "none", in the order of the text, capitals or not."""
    return [
        Mention(PLACES.index(match[1].lower()), None if match[2].lower() == "none" else match[2])
        for match in _MENTION.finditer(text)
    ]


def _page(sample: Sample) -> list[str | None]:
    """What stands at each place, as it is written."""
    digits = sample.columns.get("digits")
    if not isinstance(digits, Sequence) or len(digits) != len(PLACES):
        raise ValueError(
            f"Sample {sample.id!r} does not say what is on its page: columns['digits'] is {digits!r}. "
            f"Hallucination needs one digit or None for each of {PLACES}, as Digits gives them."
        )
    return [None if digit is None else str(digit) for digit in digits]
