"""The words of making data: a question, what a teacher is asked and says, the trace that comes of it.

    readers      -> Question…            rows of a source, images unread
    a stage      Question -> Request…    what one row needs to be asked
    Teacher      Request… -> Said…       whoever answers: a server, a policy, a file, a rule
    a stage      Said…    -> Trace       an answer in a paper's layout, or why there is none
    Filter       Trace    -> reason      what is kept, and why the rest is not

A stage is a function of its rows and of what was said, nothing else: said again from the cache, it makes the
same traces, whatever was killed in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from reflectvlm.data.fetch import RowImage

Look = Literal["corrected", "confirmed", "unneeded"]
"""What a trace's second look does: it mends a wrong first reading, finds a right one to be right, or is left
out because none is needed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """One row of a source. Example: `Question(id="17", question="How many?", answer="3")`"""

    id: str
    question: str
    answer: str
    images: tuple[RowImage, ...] = ()
    """Paths relative to `root`, or bytes. Read only when they are shown to somebody."""
    root: Path = Path()
    source: str = ""
    """The name of where it comes from, for mixtures and reports."""
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """What a teacher is asked: one turn about images. Its `key` is a hash of all that decides the reply."""

    row: str
    """Id of the question that it is about; not part of the key."""
    purpose: str
    """What it is for, in a word: `answer`, `insert`, `rewrite`, `judge`. Reports count by it."""
    text: str
    images: tuple[RowImage, ...] = ()
    root: Path = Path()
    system: str | None = None
    number: int = 0
    """Which of several answers to the same text: another number is another reply."""
    max_tokens: int = 1024
    temperature: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A teacher's reply, or why there is none. A refusal and a cut reply are such reasons, too."""

    text: str | None
    why: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0


@runtime_checkable
class Teacher(Protocol):
    """Replies, in the order of the requests. What it cannot say is a `Said` without text; it does not raise
    for one request's sake. It may be asked for many at once and works them off as its own limits allow."""

    @property
    def name(self) -> str:
        """With all settings that decide what it says: part of the cache's key."""
        ...

    def __call__(self, requests: Sequence[Request], /) -> list[Said]: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """A row of the set that is being made."""

    question: Question
    text: str
    """The answer in its layout, tags and all."""
    method: str
    look: Look = "confirmed"
    kept: str = ""
    """The part of `text` before the second look that was taken over letter by letter, if any."""
    made_by: str = ""
    """The teacher's name, or `gold`."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else a report wants to know: pass rate, first answer, votes."""


@runtime_checkable
class Filter(Protocol):
    """Why a trace is not kept, in a few words, or None. `name` is what reports count it by."""

    @property
    def name(self) -> str: ...
    def __call__(self, trace: Trace, /) -> str | None: ...
