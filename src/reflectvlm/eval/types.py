"""The words of evaluation: what a benchmark asks, what was replied, what a scorer says of it.

    Task.load(data_dir) -> Item…        one row of a benchmark, images unread
    a model                             -> Reply…   one text for one item
    Scorer(task, replies)               -> Mark…    right, wrong, or not scored
    Task.summary(items, marks)          -> Summary  the benchmark's own figures

A reply to an item whose image is missing is an empty text: it stays in the denominator and is never right
(`result.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from reflectvlm.data.fetch import RowImage

Manner = Literal["official", "lookback"]
"""How a benchmark's rows become questions: as its authors ask, or as Look-Back's evaluation does."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Item:
    """One row of a benchmark. Example: `Item(id="17", question="How many?", answer="3")`"""

    id: str
    """Unique within its task, and the same whenever the task is loaded."""
    question: str
    """As it is asked, options included, without an instruction about the form of the answer."""
    answer: str
    """Gold for the strict scorer: a letter where there are options, else the value. Empty: there is none."""
    images: tuple[RowImage, ...] = ()
    """Paths relative to `root`, or bytes. Read only when the question is asked."""
    root: Path = Path()
    choices: tuple[str, ...] = ()
    """Texts of the options, the first is A."""
    lookback_answer: str | None = None
    """Gold for Look-Back's scorer where its loader makes another one; None: `answer`."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What the benchmark's own rules need besides."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reply:
    item: Item
    text: str
    number: int = 0
    """Which of several replies to the same item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What a scorer says of a reply."""

    value: float | None
    """1 right, 0 wrong, or a rating in the task's own unit; None: not scored, and `note` says why."""
    answer: str = ""
    """What was taken to be the reply's answer."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of one benchmark, of replies with the same number."""

    headline: str
    """The name in `values` of the one figure that a table shows."""
    values: Mapping[str, float | None]
    """By name, e.g. `accuracy`, `accuracy/subject/algebra`; None: not scored. Shares are from 0 to 1."""
    unit: Literal["share", "points"] = "share"
    """Of the headline: a share, which tables show in per cent, or points as they are."""
    unscored: int = 0
    """Replies without a mark."""
    mean: bool = True
    """The headline is the mean of the marks, so that an interval of that mean is its own. False for F1, sums
    of points, means over groups of rows."""


class Ask(Protocol):
    """A language model that helps a rule: prompts -> its replies; None where it gave none (`asking.py`)."""

    def __call__(self, prompts: Sequence[str], /) -> list[str | None]: ...


@runtime_checkable
class Task(Protocol):
    """A benchmark: a frozen dataclass whose fields are its variants, e.g. `MathVista(split="testmini")`."""

    @property
    def name(self) -> str: ...

    def load(self, data_dir: Path) -> list[Item]:
        """All rows in their official order. Raises `MissingData`: what to fetch, and where to put it."""
        ...

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:
        """By the benchmark's official rule, in the order of the replies. What only a language model could
        decide is not scored without one."""
        ...

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        """The official figures. `marks` may come from any scorer; both have the same order and length."""
        ...


class MissingData(ValueError):
    """The files of a benchmark are not where they are looked for. Its first line says so, the others what to
    fetch; `short` says both in one line, and of several ways the first."""

    def __init__(self, text: str, short: str = "") -> None:
        super().__init__(text)
        self.short = short or " ".join(text.split())
