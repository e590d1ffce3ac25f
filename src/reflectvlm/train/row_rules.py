"""What becomes of rows that cannot be used: the rules, the counts, and the error for a row too long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from reflectvlm.spans import count_tokens
from reflectvlm.types import Prompt, Spans

Item: TypeAlias = tuple[Prompt, Spans]
"""A row as it is used: its prompt, and its gold answer where one is trained on."""

ENOUGH = 100
"""Rows that must have been tried before their share of unusable ones is judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRules:
    """What becomes of rows that cannot be used while a run goes on.

    Example: `RowRules(on_bad="skip", on_long="truncate_text", max_bad=0.01)`
    """

    on_bad: Literal["error", "skip"] = "skip"
    """A row that cannot be read or shown: "error" ends the run, "skip" takes the next one."""
    on_long: Literal["error", "skip", "truncate_text"] = "skip"
    """A row over the token limit. "truncate_text" cuts the question's own text from its end; images,
    instruction and gold answer stay whole, and a row that is too long without its text, or only with the
    blocks of re-attention, goes the way of `on_bad`."""
    max_bad: float = 0.05
    """Largest share of rows left out, of all that were tried; a larger one ends the run. Judged from
    100 rows on, with three standard deviations of room for chance."""

    def __post_init__(self) -> None:
        if self.on_bad not in ("error", "skip"):
            raise ValueError(f"row_rules.on_bad is {self.on_bad!r}. It must be 'error' or 'skip'.")
        if self.on_long not in ("error", "skip", "truncate_text"):
            raise ValueError(
                f"row_rules.on_long is {self.on_long!r}. It must be 'error', 'skip' or 'truncate_text'."
            )
        if not 0 <= self.max_bad <= 1:
            raise ValueError(
                f"row_rules.max_bad is {self.max_bad}. It is a share of the rows, between 0 and 1."
            )

    def too_many(self, left_out: int, tried: int) -> bool:
        """Whether so many of so many say that the data holds more unusable rows than `max_bad`."""
        room = 3 * math.sqrt(self.max_bad * (1 - self.max_bad) * tried)
        return tried >= ENOUGH and left_out > self.max_bad * tried + room


class Counts(NamedTuple):
    """What became of the rows so far. `str` is a line for people."""

    tried: int = 0
    """Positions taken, every epoch anew."""
    unreadable: int = 0
    too_long: int = 0
    shortened: int = 0
    """Used with less text."""

    @property
    def left_out(self) -> int:
        return self.unreadable + self.too_long

    def plus(self, other: Counts) -> Counts:
        return Counts(*(one + more for one, more in zip(self, other, strict=True)))

    def minus(self, other: Counts) -> Counts:
        return Counts(*(one - less for one, less in zip(self, other, strict=True)))

    def __str__(self) -> str:
        why = f" ({self.unreadable:,} unreadable, {self.too_long:,} too long)" if self.left_out else ""
        return f"{self.tried:,} rows tried, {self.left_out:,} left out{why}, {self.shortened:,} shortened"


class LongRow(ValueError):
    """A row with more tokens than the run allows."""

    def __init__(self, item: Item, limit: int, limit_name: str, remedy: str = "") -> None:
        prompt, answer = item
        self.sample, self.limit, self.limit_name = prompt.sample, limit, limit_name
        self.tokens = count_tokens(prompt.spans + answer, prompt.grids)
        visual = sum(grid.tokens for grid in prompt.grids)
        images = f" ({visual} of them of images)" if visual else ""
        what = "with its answer it has" if answer else "its prompt has"
        self.reason = f"{what} {self.tokens} tokens{images}, {limit_name} is {limit}"
        remedy = remedy or (
            f"Raise {limit_name}, lower policy.max_pixels, or say what becomes of such rows: "
            "row_rules.on_long=skip leaves them out, truncate_text cuts their question."
        )
        super().__init__(
            f"Row {self.sample.id!r} has {self.tokens} tokens, more than {limit_name}={limit}{images}. "
            f"{remedy}"
        )
