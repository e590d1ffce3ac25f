"""What judges said about a row, in the forms that rows have it, and whether they agree.

    {"gpt": true, "qwen": false}                                a verdict by judge
    {"gpt": {"verdict": "wrong", "why": "reads 7 as 1"}}        with a reason
    ["right", "wrong"]      [{"judge": "gpt", "right": true}]   a list, names or not

or the same as JSON text, as a cell of a CSV file has it. Left out: weights of judges, and thresholds: a row
is in dispute as soon as two verdicts differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_NAMES = ("judge", "name", "by", "model")
_VERDICTS = ("verdict", "vote", "right", "correct", "value", "score", "text")
_REASONS = ("why", "reason", "rationale", "comment")
_WORDS = {
    "right": ("true", "yes", "right", "correct", "1", "1.0", "accept", "good", "pass"),
    "wrong": ("false", "no", "wrong", "incorrect", "0", "0.0", "reject", "bad", "fail"),
}
_KNOWN = {word: verdict for verdict, words in _WORDS.items() for word in words}


class Vote(NamedTuple):
    """One judge's word. `verdict` is `right`, `wrong` or, of any other kind, what the row says."""

    judge: str
    verdict: str
    why: str = ""


def votes_of(value: Any) -> tuple[Vote, ...]:
    """The votes that a cell holds; none of a cell that is empty or no list or object."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return ()
    if isinstance(value, Mapping):
        # A table gives every row the keys of all others, with nulls.
        return tuple(_vote(str(name), one) for name, one in value.items() if one is not None)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(
            _vote(f"judge {number}", one) for number, one in enumerate(value, start=1) if one is not None
        )
    return ()


def disagree(votes: Sequence[Vote]) -> bool:
    return len({vote.verdict for vote in votes}) > 1


def _vote(name: str, value: Any) -> Vote:
    if not isinstance(value, Mapping):
        return Vote(name, _verdict(value))
    said = next((value[key] for key in _VERDICTS if value.get(key) is not None), "?")
    named = next((str(value[key]) for key in _NAMES if value.get(key)), name)
    why = next((str(value[key]) for key in _REASONS if value.get(key)), "")
    return Vote(named, _verdict(said), why)


def _verdict(value: Any) -> str:
    text = " ".join(str(value).split())
    return _KNOWN.get(text.lower(), text)
