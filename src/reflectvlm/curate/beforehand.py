"""The first stage of every set: the questions of which no trace would be kept are left out before anybody is
asked about them, and paid.

    questions.jsonl   each question's id, and the filter that objects to it, and why; not there where no
                      filter can know beforehand
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from reflectvlm.curate.finishing import Nothing
from reflectvlm.curate.stages import Line, Stage
from reflectvlm.curate.types import Filter, Question


@runtime_checkable
class Early(Protocol):
    """A filter that knows of some questions already that no trace of theirs will be kept."""

    @property
    def name(self) -> str: ...
    def of_question(self, question: Question, /) -> str | None: ...


class Beforehand(NamedTuple):
    """The questions that are worth asking about, and the others."""

    fit: Sequence[Question]
    left_out: Sequence[Nothing]


def beforehand(questions: Sequence[Question], filters: Sequence[Filter], stage: Stage) -> Beforehand:
    """Asks the filters that are `Early`, each question once whatever is killed."""
    early = [one for one in filters if isinstance(one, Early)]
    if not early:
        return Beforehand(questions, ())
    stage.run(questions, lambda part: [_line(early, question) for question in part])
    fit, left_out = [], []
    for question, line in zip(questions, stage.lines(), strict=True):
        if "why" in line:
            left_out.append(Nothing(question.id, line["by"], line["why"]))
        else:
            fit.append(question)
    return Beforehand(fit, left_out)


def _line(filters: Sequence[Early], question: Question) -> Line:
    """The first filter's objection."""
    for one in filters:
        if (why := one.of_question(question)) is not None:
            return {"by": one.name, "why": why}
    return {}
