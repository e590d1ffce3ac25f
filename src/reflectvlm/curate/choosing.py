"""Which of a question's sampled answers becomes which kind of trace, in the wanted shares. Pure.

A question is kept by its pass rate, the share of its answers that are right. A wrong answer can be the start
of a trace whose look corrects it, a right one of a trace that confirms it or needs no look. Without a
stronger teacher the look is the model's own: the beginning of a *second* right answer, of several the one
whose beginning most of all answers share, because a right result may follow from a wrong reading.

`assign` finds the largest set that has the shares, every question used once. Our decision: the paper does not
say how its kinds of traces are mixed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from reflectvlm.curate.splice import Method, before_conclusion, cut, draft
from reflectvlm.curate.types import Look
from reflectvlm.rewards.answers import normalise
from reflectvlm.tags import parse, qwen_la

LOOKS: tuple[Look, ...] = ("corrected", "confirmed", "unneeded")
Rewrite = Literal["splice", "rewrite"]


class Start(NamedTuple):
    """An answer that a trace can begin with, in the parts that a splice needs."""

    text: str
    """The whole answer, for a rewrite."""
    kept: str
    """What stands before the look, letter by letter."""
    rest: str
    """What follows it in the answer; may be empty."""
    answer: str
    right: bool


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What can be made of one question."""

    starts: Mapping[Look, tuple[Start, ...]]
    """By the look that they can have; looks without any are not in it."""
    second: Start | None = None
    """The right answer whose beginning becomes the look of a self-made trace."""
    rate: float | None = None
    agree: float = 0.0
    """Share of all answers that begin as `second` does."""
    why: str = ""
    """Why there are none."""


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """Example: `Choosing(method="semantic_back", self_made=True)(texts, right)`"""

    method: Method
    self_made: bool = False
    pass_rate: tuple[float, float] = (0.1, 1.0)
    """Least and largest share of right answers of a question that is used."""
    agree: float = 0.5
    """Self-made: least share of all answers that begin as the second look does. Models that word every
    answer anew hardly ever agree in letters: 0 asks for none."""
    at: float = 0.5
    """Where the semantic variant cuts: at the end of the sentence nearest to this share of the reasoning."""

    def __post_init__(self) -> None:
        low, high = self.pass_rate
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"pass_rate is {low:g}:{high:g}. It is the least and the largest share, 0:1 at most."
            )
        for name in ("agree", "at"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name):g}. It is a share, from 0 to 1.")

    def __call__(self, texts: Sequence[str | None], right: Sequence[bool], rated: bool = True) -> Candidates:
        """`texts` may hold None, where no reply came; `rated=False`: they are no samples of one model."""
        said = [(text, good) for text, good in zip(texts, right, strict=True) if text is not None]
        if not said:
            return Candidates(starts={}, why="no answers")
        rate = sum(good for _, good in said) / len(said) if rated else None
        if rate is not None and not self.pass_rate[0] <= rate <= self.pass_rate[1]:
            return Candidates(
                starts={}, rate=rate, why="pass rate too " + ("low" if rate < self.pass_rate[0] else "high")
            )
        found = [self.start(text, good) for text, good in said]
        starts = [start for start in found if isinstance(start, Start)]
        if not starts:
            (why, _), *_ = Counter(one for one in found if isinstance(one, str)).most_common(1)
            return Candidates(starts={}, rate=rate, why=f"no usable answer: {why}")
        if not self.self_made:
            return Candidates(starts=_taught(starts, self.method), rate=rate)
        return self._own(starts, len(said), rate)

    def start(self, text: str, right: bool) -> Start | str:
        """The parts of an answer, or in a few words why it cannot be used."""
        if self.method == "qwen_la":
            kept = before_conclusion(text)
            if kept is None:
                return "not in Qwen-LA's layout, or with a reflection"
            return Start(text, kept, "", parse(qwen_la(), text).answer or "", right)
        found = draft(text)
        if isinstance(found, str):
            return found
        if self.method == "solution_back":
            return Start(text, found.reasoning, "", found.answer, right)
        place = cut(found.reasoning, self.at)
        if place is None:
            return "one sentence, nowhere to look again"
        return Start(text, found.reasoning[:place], found.reasoning[place:].strip(), found.answer, right)

    def own_look(self, start: Start) -> tuple[str, str] | None:
        """Of a second answer: what it saw, and what it made of it."""
        if self.method == "semantic_back":
            return start.kept, start.rest
        if self.method == "qwen_la":
            blocks = {block.tag: block.content.strip() for block in parse(qwen_la(), start.text).blocks}
            return f"{blocks['CAPTION']} {blocks['REASONING']}", ""
        place = cut(start.kept, self.at)
        return None if place is None else (start.kept[:place], start.kept[place:].strip())

    def _own(self, starts: Sequence[Start], asked: int, rate: float | None) -> Candidates:
        looks = [(start, self.own_look(start)) for start in starts]
        usable = [(start, normalise(look[0])) for start, look in looks if look is not None]
        counts = Counter(seen for _, seen in usable)
        seconds = [(start, seen) for start, seen in usable if start.right]
        if not seconds:
            return Candidates(starts={}, rate=rate, why="no right answer to look again with")
        place = max(range(len(seconds)), key=lambda i: (counts[seconds[i][1]], -i))
        second, seen = seconds[place]
        share = counts[seen] / asked
        if share < self.agree:
            return Candidates(starts={}, rate=rate, agree=share, why="second looks do not agree")
        # In the semantic variant nothing but a reading stands before the look, so that must be another one.
        wrong = [
            start
            for start, other in usable
            if not start.right and (self.method != "semantic_back" or other != seen)
        ]
        same = [start for start, other in seconds if other == seen and start is not second]
        found: dict[Look, tuple[Start, ...]] = {"corrected": tuple(wrong), "confirmed": tuple(same)}
        if self.method != "qwen_la":
            found["unneeded"] = (second,)
        return Candidates(starts=_without_empty(found), second=second, rate=rate, agree=share)


def _taught(starts: Sequence[Start], method: Method) -> Mapping[Look, tuple[Start, ...]]:
    right, wrong = (tuple(one for one in starts if one.right is good) for good in (True, False))
    found: dict[Look, tuple[Start, ...]] = {"corrected": wrong, "confirmed": right}
    if method != "qwen_la":
        found["unneeded"] = right
    return _without_empty(found)


def _without_empty(found: Mapping[Look, tuple[Start, ...]]) -> Mapping[Look, tuple[Start, ...]]:
    return {look: starts for look, starts in found.items() if starts}


# -- shares ---------------------------------------------------------------------------------------


def check_shares(shares: Mapping[Look, float], method: Method) -> None:
    if unknown := sorted(set(shares) - set(LOOKS)):
        raise ValueError(f"shares name {unknown[0]!r}. They are of {', '.join(LOOKS)}.")
    if any(not 0 <= share <= 1 for share in shares.values()) or not math.isclose(
        sum(shares.values()), 1.0, abs_tol=1e-6
    ):
        told = ",".join(f"{look}:{share:g}" for look, share in shares.items())
        raise ValueError(f"shares are {told}. They are numbers from 0 to 1 that add up to 1.")
    if method == "qwen_la" and shares.get("unneeded", 0) > 0:
        raise ValueError(
            f"shares have unneeded:{shares['unneeded']:g}, but qwen_la's cold start has exactly one "
            "reflection in every row. Give corrected and confirmed alone."
        )


def counts_of(total: int, shares: Mapping[Look, float]) -> dict[Look, int]:
    """Whole numbers that add up to `total`, by largest remainders."""
    exact = {look: total * shares.get(look, 0.0) for look in LOOKS}
    counts = {look: math.floor(value + 1e-9) for look, value in exact.items()}
    for look in sorted(LOOKS, key=lambda look: counts[look] - exact[look])[: total - sum(counts.values())]:
        counts[look] += 1
    return counts


def assign(
    possible: Sequence[frozenset[Look]], shares: Mapping[Look, float], most: int | None, seed: int
) -> list[Look | None]:
    """A look for as many rows as have the shares together, at most `most`; which rows is drawn by `seed`."""
    order = [int(place) for place in np.random.default_rng([seed, 7]).permutation(len(possible))]
    hall = _Hall.of(possible)
    for total in range(len(possible) if most is None else min(most, len(possible)), 0, -1):
        hall.wanted = counts_of(total, shares)
        if hall.holds():
            return _filled(possible, order, hall)
    return [None] * len(possible)


@dataclass
class _Hall:
    """Hall's condition: no group of looks wants more rows than there are that can have one of them."""

    there: dict[frozenset[Look], int]
    wanted: dict[Look, int] = field(default_factory=dict)

    @classmethod
    def of(cls, possible: Sequence[frozenset[Look]]) -> _Hall:
        kinds = Counter(possible)
        groups = [frozenset(group) for size in range(1, 4) for group in combinations(LOOKS, size)]
        there = {group: sum(n for looks, n in kinds.items() if looks & group) for group in groups}
        return cls(there)

    def holds(self) -> bool:
        return all(sum(self.wanted[look] for look in group) <= rows for group, rows in self.there.items())

    def used(self, looks: frozenset[Look]) -> None:
        """A row with these looks is no longer there."""
        for group in self.there:
            self.there[group] -= bool(looks & group)


def _filled(possible: Sequence[frozenset[Look]], order: Sequence[int], hall: _Hall) -> list[Look | None]:
    """Row by row a look that leaves the rest possible; where none does, it is so without the row."""
    found: list[Look | None] = [None] * len(possible)
    for place in order:
        hall.used(possible[place])
        for look in LOOKS:
            if look in possible[place] and hall.wanted[look]:
                hall.wanted[look] -= 1
                if hall.holds():
                    found[place] = look
                    break
                hall.wanted[look] += 1
    assert not any(hall.wanted.values())
    return found
