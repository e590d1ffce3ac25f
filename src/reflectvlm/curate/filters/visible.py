"""Does the second look refer to something visible, instead of saying the reasoning once more?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reflectvlm.curate.filters.layout import Parts, parts
from reflectvlm.curate.filters.readings import readings
from reflectvlm.curate.hashes import runs, words
from reflectvlm.curate.types import Trace


@dataclass(frozen=True, kw_only=True)
class NamesWhatIsSeen:
    """A heuristic with three demands on each second look:

    1. it has at least `readings` different readings (`readings.py`) that can be pointed at;
    2. at most `copied` of its runs of `n` words stand in the blocks before it;
    3. where it corrects, it reads something new: of its readings and those before, each in a row, a run of
    three that ends with one of its own (fewer at its start) does not stand before.

    A look that confirms names the same readings again, which is why the second bound is wide: it is for
    copies. Left out: whether what is named is there. A word of the lists counts wherever it stands."""

    readings: int = 1
    copied: float = 0.9
    n: int = 3
    things: Sequence[str] = ()
    """Further words for what can be seen in these pictures."""
    name: ClassVar[str] = "visible"

    def __post_init__(self) -> None:
        if self.readings < 0 or self.n < 1:
            raise ValueError(
                f"NamesWhatIsSeen has readings={self.readings} and n={self.n}. "
                "It needs readings >= 0 and n >= 1."
            )
        if not 0 < self.copied <= 1:
            raise ValueError(
                f"NamesWhatIsSeen.copied is {self.copied}. It is a share, above 0 and at most 1."
            )

    def __call__(self, trace: Trace, /) -> str | None:
        found = parts(trace)
        news = False
        for place in found.looks():
            if why := self._objection(found, place):
                return why
            news = news or self._is_new(found, place)
        if trace.look == "corrected" and found.looks() and not news:
            return "it is to correct a reading, and reads nothing that was not read before"
        return None

    def _objection(self, found: Parts, place: int) -> str | None:
        block = found.blocks[place]
        seen = {one.text.lower() for one in readings(block.content, self.things)}
        if len(seen) < self.readings:
            least = "nothing" if not seen else f"only {len(seen)} of {self.readings} things"
            return f"<{block.tag}> names {least} that can be seen"
        share = copied_share(block.content, found.before(place), self.n)
        if share > self.copied:
            return f"<{block.tag}> repeats what stands before it ({share:.0%} of its runs of {self.n} words)"
        return None

    def _is_new(self, found: Parts, place: int) -> bool:
        known, again = (
            [one.text.lower() for one in readings(text, self.things)]
            for text in (found.before(place), found.blocks[place].content)
        )
        runs_known = {tuple(known[k : k + n]) for n in (1, 2, 3) for k in range(len(known) - n + 1)}
        return any(tuple(again[max(k - 2, 0) : k + 1]) not in runs_known for k in range(len(again)))


def copied_share(text: str, before: str, n: int = 3) -> float:
    """Share of a text's runs of n words (of all its words, if it has fewer) that stand in another text; 0
    for a text without words.

    Example: "the bar is red" in "I see that the bar is green": of "the bar is" and "bar is red" the first,
    0.5."""
    said = words(text)
    if not said:
        return 0.0
    n = min(n, len(said))
    known = {*map(int, runs(words(before), n))}
    found = [int(one) in known for one in runs(said, n)]
    return sum(found) / len(found)
