"""Filters in turn over traces in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from reflectvlm.curate.types import Filter, Trace


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
