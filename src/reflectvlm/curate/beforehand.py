"""The first stage of every set: the questions of which no trace would be kept are left out before anybody is
asked about them, and paid.

    questions.jsonl   each question's id, and the filter that objects to it, and why; not there where no
                      filter can know beforehand
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from reflectvlm.curate.filters.applying import Dropped, Early, unfit
from reflectvlm.curate.finishing import Nothing
from reflectvlm.curate.stages import Line, Stage
from reflectvlm.curate.types import Filter, Question


class Beforehand(NamedTuple):
    """The questions that are worth asking about, and the others."""

    fit: Sequence[Question]
    left_out: Sequence[Nothing]


def beforehand(questions: Sequence[Question], filters: Sequence[Filter], stage: Stage) -> Beforehand:
    """Asks the filters that can judge a question alone (`Early`), each question once whatever is killed."""
    early = [one for one in filters if isinstance(one, Early)]
    if not early:
        return Beforehand(questions, ())
    stage.run(questions, lambda part: [_line(found) for found in unfit(early, part)])
    fit, left_out = [], []
    for question, line in zip(questions, stage.lines(), strict=True):
        if "why" in line:
            left_out.append(Nothing(question.id, line["by"], line["why"]))
        else:
            fit.append(question)
    return Beforehand(fit, left_out)


def _line(found: Dropped | None) -> Line:
    return {} if found is None else found._asdict()
