"""Judges that ask nobody: the rule that grades rewards, and verdicts from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.rewards.isolation import RewardError
from reflectvlm.rewards.verdict import Verdict, case_of

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class RuleJudge:
    """`Accuracy` as a judge. Example: `RuleJudge()("2 + 3?", "5", r"So \\boxed{5}").score` is 1.0."""

    accuracy: Accuracy = field(default_factory=Accuracy)

    def __call__(self, question: str, gold: str, answer: str, images: Sequence[Image] = (), /) -> Verdict:
        del question, images  # the gold answer alone decides
        try:
            right = self.accuracy.is_right(answer, gold)
        except RewardError as error:
            return Verdict(score=None, why=error.reason)
        return Verdict(score=float(right), why=f"{'equals' if right else 'is not'} the gold answer")


@dataclass(frozen=True, kw_only=True)
class RecordedJudge:
    """Verdicts from a JSON Lines file, for tests and to repeat an evaluation without its judge.

    A line is `{"question": ..., "gold": ..., "answer": ..., "score": 1.0, "why": "..."}`, whatever the
    images, or a line of an `HttpJudge`'s cache, which has a "case" instead of the three texts. Of equal
    lines the first counts. What is not in the file is unscored.
    """

    path: str
    _verdicts: Mapping[object, Verdict] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_verdicts", _read(Path(self.path)))

    def __call__(self, question: str, gold: str, answer: str, images: Sequence[Image] = (), /) -> Verdict:
        case = self._verdicts.get(case_of(question, gold, answer, images))
        found = case or self._verdicts.get((question, gold, answer))
        return found or Verdict(score=None, why=f"{self.path} has no verdict on this answer")


def _read(path: Path) -> dict[object, Verdict]:
    if not path.is_file():
        raise ValueError(f"RecordedJudge.path is {str(path)!r}, and there is no such file. Check the path.")
    verdicts: dict[object, Verdict] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key = row["case"] if "case" in row else (row["question"], row["gold"], row["answer"])
            verdict = _verdict(row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number} is no recorded verdict: {error!r}. A line is a JSON object with question, "
                "gold, answer (or case), and score (a number from 0 to 1, or null)."
            ) from error
        verdicts.setdefault(key, verdict)
    return verdicts


def _verdict(row: Mapping[str, Any]) -> Verdict:
    score = row["score"]
    return Verdict(score=None if score is None else float(score), why=str(row.get("why", "")))
