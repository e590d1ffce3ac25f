"""Which look is scarce, what the shares cost for it, and which shares would keep every row. Pure.

Shares that were given are kept to. The usual ones leave out a look that no row has, because nobody chose it,
unless only rows without any look were left: a set of those teaches no looking again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reflectvlm.curate.choosing import LOOKS, counts_of
from reflectvlm.curate.types import Look

WHY: Mapping[Look, str] = {
    "corrected": "no usable answer is wrong",
    "confirmed": "no usable answer is right, or with self=true none begins as the look does",
    "unneeded": "no usable answer is right",
}
"""Why no question can have a look."""


@dataclass(frozen=True)
class Supply:
    """Rows by the looks that each can have, and the shares that are wanted of them.

    Example: `Supply.of([frozenset({"confirmed"})] * 3, {"corrected": 0.5, "confirmed": 0.5}).absent`
    """

    rows: Sequence[frozenset[Look]]
    """Those that can have a wanted look."""
    shares: Mapping[Look, float]

    @classmethod
    def of(cls, possible: Sequence[frozenset[Look]], shares: Mapping[Look, float]) -> Supply:
        wanted = {look: share for look, share in shares.items() if share > 0}
        looks = frozenset(wanted)
        return cls([row & looks for row in possible if row & looks], wanted)

    def there(self, *looks: Look) -> int:
        """Rows that can have one of the looks."""
        return sum(not row.isdisjoint(looks) for row in self.rows)

    @property
    def absent(self) -> list[Look]:
        """Looks that no row can have and that are no mere fraction of a row."""
        return [
            look
            for look, share in self.shares.items()
            if share * len(self.rows) >= 1 and not self.there(look)
        ]

    @property
    def scarce(self) -> Look:
        """The look that bounds the set most."""
        return min(self.shares, key=lambda look: self.there(look) / self.shares[look])

    def without_absent(self) -> Mapping[Look, float] | None:
        """The shares over the looks that there are; None if these are no set to look again by."""
        left = {look: share for look, share in self.shares.items() if look not in self.absent}
        if not left or set(left) == {"unneeded"} != set(self.shares):
            return None
        total = sum(left.values())
        return {look: share / total for look, share in left.items()}

    def keep_all(self, total: int | None = None) -> str:
        """`shares=…` that give so many rows, as near to the wanted ones as the rows allow; None: all."""
        total = len(self.rows) if total is None else min(total, len(self.rows))
        return told(self._counts(total), total)

    def _counts(self, total: int) -> dict[Look, int]:
        """Each between the rows that can have nothing else and those that can have it; between these bounds
        as the shares say."""
        looks = [look for look in LOOKS if look in self.shares]
        most = {look: self.there(look) for look in looks}
        least = {
            look: max(0, total - self.there(*(other for other in looks if other != look))) for look in looks
        }

        def at(scale: float) -> dict[Look, int]:
            return {
                look: min(most[look], max(least[look], math.floor(self.shares[look] * scale)))
                for look in looks
            }

        low, high = 0.0, (total + 1) / min(self.shares.values())
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(at(middle).values()) <= total else (low, middle)
        counts = at(low)
        for look in looks:
            counts[look] += min(most[look] - counts[look], total - sum(counts.values()))
        assert sum(counts.values()) == total
        return counts


def told(counts: Mapping[Look, int], total: int) -> str:
    """In as few digits as give these counts again."""
    there = {look: count for look, count in counts.items() if count}
    for digits in range(2, 10):
        *most, last = there
        shares = {look: round(there[look] / total, digits) for look in most}
        shares[last] = round(1 - sum(shares.values()), digits)
        if {look: count for look, count in counts_of(total, shares).items() if count} == there:
            break
    return "shares=" + ",".join(f"{look}:{share:.9g}" for look, share in shares.items())


_SAME_CACHE = "the same cache= (by default OUT/replies)"


def absent_before(supply: Supply, failed: int = 0) -> str:
    """What is wrong with shares that were given, if a look cannot be had at all; empty for nothing. `failed`
    calls may yet have a reply, and a look with it."""
    if not supply.absent:
        return ""
    look = supply.absent[0]
    wanted = ",".join(f"{one}:{share:g}" for one, share in supply.shares.items())
    return (
        f"shares={wanted} want {look}, and none of {len(supply.rows):,} usable questions can have it: "
        f"{WHY[look]}. Give {supply.keep_all()}, another out=, and {_SAME_CACHE} for what is there."
    ) + (
        f" {failed:,} calls had no reply for reasons that may pass: try the same words first."
        if failed
        else ""
    )


def absent_told(absent: Sequence[Look], shares: Mapping[Look, float]) -> str:
    """What became of the usual shares."""
    left = ",".join(f"{look}:{share:.3g}" for look, share in shares.items())
    whys = "; ".join(f"none is {look}, because {WHY[look]}" for look in absent)
    return f"The usual shares cannot be had: {whys}. They are taken over the others: {left}."


def before(supply: Supply, kept: int, most: int | None) -> str:
    """What the shares cost, from what is known before a second look is paid for; empty for nothing."""
    rows = len(supply.rows)
    lost = min(rows, most or rows) - kept
    if lost <= len(LOOKS) - 1:  # what whole numbers cost
        return ""
    look = supply.scarce
    return (
        f"{look} is scarce: {supply.there(look):,} of {rows:,} usable questions can have it, so the shares "
        f"leave out {lost:,} that could be rows. {supply.keep_all(most)} would use them."
    )


def absent_after(supply: Supply, left: Mapping[Look, float] | None) -> str:
    """What becomes of rows that are made, and paid for, where none has a look that the shares want."""
    look, rows = supply.absent[0], len(supply.rows)
    if left is not None:
        over = ",".join(f"{one}:{share:.3g}" for one, share in left.items())
        return (
            f"None of {rows:,} finished rows is {look}: the usual shares are taken over the others: {over}."
        )
    return (
        f"None of {rows:,} finished rows is {look}, which the shares want, so all of them are left out "
        f"(dropped.jsonl). {supply.keep_all()} would have kept them; the same words with that, another out= "
        f"and {_SAME_CACHE} ask for nothing twice."
    )


def after(supply: Supply, lost: int) -> str:
    """The same of rows that are made, and paid for; empty for nothing."""
    if not lost:
        return ""
    look, rows = supply.scarce, len(supply.rows)
    return (
        f"{lost:,} of {rows:,} finished rows are left out for the shares (dropped.jsonl): {look} is scarce, "
        f"{supply.there(look):,} rows. {supply.keep_all()} would have kept them all; the same words with "
        f"that, another out= and {_SAME_CACHE} ask for nothing twice."
    )
