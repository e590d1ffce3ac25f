"""Gold answers scored by the run's own rewards: a grader that cannot read the data's answers teaches
nothing, whatever the policy writes.

Where a row has its gold answer written out (SFT, distillation) that text is scored; else a short text that
holds `Sample.answer` where the rewards read it, in the layout they demand. Full marks are demanded of
`Accuracy`, `TagFormat` and `BackReward` alone: of any other reward nobody knows what a gold answer earns,
and it only must not fail. Left out: rewards with weight 0 or below.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.rewards.answers import extract_letter, extract_number
from reflectvlm.rewards.rubric import RewardFailure, Rubric
from reflectvlm.train.checks_parts import Part, answer_text, layouts, parts, places
from reflectvlm.train.checks_result import Result, Status
from reflectvlm.train.checks_subject import Subject
from reflectvlm.types import Prompt, Rollout

_NAME = "gold answers"
_FOREIGN = 2
"""Rows that rewards of the user's own are asked about: they may be slow."""
_LONG = 100
"""Characters from which on an answer is hardly ever repeated as it is."""


class _Marks(NamedTuple):
    """What one reward gave to gold answers."""

    part: Part
    values: Sequence[float]
    """NaN: it does not apply."""
    failures: Sequence[str]

    @property
    def short(self) -> int | None:
        """The first row without full marks."""
        rows = (i for i, value in enumerate(self.values) if not value >= 1 - 1e-6)
        return next(rows, None) if self.part.full else None


def gold_answers(subject: Subject) -> Result:
    """Full marks for the gold answers of the first rows."""
    known = parts(subject.rubric)
    if not isinstance(subject.rubric, Rubric) or not known:
        return Result(_NAME, "not applicable", "nothing is known of this rubric")
    if not subject.evaluates:
        return Result(_NAME, "not applicable", "the rubric scores evaluations, and there are none")
    rollouts = [subject.written(prompt, _text(subject, prompt)) for prompt in subject.prompts]
    marks = [_marks(subject.rubric, part, rollouts) for part in known]
    for one in marks:
        if one.failures:
            return _failing(one, rollouts)
    for one in marks:
        if one.short is not None:
            return _short(subject, one, rollouts)
    full = [part.name for part in known if part.full]
    others = [part.name for part in known if not part.own]
    unknown = f"what earns full marks from {', '.join(others)} is not known"
    if not full:
        return Result(_NAME, "not applicable", unknown if others else "no reward asks whether it is right")
    if narrow := _narrow(known, subject.prompts):
        return narrow
    found = f"full marks from {', '.join(full)} on {len(rollouts)} rows"
    return Result(_NAME, "ok", f"{found}; {unknown}" if others else found)


def _text(subject: Subject, prompt: Prompt) -> str:
    if (text := subject.gold(prompt)) is not None:
        return text
    found = layouts(subject.rubric)
    return answer_text(prompt.sample.answer, found[0] if found else None, places(subject.rubric))


def _marks(rubric: Rubric, part: Part, rollouts: Sequence[Rollout]) -> _Marks:
    """Each row as a group of its own, through a rubric that raises: neither the run's count of failures nor
    its log hears of it."""
    alone = dataclasses.replace(
        rubric,
        rewards={part.name: part.reward},
        weights={part.name: 1.0},
        on_error="raise",
        max_failures=None,
    )
    values: list[float] = []
    failures: list[str] = []
    for rollout in rollouts if part.own else rollouts[:_FOREIGN]:
        try:
            values.append(alone([rollout]).parts[part.name][0])
        except RewardFailure as error:
            values.append(math.nan)
            failures.append(f"row {rollout.prompt.sample.id!r}: {_reason(error)}")
    return _Marks(part, values, failures)


def _reason(error: RewardFailure) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def _failing(marks: _Marks, rollouts: Sequence[Rollout]) -> Result:
    asked = min(len(marks.values), len(rollouts))
    every = len(marks.failures) == asked
    return Result(
        _NAME,
        "failed" if every or marks.part.own else "warning",
        f"reward {marks.part.name!r} fails on {len(marks.failures)} of {asked} gold answers, "
        f"first on {marks.failures[0]}",
        "Repair the reward or the row; a reward that fails on every answer teaches nothing.",
    )


def _short(subject: Subject, marks: _Marks, rollouts: Sequence[Rollout]) -> Result:
    assert marks.short is not None
    rollout, value = rollouts[marks.short], marks.values[marks.short]
    sample = rollout.prompt.sample
    count = sum(not one >= 1 - 1e-6 for one in marks.values)
    written = subject.gold(rollout.prompt) is not None
    # Of answers that are written out a few may be faulty, as in any data; a text of ours is right.
    status: Status = "failed" if not written or count == len(rollouts) else "warning"
    where = (
        f"Accuracy(answer_from={marks.part.accuracy.answer_from!r})" if marks.part.accuracy else "The layout"
    )
    return Result(
        _NAME,
        status,
        f"reward {marks.part.name!r} gives {value:g}, not 1, on {count} of {len(rollouts)} gold answers, "
        f"first row {sample.id!r} with answer {_cut(sample.answer)!r}, written {_cut(rollout.text)!r}",
        f"{where} does not read it: repair the row's answer, or the reward.",
    )


def _narrow(known: Sequence[Part], prompts: Sequence[Prompt]) -> Result | None:
    """Answers that are right only if repeated character by character."""
    readers = {"number": extract_number, "choice": extract_letter}
    for accuracy in (part.accuracy for part in known):
        if accuracy is None:
            continue
        read = readers.get(accuracy.kind)
        for sample in (prompt.sample for prompt in prompts):
            if read is not None and read(sample.answer) is None:
                why = f"is no {accuracy.kind}, which Accuracy.kind says it is"
            elif _is_essay(accuracy, sample.answer):
                why = f"has {len(sample.answer)} characters"
            else:
                continue
            return Result(
                _NAME,
                "warning",
                f"the gold answer {_cut(sample.answer)!r} of row {sample.id!r} {why}: "
                "only the same words are right",
                "Give the final answer alone in the answer's column, or the kind that it has.",
            )
    return None


def _is_essay(accuracy: Accuracy, answer: str) -> bool:
    return accuracy.kind in ("auto", "text") and (len(answer) > _LONG or "\n" in answer.strip())


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
