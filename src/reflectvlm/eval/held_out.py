"""The held-out rows of a run, scored as `reflectvlm eval` scores them: same scorers, same denominator.

    accuracy             by the strict scorer, which looks where the instruction puts the answer
    official/HEADLINE    of a benchmark's rows (`TaskRows`): its own rule; no language model helps it here
    strict/HEADLINE      the same figure by the strict scorer, where it is not the accuracy

A row that could not be asked stays in the denominator and is wrong. What a run rewards beside a right answer,
and what its rubric makes of that, is `train/evaluate.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from reflectvlm.eval.matching import Matched
from reflectvlm.eval.result import TaskResult, score_task
from reflectvlm.eval.rows import TaskRows
from reflectvlm.eval.scorers import Official, Strict, place_asked_for, plain
from reflectvlm.eval.types import Item, Reply
from reflectvlm.types import Rollout, Sample

_UNREAD = "(a row that could not be read)"
"""Gold of such a row: nothing is right there, and it is scored, as the rows around it are."""


def held_out_figures(
    data: Sequence[Sample], answers: Mapping[int, Rollout], missing: Mapping[int, str], instruction: str
) -> dict[str, float]:
    """`answers` and `missing` are by the row's place: one answer to each row, or why it could not be asked.

    Rows without any gold answer have no accuracy; a rule that needs a language model has NaN.
    """
    result = _scored(data, answers, missing, instruction)
    values = {}
    if (accuracy := plain(result.marks["strict"]).values["accuracy"]) is not None:
        values["accuracy"] = accuracy
    for name, marks in result.marks.items():
        summary = result.summaries[name]
        if isinstance(data, TaskRows) and not (name == "strict" and summary.mean):
            figure = summary.values.get(summary.headline)
            values[f"{name}/{summary.headline}"] = math.nan if figure is None else figure
        if values and (unscored := sum(mark.value is None for mark in marks)):
            values[f"{name}/unscored"] = unscored / len(marks)
    return values


def _scored(
    data: Sequence[Sample], answers: Mapping[int, Rollout], missing: Mapping[int, str], instruction: str
) -> TaskResult:
    task = data.task if isinstance(data, TaskRows) else None
    items = data.items if isinstance(data, TaskRows) else _items(len(data), answers)
    replies = [
        Reply(item=item, text=answers[place].text if place in answers else "")
        for place, item in enumerate(items)
    ]
    strict = Strict(answer_from=place_asked_for(instruction))
    return score_task(
        "held-out rows" if task is None else task.name,
        task,
        Matched(items, replies, 1, ()),
        {items[place].id: why for place, why in missing.items()},
        [strict] if task is None else [Official(), strict],
    )


def _items(count: int, answers: Mapping[int, Rollout]) -> list[Item]:
    """Rows of a user's own by their place, since ids of theirs may come twice."""
    samples = {place: rollout.prompt.sample for place, rollout in answers.items()}
    unread = _UNREAD if any(sample.answer.strip() for sample in samples.values()) else ""
    return [
        Item(id=str(place), question=samples[place].question, answer=samples[place].answer)
        if place in samples
        else Item(id=str(place), question="", answer=unread)
        for place in range(count)
    ]
