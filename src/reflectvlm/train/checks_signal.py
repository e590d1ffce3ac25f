"""Said on the screen, once: that a run has begun without anything to learn from. Pure counters, fed by the
loops; nothing here stops a run, because a policy may find its first good answer late."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class NoSignal:
    """Steps in a row, from the first on, in which no group of rollouts had rewards that differ.

    Example: `NoSignal().after(10, useful_share=0.0)` is a sentence after ten such steps, else None.
    """

    patience: int = 10
    _steps: int = field(default=0, init=False)
    _seen: bool = field(default=False, init=False)
    """Some step had a signal: a dry spell after it is the end of learning, not a mistake in the set-up."""

    def after(self, step: int, useful_share: float) -> str | None:
        """What to say after this step, counted from 1, in which this share of the groups was useful."""
        self._seen = self._seen or useful_share > 0
        self._steps += 1
        if self._seen or self._steps != self.patience:
            return None
        return (
            f"No group has taught anything up to step {step}: in each all rewards are equal, so every "
            "advantage is 0. See samples.jsonl for what is answered. If all are wrong, take easier rows or "
            "train on gold answers first (SFT); if all are right, take harder rows; if all are the same, "
            "raise sampling.temperature or group_size."
        )


@dataclass
class NothingKept:
    """Batches in a row, from the first on, of a distillation in which no answer of the model was good."""

    patience: int = 3
    _batches: int = field(default=0, init=False)
    _kept: bool = field(default=False, init=False)

    def after(self, batch: int, asked: int, kept: int, repaired: int) -> str | None:
        """What to say after this batch, counted from 1. Batches without a question do not count."""
        self._kept = self._kept or kept > 0
        self._batches += asked > 0
        if self._kept or not asked or self._batches != self.patience:
            return None
        instead = "all rows are gold answers" if repaired else "there are no rows"
        return (
            f"None of the model's answers was good up to batch {batch}, so {instead}. See samples.jsonl for "
            "what it answers; check that instruction, rubric and accept are those that it was trained with, "
            "or train it longer."
        )
