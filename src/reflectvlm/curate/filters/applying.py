"""Filters in turn over traces in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from reflectvlm.curate.types import Filter, Question, Trace


class Dropped(NamedTuple):
    """Why a trace is not kept."""

    by: str
    """The filter's name."""
    why: str


@runtime_checkable
class Batched(Protocol):
    """A filter that is quicker with many traces at once. Its reasons are those of one call per trace, in
    order."""

    def many(self, traces: Sequence[Trace], /) -> list[str | None]: ...


@runtime_checkable
class Early(Protocol):
    """A filter that knows of some questions already that no trace of theirs will be kept, so that nobody need
    be asked about them."""

    @property
    def name(self) -> str: ...
    def of_question(self, question: Question, /) -> str | None: ...


def unfit(filters: Sequence[Early], questions: Sequence[Question]) -> list[Dropped | None]:
    """For each question the first filter's objection, or None."""
    return [
        next(
            (Dropped(one.name, why) for one in filters if (why := one.of_question(question)) is not None),
            None,
        )
        for question in questions
    ]


def screened(filters: Sequence[Filter], traces: Sequence[Trace]) -> list[Dropped | None]:
    """For each trace the first filter's objection, or None. A filter sees only what those before it let
    pass, in the order of the traces; so a set in several portions gives what the whole gives at once."""
    found: list[Dropped | None] = [None] * len(traces)
    for one in filters:
        left = [place for place, why in enumerate(found) if why is None]
        asked = [traces[place] for place in left]
        whys = one.many(asked) if isinstance(one, Batched) else [one(trace) for trace in asked]
        for place, why in zip(left, whys, strict=True):
            if why is not None:
                found[place] = Dropped(one.name, why)
    return found
