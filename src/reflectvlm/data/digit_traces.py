"""Gold answers for pages of digits, in four styles.

instruct   what an instruct model says: readings, working, box; knows no tags
semantic   `<back>` in the middle of the reasoning: reads, looks again, then works it out
solution   `<back>` after a finished preliminary solution: checks it against the page, then rethinks
qwen_la    Qwen-LA's cold start (arXiv 2505.23558): its four blocks, and one `<REFLECTION>` between
           reasoning and conclusion, which reads and works it out again; a chosen share has an empty
           second one

In a chosen share of the tagged traces one first reading is *wrong* and the look back corrects it,
so that what is read inside `<back>` or `<REFLECTION>` carries the answer. Where the first reading was
right, the look back confirms it. What is worked out from a wrong reading follows from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np

from reflectvlm.data.digits import PLACES, conclude, reading
from reflectvlm.types import Sample

Style = Literal["instruct", "semantic", "solution", "qwen_la"]
STYLES = ("instruct", "semantic", "solution", "qwen_la")


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
    second_reflection: float = 0.0
    """Share of qwen_la traces with a second reflection, an empty one; the paper's cold start has none.
    A small policy never tries by itself what no trace has shown it, and RL can only strengthen what is
    tried."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"DigitTraces.style is {self.style!r}. It must be one of {STYLES}.")
        for name in ("wrong_first", "second_reflection"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"DigitTraces.{name} is {getattr(self, name)}. It is a share, from 0 to 1.")

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
        trace = trace_of(self.style, sample, misread(sample, rng) if wrong else sample.columns["digits"])
        if self.style == "qwen_la" and rng.random() < self.second_reflection:
            trace = trace.replace("</REFLECTION>", "</REFLECTION><REFLECTION></REFLECTION>")
        return dataclasses.replace(sample, columns={**sample.columns, "trace": trace})


def trace_of(style: Style, sample: Sample, first: Sequence[int | None]) -> str:
    """The gold answer to a page whose places were first read as `first`."""
    facts: Any = sample.columns
    kind, looks, digits, working = facts["kind"], facts["looks"], facts["digits"], facts["working"]
    seen = ", ".join(reading(place, digits[place]) for place in looks)
    if style == "instruct":
        return f"{seen[0].upper()}{seen[1:]}. {working}. \\boxed{{{sample.answer}}}"
    first_seen = ", ".join(reading(place, first[place]) for place in looks)
    first_working, first_answer = conclude(kind, looks, first, sample.question)
    if style == "qwen_la":
        blocks = {
            "SUMMARY": f"{_summary(kind, looks, sample.question)}.",
            "CAPTION": f"{first_seen}.",
            "REASONING": f"{first_working}.",
            "REFLECTION": f"Looking again: {seen}. {working}.",
            "CONCLUSION": sample.answer,
        }
        return "".join(f"<{tag}>{text}</{tag}>" for tag, text in blocks.items())
    if style == "semantic":
        think, back = f"{first_seen}.", f"Looking again: {seen}."
    else:
        think, back = f"{first_seen}. {first_working}.", f"Check {first_answer} on the page: {seen}."
    return f"<think>{think}</think> <back>{back}</back> <think>{working}.</think> \\boxed{{{sample.answer}}}"


def _summary(kind: str, looks: Sequence[int], question: str) -> str:
    """What is asked, in a few words: "Read the upper left digit", "Count the 3s"."""
    match kind:
        case "read":
            return f"Read the {PLACES[looks[0]]} digit"
        case "add" | "subtract" | "compare":
            return f"{kind.capitalize()} two digits"
        case _:
            number = "".join(filter(str.isdigit, question))
            return f"Count the {number}s" if kind == "count" else f"Count digits above {number}"


def misread(sample: Sample, rng: np.random.Generator) -> tuple[int | None, ...]:
    """The page's digits with one that the question looks at read as another one."""
    digits = list(sample.columns["digits"])
    filled = [place for place in sample.columns["looks"] if digits[place] is not None]
    place = filled[int(rng.integers(len(filled)))]
    digits[place] = (digits[place] + int(rng.integers(1, 10))) % 10
    return tuple(digits)
