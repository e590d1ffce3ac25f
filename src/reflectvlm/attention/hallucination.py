"""CHAIR-i and object recall as a caption grows (Qwen-LA, arXiv 2505.23558; CHAIR is arXiv 1809.02156).

Captions are cut after so many tokens, and what stands by then is counted over all of them together:

    CHAIR-i = mentions of objects that the image does not show / mentions of objects
    recall  = objects of the image that are mentioned / objects of the image

Where a question is about some of the objects, recall can be over these alone (`asked`). To name another one
that the image does show is no hallucination.

Mentions count as often as they occur, as in CHAIR; recall counts an object once. Which words name an object
is the caller's: `mentions` takes a text and gives the objects it names, in CHAIR's case by its synonyms.
Shorter captions stay in all counts with all they say, so a long answer is not compared with other images
than a short one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from reflectvlm.attention.spread import ratio_error

Mentions = Callable[[str], Sequence[str]]
"""A text -> names of the objects it mentions, one per mention."""

_WORD = re.compile(r"\S+")


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A text and what its image shows."""

    text: str
    objects: Collection[str]
    asked: Collection[str] | None = None
    """Those of `objects` that recall counts; None: all."""
    offsets: Sequence[int] = field(default=())
    """Character at which each token begins (`Rollout.offsets`); without them words are counted."""

    @property
    def starts(self) -> Sequence[int]:
        return self.offsets or [word.start() for word in _WORD.finditer(self.text)]

    def first(self, length: int) -> str:
        """The text of the first so many tokens, without a last word that is cut in two."""
        starts = self.starts
        if length >= len(starts):
            return self.text
        end = starts[length]
        while 0 < end < len(self.text) and self.text[end - 1].isalnum() and self.text[end].isalnum():
            end -= 1
        return self.text[:end]


@dataclass(frozen=True, kw_only=True)
class AtLength:
    length: int
    """Tokens after which captions are cut."""
    captions: int
    """Captions that are so long or longer."""
    answers: int
    """All captions: those that are shorter count with all they say."""
    mentioned: int
    wrong: int
    there: int
    """Objects that recall is over."""
    chair_i: float | None
    """None: nothing is mentioned by then."""
    recall: float | None
    """None: no image shows an object that counts."""
    chair_i_se: float | None
    recall_se: float | None
    """Standard errors over captions; None: of one caption, or of nothing."""


def by_length(captions: Sequence[Caption], mentions: Mentions, lengths: Sequence[int]) -> list[AtLength]:
    """The counts after each of `lengths` tokens. Raises ValueError for a length below 1."""
    if wrong := [length for length in lengths if length < 1]:
        raise ValueError(f"lengths has {wrong[0]}. A caption is cut after at least 1 token.")
    return [_at(captions, mentions, length) for length in lengths]


def steps(captions: Sequence[Caption], every: int = 8) -> list[int]:
    """Every so many tokens, up to the first length that no caption exceeds."""
    longest = max((len(caption.starts) for caption in captions), default=0)
    return list(range(every, longest + every, every)) if longest else []


def _at(captions: Sequence[Caption], mentions: Mentions, length: int) -> AtLength:
    counts = [_counts(caption, mentions(caption.first(length))) for caption in captions]
    mentioned, wrong, there, found = ([one[n] for one in counts] for n in range(4))
    return AtLength(
        length=length,
        captions=sum(len(caption.starts) >= length for caption in captions),
        answers=len(captions),
        mentioned=sum(mentioned),
        wrong=sum(wrong),
        there=sum(there),
        chair_i=sum(wrong) / sum(mentioned) if any(mentioned) else None,
        recall=sum(found) / sum(there) if any(there) else None,
        chair_i_se=ratio_error(wrong, mentioned),
        recall_se=ratio_error(found, there),
    )


def _counts(caption: Caption, named: Sequence[str]) -> tuple[int, int, int, int]:
    """Mentions, wrong ones, objects that recall is over, and those of them that are named."""
    truth = set(caption.objects)
    asked = truth if caption.asked is None else truth & set(caption.asked)
    return len(named), sum(name not in truth for name in named), len(asked), len(asked & set(named))
