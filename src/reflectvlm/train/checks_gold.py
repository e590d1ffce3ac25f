"""Gold answers scored by the run's own rewards: a grader that cannot read the data's answers teaches
nothing, whatever the policy writes.

Scored is a short text that holds `Sample.answer` where the rewards read it, in the layout they demand; and
where gold answers are written out and learned from (SFT, a distillation that repairs), those too. Full marks
are demanded of `Accuracy`, `TagFormat` and `BackReward` alone: of any other reward nobody knows what a gold
answer earns, and it only should not fail. A run is stopped only if no answer of the data can be right; of all
else it is told. Left out: rewards with weight 0 or below.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.rewards.answers import extract_letter, extract_number
from reflectvlm.rewards.isolation import RewardError
from reflectvlm.rewards.rubric import RewardFailure, Rubric
from reflectvlm.train.checks_parts import Part, answer_text, layouts, parts, places
from reflectvlm.train.checks_result import Result, Status
from reflectvlm.train.checks_subject import Subject
from reflectvlm.types import Prompt, Rollout

_NAME = "gold answers"
_FOREIGN = 2
"""Rows that rewards of the user's own are asked about: they may be slow."""
_COPIES = 8
"""And at most so many copies of an answer as one group."""
_LONG = 100
"""Characters from which on an answer is hardly ever repeated as it is."""
_FULL = 1 - 1e-6


class _Marks(NamedTuple):
    """What one reward gave to gold answers."""

    part: Part
    rollouts: Sequence[Rollout]
    values: Sequence[float]
    """NaN: it does not apply, or it failed."""
    failures: Mapping[int, str]
    """By row."""
    killed: int
    """Failures that say nothing of the row: a grader that had to be killed."""
    copies: int

    @property
    def short(self) -> list[int]:
        """Rows without full marks, of a reward of which they are to be had."""
        rows = (i for i, value in enumerate(self.values) if i not in self.failures and not value >= _FULL)
        return list(rows) if self.part.full else []


def gold_answers(subject: Subject) -> Result:
    """Full marks for the gold answers of the first rows."""
    known = parts(subject.rubric)
    if not isinstance(subject.rubric, Rubric) or not known:
        return Result(_NAME, "not applicable", "nothing is known of this rubric")
    if not subject.evaluates:
        return Result(_NAME, "not applicable", "the rubric scores evaluations, and there are none")
    found: list[Result] = []
    count = 0
    for written in (False, True):
        rollouts = _rollouts(subject, written)
        count = max(count, len(rollouts))
        asked = [
            part for part in known if part.own or written == (subject.kind == "sft")
        ]  # foreign ones once
        marks = [_marks(subject, part, rollouts) for part in asked] if rollouts else []
        found += [result for one in marks if (result := _judged(subject, one, written)) is not None]
    if found:
        return min(found, key=lambda result: result.status != "failed")  # of equals the first
    full = [part.name for part in known if part.full]
    others = [part.name for part in known if not part.own]
    unknown = f"what earns full marks from {', '.join(others)} is not known"
    if not full:
        return Result(_NAME, "not applicable", unknown if others else "no reward asks whether it is right")
    if not count:
        return Result(_NAME, "not applicable", "no row states its answer")
    if narrow := _narrow(known, subject.prompts):
        return narrow
    told = f"full marks from {', '.join(full)} on {count} rows"
    return Result(_NAME, "ok", f"{told}; {unknown}" if others else told)


def _rollouts(subject: Subject, written: bool) -> list[Rollout]:
    """Gold answers as they are written out, if the run learns from those; or short ones of ours."""
    if written:
        if subject.kind != "sft" and not subject.repairs:
            return []
        # The rows of SFT need not state what evaluations ask for; theirs do.
        texts = [(prompt, subject.gold(prompt)) for prompt in subject.prompts if prompt.sample.answer.strip()]
        return [subject.written(prompt, text) for prompt, text in texts if text is not None]
    if subject.kind == "sft":
        return []
    found, where = layouts(subject.rubric), places(subject.rubric)
    layout = found[0] if found else None
    return [
        subject.written(prompt, answer_text(prompt.sample.answer, layout, where))
        for prompt in subject.prompts
    ]


def _marks(subject: Subject, part: Part, rollouts: Sequence[Rollout]) -> _Marks:
    """Each row as a group of its own, through a rubric that raises: neither the run's count of failures nor
    its log hears of it. Rewards of the user's own may compare a group: they get one as large as the run's,
    of copies."""
    alone = dataclasses.replace(
        subject.rubric,
        rewards={part.name: part.reward},
        weights={part.name: 1.0},
        on_error="raise",
        max_failures=None,
    )
    single = part.own or getattr(part.reward, "rowwise", False)
    copies = 1 if single else min(subject.group_size, _COPIES)
    asked = rollouts if part.own else rollouts[:_FOREIGN]
    values: list[float] = []
    failures: dict[int, str] = {}
    killed = 0
    for number, rollout in enumerate(asked):
        try:
            values.append(alone([rollout] * copies).parts[part.name][0])
        except RewardFailure as error:
            values.append(math.nan)
            killed += isinstance(error.__cause__, RewardError)
            failures[number] = f"row {rollout.prompt.sample.id!r}: {_reason(error)}"
    return _Marks(part, asked, values, failures, killed, copies)


def _reason(error: RewardFailure) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def _judged(subject: Subject, marks: _Marks, written: bool) -> Result | None:
    if not marks.short and not marks.failures:
        return None
    status: Status = "failed" if not written and _hopeless(subject, marks) else "warning"
    return _short(marks, status) if marks.short else _failing(marks, status)


def _hopeless(subject: Subject, marks: _Marks) -> bool:
    """Whether no answer to these rows can be right, for certain.

    Not one may have been right, and at least half of the rows looked at must have been graded: one or two odd
    rows are in any data, and what is left out or cut short in grading proves nothing. Several places to
    answer in could get in each other's way in a text of ours."""
    right = marks.part.right
    if not right or len(places(subject.rubric)) > 1:
        return False
    graded = len(marks.values) - marks.killed
    wrong = all(not value >= right - 1e-6 for value in marks.values)
    return wrong and graded > 0 and 2 * graded >= subject.looked


def _failing(marks: _Marks, status: Status) -> Result:
    group = f" (asked about groups of {marks.copies} copies of one answer)" * (marks.copies > 1)
    return Result(
        _NAME,
        status,
        f"reward {marks.part.name!r} fails on {len(marks.failures)} of {len(marks.values)} gold answers, "
        f"first on {next(iter(marks.failures.values()))}{group}",
        "Repair the reward or the row; a reward that fails on every answer teaches nothing.",
    )


def _short(marks: _Marks, status: Status) -> Result:
    first = marks.short[0]
    rollout, value, part = marks.rollouts[first], marks.values[first], marks.part
    sample = rollout.prompt.sample
    where = f"Accuracy(answer_from={part.accuracy.answer_from!r})" if part.accuracy else "The layout"
    raised = f", and fails on {len(marks.failures)}" * bool(marks.failures)
    return Result(
        _NAME,
        status,
        f"reward {part.name!r} gives {value:g}, not 1, on {len(marks.short)} of {len(marks.values)} gold "
        f"answers{raised}, first row {sample.id!r} with answer {_cut(sample.answer)!r}, "
        f"written {_cut(rollout.text)!r}",
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
