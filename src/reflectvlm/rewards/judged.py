"""`Judged`: a judge's score as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from reflectvlm.protocols import Judge
from reflectvlm.rewards import answers
from reflectvlm.rewards.isolation import RewardError
from reflectvlm.rewards.lanes import Ahead, side_by_side
from reflectvlm.rewards.verdict import Verdict, case_of
from reflectvlm.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Example: `Judged(judge=HttpJudge(url="http://localhost:8000/v1", model="judge"), answer_from="boxed")`.

    A text without an answer scores 0.0 and is not asked about. A verdict without a score is a failure of
    its rollout: a rubric leaves it out of its group, since a sum without the judge would count as 0.
    """

    judge: Judge
    answer_from: str = "text"
    r"""What is judged: "text", the whole of it; "boxed", the last `\boxed{}`; or a tag's name."""
    images: bool = False
    """True: the judge sees the sample's images too."""
    at_once: int = 8
    """Rollouts that are asked about at the same time; a judge may allow itself less."""
    rowwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(self.judge):
            raise ValueError(  # noqa: TRY004 - what a user wrote
                f"Judged.judge is {self.judge!r}. Give a judge: HttpJudge(...), RuleJudge() or a function."
            )
        if not self.answer_from or not self.answer_from.replace("-", "_").isidentifier():
            raise ValueError(
                f"Judged.answer_from is {self.answer_from!r}. "
                "Write 'text', 'boxed' or a tag name without brackets."
            )
        if self.at_once < 1:
            raise ValueError(f"Judged.at_once is {self.at_once}. It must be at least 1.")

    def __call__(self, group: Sequence[Rollout], /) -> list[float]:
        (values,) = self.many([group])
        if isinstance(values, Exception):
            raise values
        return values

    def many(self, groups: Sequence[Sequence[Rollout]], /) -> list[list[float] | Exception]:
        """The same for many groups; each different answer is asked about once."""
        rows = [rollout for group in groups for rollout in group]
        cases = [self._case(rollout) for rollout in rows]
        first = {case: rollout for case, rollout in reversed(list(zip(cases, rows, strict=True))) if case}
        asked = [partial(self._score, rollout) for rollout in first.values()]
        known = dict(zip(first, side_by_side(asked, self.at_once, apart=True), strict=True))
        scores = iter([0.0 if case is None else known[case] for case in cases])
        return [_values([next(scores) for _ in group]) for group in groups]

    @property
    def lanes(self) -> int:
        return self.at_once

    def early(self, group: Sequence[Rollout], place: int, /) -> Ahead | None:
        """The same for a single rollout, while others are still decoded; see `early.py`."""
        del place
        (rollout,) = group
        case = self._case(rollout)
        return None if case is None else Ahead(lambda: _values([self._score(rollout)]), key=case)

    def _answer(self, rollout: Rollout) -> str:
        if self.answer_from == "text":
            return rollout.text.strip()
        if self.answer_from == "boxed":
            return answers.extract_boxed(rollout.text) or ""
        return answers.extract_tag(rollout.text, self.answer_from) or ""

    def _case(self, rollout: Rollout) -> str | None:
        answer, sample = self._answer(rollout), rollout.prompt.sample
        seen = sample.images if self.images else ()
        return case_of(sample.question, sample.answer, answer, seen) if answer else None

    def _score(self, rollout: Rollout) -> float | Exception:
        sample = rollout.prompt.sample
        seen = sample.images if self.images else ()
        try:
            verdict = self.judge(sample.question, sample.answer, self._answer(rollout), seen)
            if not isinstance(verdict, Verdict):
                raise TypeError(f"the judge gave a {type(verdict).__name__}, not a Verdict")
        except Exception as error:  # noqa: BLE001 - a user's judge may raise anything: it costs its row
            return error
        return (
            RewardError("unscored", f"unscored: {verdict.why}")
            if verdict.score is None
            else float(verdict.score)
        )


def _values(row: Sequence[float | Exception]) -> list[float] | Exception:
    failed = next((score for score in row if isinstance(score, Exception)), None)
    return failed or [score for score in row if isinstance(score, float)]
