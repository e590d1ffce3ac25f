"""`Mixture`: one stream of rows out of several, by weights. The same words give the same rows in any run.

Which source gives the next row is drawn by a generator of its own seed; a source gives its rows in their
order, and, where a number of rows is asked for, begins again when it is used up. Without a number every row
comes once and a source that is used up is left out of the draw. Memory holds one row of each source, and a
hash of every id. Left out: shuffling within a source, which a trainer does anyway.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from reflectvlm.curate.types import Question

Rows = Callable[[], Iterator[Question]]
"""Begins a source anew."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One source of a mixture."""

    name: str
    """What its ids are prefixed with."""
    rows: Rows
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"The weight of {self.name} is {self.weight}. It must be more than 0.")
        if not self.name or "/" in self.name:
            raise ValueError(f"A source is named {self.name!r}. A name stands in front of ids: no '/' in it.")


@dataclass(kw_only=True, eq=False)
class Mixture:
    """Example: `for row in Mixture(parts=(a, b), rows=1000, seed=0): …`; `shares` says what came of it."""

    parts: Sequence[Part]
    rows: int | None = None
    """How many; None: every row of every source once."""
    seed: int = 0
    given: dict[str, int] = field(default_factory=dict, init=False)
    """Rows that each source has given."""
    rounds: dict[str, int] = field(default_factory=dict, init=False)
    """Which walk through each source it is."""

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not names:
            raise ValueError("A mixture needs at least one source.")
        if len(set(names)) < len(names):
            raise ValueError(f"Two sources of a mixture have one name: {', '.join(names)}. Rename a file.")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows is {self.rows}. It must be at least 1, or left out for all.")
        self.given.update(dict.fromkeys(names, 0))
        self.rounds.update(dict.fromkeys(names, 1))

    def __iter__(self) -> Iterator[Question]:
        """Rows with ids `name/id`, in later rounds of a source `name/id~2`, `name/id~3`."""
        rng = random.Random(f"mixture {self.seed}")
        running = {part.name: part.rows() for part in self.parts}
        left = list(self.parts)
        while left and (self.rows is None or sum(self.given.values()) < self.rows):
            part = rng.choices(left, [one.weight for one in left])[0]
            row = next(running[part.name], None)
            if row is None and self.rows is not None:
                self.rounds[part.name] += 1
                running[part.name] = part.rows()
                row = next(running[part.name], None)
            if row is None:
                left.remove(part)
                continue
            self.given[part.name] += 1
            again = self.rounds[part.name]
            name = f"{part.name}/{row.id}" + (f"~{again}" if again > 1 else "")
            yield dataclasses.replace(row, id=name, source=part.name)

    @property
    def shares(self) -> dict[str, tuple[float, float]]:
        """Of each source, the share that its weight asks for, and the share that it has."""
        weights = sum(part.weight for part in self.parts)
        total = sum(self.given.values()) or 1
        return {part.name: (part.weight / weights, self.given[part.name] / total) for part in self.parts}
