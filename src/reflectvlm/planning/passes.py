"""The largest pass of an update: which rows go through the model together, as `train/budget.py` decides."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from reflectvlm.planning.job import Job, Load

DENSE_ELEMENTS = 40_000
"""Up to so large a mask attention on a CPU is dense (`models/tree_choice.py`)."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """`units` packed rows, each a prompt and `answers` answers to it."""

    units: int
    answers: int
    prompt: int
    behind: int
    trained: int
    """Tokens whose log-prob is taken, of all rows."""
    kind: str
    """plain (nothing is shared), dense, split, varlen or flex."""

    @property
    def width(self) -> int:
        return self.prompt + self.answers * self.behind

    @property
    def tokens(self) -> int:
        return self.units * self.width

    @property
    def gathered(self) -> int:
        """Keys that are copied together for `split` and `varlen`."""
        rows = self.units * self.answers
        return self.units * self.prompt + rows * (self.prompt + self.behind)

    @property
    def mask(self) -> int:
        """Elements of the masks that attention gets: dense ones of all rows, or one of an answer."""
        if self.kind in ("dense", "eager"):
            return self.units * self.width**2
        return self.behind * (self.prompt + self.behind) if self.kind == "split" else 0


def largest_pass(job: Job) -> Pass:
    """The first one. Of groups that are cut, the smaller last parts may fill a pass up to `micro_tokens`
    better; that is left out."""
    load = job.load
    answers = _answers(load)
    width = load.prompt + answers * load.behind
    rows = _rows_of_update(load)
    units = max(1, min(load.micro_tokens // width, -(-rows // answers)))
    return Pass(
        units=units,
        answers=answers,
        prompt=load.prompt,
        behind=load.behind,
        trained=units * answers * load.answer,
        kind=_kind(job, units, answers, width),
    )


def number_of_passes(job: Job) -> int:
    """Of one optimiser step."""
    one = largest_pass(job)
    return -(-_rows_of_update(job.load) // (one.units * one.answers))


def second_pass(job: Job) -> Pass | None:
    """The one that comes behind the first, when gradients exist already: as large, or what is left."""
    one = largest_pass(job)
    left = _rows_of_update(job.load) - one.units * one.answers
    if left <= 0:
        return None
    units = min(one.units, -(-left // one.answers))
    return dataclasses.replace(one, units=units, trained=units * one.trained // one.units)


def _rows_of_update(load: Load) -> int:
    return max(1, load.prompts // load.updates) * load.group


def _answers(load: Load) -> int:
    """Answers of one prompt that fit a pass."""
    return max(1, min(load.group, (load.micro_tokens - load.prompt) // load.behind))


def _kind(job: Job, units: int, answers: int, width: int) -> str:
    """What `auto` comes to; on a GPU it is timed there, and this is the likeliest."""
    training = job.training
    if answers == 1:
        return "eager" if training.attention == "eager" else "plain"
    if training.attention != "auto":
        return training.attention
    if training.gpu:
        return "varlen" if training.c == 2 else "split"
    return "dense" if units * width**2 <= DENSE_ELEMENTS else "split"
