"""Gold answers for pages of digits, in three styles.

instruct   what an instruct model says: readings, working, box; knows no tags
semantic   `<back>` in the middle of the reasoning: reads, looks again, then works it out
solution   `<back>` after a finished preliminary solution: checks it against the page, then rethinks

In a chosen share of the tagged traces one first reading is *wrong* and the look back corrects it,
so that what is read inside `<back>` carries the answer. Where the first reading was right, the look
back confirms it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np

from reflectvlm.data.digits import conclude, reading
from reflectvlm.types import Sample

Style = Literal["instruct", "semantic", "solution"]
STYLES = ("instruct", "semantic", "solution")


@dataclass(frozen=True, kw_only=True)
class DigitTraces(Sequence[Sample]):
    """The rows of `data` with a gold answer in `columns["trace"]`.

    Example: `DigitTraces(data=Digits(size=600), style="semantic")[3].columns["trace"]` is
    "<think>lower left 6, upper right 5.</think> <back>Looking again: lower left 6, upper right
    7.</back> <think>7 is larger than 6.</think> \\boxed{7}"
    """

    data: Sequence[Sample]
    style: Style = "semantic"
    wrong_first: float = 0.3
    """Share of tagged traces whose first reading is wrong at one place."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"DigitTraces.style is {self.style!r}. It must be one of {STYLES}.")
        if not 0 <= self.wrong_first <= 1:
            raise ValueError(f"DigitTraces.wrong_first is {self.wrong_first}. It is a share, from 0 to 1.")

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        sample = self.data[index]
        rng = np.random.default_rng([self.seed, index, 1])
        wrong = self.style != "instruct" and rng.random() < self.wrong_first
        trace = _trace(self.style, sample, _misread(sample, rng) if wrong else sample.columns["digits"])
        return dataclasses.replace(sample, columns={**sample.columns, "trace": trace})


def _trace(style: Style, sample: Sample, first: Sequence[int | None]) -> str:
    facts: Any = sample.columns
    kind, looks, digits, working = facts["kind"], facts["looks"], facts["digits"], facts["working"]
    seen = ", ".join(reading(place, digits[place]) for place in looks)
    if style == "instruct":
        return f"{seen[0].upper()}{seen[1:]}. {working}. \\boxed{{{sample.answer}}}"
    first_seen = ", ".join(reading(place, first[place]) for place in looks)
    if style == "semantic":
        think, back = f"{first_seen}.", f"Looking again: {seen}."
    else:
        first_working, first_answer = conclude(kind, looks, first, sample.question)
        think, back = f"{first_seen}. {first_working}.", f"Check {first_answer} on the page: {seen}."
    return f"<think>{think}</think> <back>{back}</back> <think>{working}.</think> \\boxed{{{sample.answer}}}"


def _misread(sample: Sample, rng: np.random.Generator) -> tuple[int | None, ...]:
    """The page's digits with one that the question looks at read as another one."""
    digits = list(sample.columns["digits"])
    filled = [place for place in sample.columns["looks"] if digits[place] is not None]
    place = filled[int(rng.integers(len(filled)))]
    digits[place] = (digits[place] + int(rng.integers(1, 10))) % 10
    return tuple(digits)
