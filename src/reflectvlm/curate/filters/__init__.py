"""What may enter a set: one file per rule, each a frozen dataclass that says why a trace is not kept
(docs/data_filters.md).

`standard(method)` are the usual ones of a method; `screened(filters, traces)` asks them in turn.
"""

from __future__ import annotations

from reflectvlm.curate.contamination import EvaluationIndex
from reflectvlm.curate.filters.answer import AnswerRight
from reflectvlm.curate.filters.applying import Dropped, screened
from reflectvlm.curate.filters.duplicates import Duplicates
from reflectvlm.curate.filters.language import Language
from reflectvlm.curate.filters.layout import InLayout, layout_of
from reflectvlm.curate.filters.leak import AnswerNotLeaked
from reflectvlm.curate.filters.lengths import Lengths
from reflectvlm.curate.filters.overlap import NoOverlap
from reflectvlm.curate.filters.visible import NamesWhatIsSeen
from reflectvlm.curate.types import Filter

__all__ = [
    "AnswerNotLeaked",
    "AnswerRight",
    "Dropped",
    "Duplicates",
    "InLayout",
    "Language",
    "Lengths",
    "NamesWhatIsSeen",
    "NoOverlap",
    "layout_of",
    "screened",
    "standard",
]


def standard(method: str, without: EvaluationIndex | None = None) -> tuple[Filter, ...]:
    """The usual filters of `semantic_back`, `solution_back` or `qwen_la`: cheap ones first, duplicates
    last, so that only what is otherwise kept counts as the first of its kind. Each call gives new ones,
    which have seen nothing.

    Overlap with evaluation sets needs the sets: `without` is their index."""
    layout_of(method)  # which knows the methods
    return (
        InLayout(),
        Lengths(),
        Language(),
        AnswerNotLeaked(),
        NamesWhatIsSeen(),
        AnswerRight(),
        *(() if without is None else (NoOverlap(index=without),)),
        Duplicates(),
    )
