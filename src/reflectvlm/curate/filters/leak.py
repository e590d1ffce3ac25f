r"""Is the gold answer said before anything leads to it? A teacher that was shown it is tempted to.

A trace leaks if one of these holds:

1. *opening*: in a block up to the first second look, the gold answer is announced ("the answer is 7",
"Answer: 7") with fewer than `opening` words before it in its block, and it does not stand in anything
before the announcement;
2. *alone*: such a block begins with the gold answer alone ("7!", "7 because …"), which stands nowhere before;
3. *look*: in a second look, the gold answer is announced before the first reading there (`readings.py`),
and stands nowhere before;
4. *summary*: it is announced anywhere in `<SUMMARY>` or `<CAPTION>`, which come before the reasoning; or
`<SUMMARY>` has it at all, the question has not, and it is longer than one character and not yes, no, true
or false;
5. *box*: a `\boxed{}` stands inside of a block;
6. *source*: the text speaks of an answer that it was given ("the reference answer", "`gold`"), and
the question does not.

A bare reading is never a leak: "upper left 7" may well be what is asked for. Left out: announcements in
other words and in languages other than English and Chinese; values that are equal without looking equal
(1/2 and 0.5 do, \sqrt{4} and 2 do not)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from reflectvlm.curate.filters.layout import Parts, parts
from reflectvlm.curate.filters.mentions import begins_with, mentions
from reflectvlm.curate.filters.readings import readings
from reflectvlm.curate.hashes import words
from reflectvlm.curate.types import Trace

_EARLY = ("SUMMARY", "CAPTION")
_LINK = (
    r"(?: (?:to|of|for|here|this|that|the|question|problem|itself|must|should|would|will|can|has|clearly"
    r"|simply|indeed|surely|therefore|thus|then|just|known|given|already|as|option|choice|letter|is|be|are|equals"
    r"|being))*"
)
_ANNOUNCED = re.compile(
    rf"\b(?:answer|result|solution|option|choice)s?\b(?P<link>{_LINK} ?[:=]?) ?"
    r"|答案(?P<east>是|为|為|应该是|應該是|：|:) ?",
    re.IGNORECASE,
)
_LINKED = re.compile(r"\b(?:is|be|are|equals|being|as)\b|[:=]", re.IGNORECASE)
_GIVEN = re.compile(
    r"\bground[- ]truth\b|\bgold(?:en)? (?:answer|label)\b|\breference (?:answer|solution)\b|\banswer key\b"
    r"|`gold`|\bgold (?:result|solution|standard)\b|\bso_far\b"  # as our requests call them
    r"|\b(?:given|provided|supplied) (?:correct |final |right )?answer\b(?! (?:choice|option))"
    r"|标准答案|参考答案",
    re.IGNORECASE,
)
_UNSAID = frozenset({"yes", "no", "true", "false"})


@dataclass(frozen=True, kw_only=True)
class AnswerNotLeaked:
    """See the rules at the top of this file. Nothing is asked of a trace without a gold answer."""

    opening: int = 6
    """An announcement with fewer words before it in its block is at the block's opening."""
    name: ClassVar[str] = "leak"

    def __post_init__(self) -> None:
        if self.opening < 1:
            raise ValueError(
                f"AnswerNotLeaked.opening is {self.opening}. It is a number of words, at least 1."
            )

    def __call__(self, trace: Trace, /) -> str | None:
        gold = trace.question.answer.strip()
        found = parts(trace)
        if why := _source(trace, found):
            return why
        if not gold:
            return None
        looks = found.looks()
        last = looks[0] if looks else 0
        for place, block in enumerate(found.blocks):
            text, before = _line(block.content), _line(found.before(place))
            if block.tag in _EARLY and (why := _early(block.tag, text, gold, trace.question.question)):
                return why
            known = mentions(gold, before)
            if place in looks and not known and (why := _before_reading(block.tag, text, gold)):
                return why
            if (
                (place <= last or block.tag == "REASONING")
                and not known
                and (why := self._opening(block.tag, text, gold))
            ):
                return why
        return None

    def _opening(self, tag: str, text: str, gold: str) -> str | None:
        if _alone(text, gold):
            return f"<{tag}> begins with the gold answer"
        start = _announced(text, gold)
        if start is None or len(words(text[:start])) >= self.opening or mentions(gold, text[:start]):
            return None
        return f"<{tag}> announces the gold answer at its start"


def _announced(text: str, gold: str) -> int | None:
    """Where it is said first that the answer is the gold answer; later ones repeat what is known."""
    for match in _ANNOUNCED.finditer(text):
        linked = match["east"] or _LINKED.search(match["link"] or "")
        if linked and begins_with(gold, text[match.end() : match.end() + len(gold) + 80]):
            return match.start()
    return None


def _before_reading(tag: str, text: str, gold: str) -> str | None:
    start = _announced(text, gold)
    if start is None or readings(text[:start]) or mentions(gold, text[:start]):
        return None
    return f"<{tag}> announces the gold answer before it reads anything"


def _early(tag: str, text: str, gold: str, question: str) -> str | None:
    if _announced(text, gold) is not None:
        return f"<{tag}> announces the gold answer"
    telling = len(gold) > 1 and gold.lower() not in _UNSAID
    if tag == "SUMMARY" and telling and mentions(gold, text) and not mentions(gold, question):
        return f"<{tag}> has the gold answer"
    return None


def _alone(text: str, gold: str) -> bool:
    """`7`, `7!` and `7 because …`; not `7, 3 and 5` and not `1. Look`, which is a list."""
    end = begins_with(gold, text)
    rest = text[end:].lstrip(" *_$\"')}") if end else text
    return bool(end) and (
        not rest or rest[0] == "!" or re.match(r"(?:because|since)\b", rest, re.IGNORECASE) is not None
    )


def _source(trace: Trace, found: Parts) -> str | None:
    for block in found.blocks:
        if "\\boxed" in block.content:
            return f"a box inside <{block.tag}>"
    said = _GIVEN.search(trace.text)
    if said and not _GIVEN.search(trace.question.question):
        return f"it speaks of an answer that it was given ({said.group()!r})"
    return None


def _line(text: str) -> str:
    return " ".join(text.split())
