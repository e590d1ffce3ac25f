"""Accuracy: is the answer in the text the sample's gold answer? 1.0 or 0.0.

`rule="strict"` grades the extracted answer by its kind. `rule="lookback"` is the lenient published
evaluation of Look-Back (arXiv 2507.03019), to reproduce its scores. No model judges anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar, Literal

from reflectvlm.rewards import answers
from reflectvlm.rewards.isolation import RewardError
from reflectvlm.rewards.lanes import Ahead
from reflectvlm.rewards.maths import Equal, math_pool, settle
from reflectvlm.rewards.pool import default_size
from reflectvlm.types import Rollout

_CHOICES = {"kind": ("auto", "number", "choice", "text", "math"), "rule": ("strict", "lookback")}


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    r"""Example: `Accuracy()` reads the last `\boxed{}`, `Accuracy(answer_from="CONCLUSION")` a tag.

    A text without an answer scores 0.0. A grader that had to be killed raises `RewardError`.
    """

    kind: Literal["auto", "number", "choice", "text", "math"] = "auto"
    """auto decides by the gold answer, see `answers.kind_of`."""
    rule: Literal["strict", "lookback"] = "strict"
    answer_from: str = "boxed"
    timeout: float = 10.0
    """Seconds that math grading of one answer may take before its process is killed."""
    rowwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                near = get_close_matches(str(value), allowed, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"Accuracy.{name} is {value!r}, not one of {list(allowed)}. Did you mean {near!r}?"
                )
        if not self.timeout > 0:
            raise ValueError(f"Accuracy.timeout is {self.timeout}. It must be a positive number of seconds.")
        if not self.answer_from or not self.answer_from.replace("-", "_").isidentifier():
            raise ValueError(
                f"Accuracy.answer_from is {self.answer_from!r}. Write 'boxed' or a tag name without brackets."
            )
        if self.rule == "lookback":
            if self.answer_from != "boxed" or self.kind != "auto":
                raise ValueError(
                    f"Accuracy(rule='lookback') has kind={self.kind!r} and answer_from={self.answer_from!r}. "
                    "The published rule reads the box and knows no kinds: leave both out."
                )
            answers.require_mathruler()

    def __call__(self, group: Sequence[Rollout], /) -> list[float]:
        return [float(self.is_right(r.text, r.prompt.sample.answer, r.prompt.sample.id)) for r in group]

    def many(self, groups: Sequence[Sequence[Rollout]], /) -> list[list[float] | Exception]:
        """The same for many groups; what needs sympy is asked of several processes at once."""
        rows = [rollout for group in groups for rollout in group]
        found: list[bool | Equal | Exception] = []
        for rollout in rows:
            sample = rollout.prompt.sample
            try:
                found.append(self._decide(rollout.text, sample.answer, sample.id))
            except ValueError as error:
                found.append(error)  # an empty gold answer is its row's fault alone
        asked = [one for one in found if isinstance(one, Equal)]
        settled = iter(settle(asked, self.timeout) if asked else ())
        values = [
            self._verdict(next(settled) if isinstance(one, Equal) else one, rollout)
            for one, rollout in zip(found, rows, strict=True)
        ]
        grouped = iter(values)
        return [_values([next(grouped) for _ in group]) for group in groups]

    @property
    def lanes(self) -> int:
        return default_size()

    def early(self, group: Sequence[Rollout], place: int, /) -> Ahead | None:
        """The same for a single rollout, while others are still decoded, if it needs sympy."""
        (rollout,) = group
        sample = rollout.prompt.sample
        found = self._decide(rollout.text, sample.answer, sample.id)
        if not isinstance(found, Equal):
            return None
        return Ahead(lambda: self._settled(found, rollout, place), stop=math_pool().abort)

    def _settled(self, question: Equal, rollout: Rollout, place: int) -> list[float] | Exception:
        (found,) = settle([question], self.timeout, first=place)
        return _values([self._verdict(found, rollout)])

    def is_right(self, text: str, gold: str, sample_id: str = "?") -> bool:
        """The same decision for a plain text: evaluation uses it too, so the two cannot disagree."""
        found = self._decide(text, gold, sample_id)
        if isinstance(found, Equal):
            (settled,) = settle([found], self.timeout)
            if isinstance(settled, RewardError):
                raise settled
            found = settled
        return self._second_chance(found, gold, text)

    def _verdict(self, found: bool | Exception, rollout: Rollout) -> float | Exception:
        if isinstance(found, Exception):
            return found
        return float(self._second_chance(found, rollout.prompt.sample.answer, rollout.text))

    def _second_chance(self, found: bool, gold: str, text: str) -> bool:
        return found or (self.rule == "lookback" and answers.lookback_letter(gold, text))

    def _decide(self, text: str, gold: str, sample_id: str) -> bool | Equal:
        """Right, wrong, or a question for a worker."""
        if not gold.strip():
            raise ValueError(
                f"Sample {sample_id!r} has an empty gold answer, so nothing can be right. "
                "Give it an answer or drop the row."
            )
        if self.rule == "lookback":
            return answers.lookback_question(gold, text)
        boxed = self.answer_from == "boxed"
        answer = answers.extract_boxed(text) if boxed else answers.extract_tag(text, self.answer_from)
        kind = None if self.kind == "auto" else self.kind
        return bool(answer) and answers.graded(gold, str(answer), kind)


def _values(row: list[float | Exception]) -> list[float] | Exception:
    """A group's values, or what kept one of them from being known."""
    failed = next((value for value in row if isinstance(value, Exception)), None)
    return failed or [value for value in row if not isinstance(value, Exception)]
