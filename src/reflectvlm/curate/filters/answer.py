"""Is the answer right, by the strict rule of training?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reflectvlm.curate.filters.layout import layout_of, parts
from reflectvlm.curate.types import Trace
from reflectvlm.rewards import answers
from reflectvlm.rewards.isolation import RewardError
from reflectvlm.rewards.maths import Equal, settle


@dataclass(frozen=True, kw_only=True)
class AnswerRight:
    """The answer, read where the layout has it, is the gold answer. Maths is settled in processes that can
    be killed; what had to be killed is not kept."""

    timeout: float = 10.0
    """Seconds that one answer may take."""
    name: ClassVar[str] = "answer"

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ValueError(
                f"AnswerRight.timeout is {self.timeout}. It must be a positive number of seconds."
            )

    def __call__(self, trace: Trace, /) -> str | None:
        return self.many([trace])[0]

    def many(self, traces: Sequence[Trace], /) -> list[str | None]:
        """The same for many, whose questions for a process are asked at once."""
        said = [_answer(trace) for trace in traces]
        found = [_decided(trace, answer) for trace, answer in zip(traces, said, strict=True)]
        asked = [one for one in found if isinstance(one, Equal)]
        settled = iter(settle(asked, self.timeout) if asked else ())
        decisions = [next(settled) if isinstance(one, Equal) else one for one in found]
        return [_why(*one) for one in zip(traces, said, decisions, strict=True)]


def _answer(trace: Trace) -> str | None:
    layout = layout_of(trace.method, trace.look)
    answer = parts(
        trace
    ).answer  # where the layout is broken, which another filter says, it is read as in training
    if answer is not None:
        return answer
    tag = layout.answer_tag
    return answers.extract_boxed(trace.text) if tag is None else answers.extract_tag(trace.text, tag)


def _decided(trace: Trace, answer: str | None) -> bool | Equal:
    gold = trace.question.answer
    return bool(answer and gold.strip()) and answers.graded(gold, str(answer))


def _why(trace: Trace, answer: str | None, right: bool | RewardError) -> str | None:
    if right is True:
        return None
    if isinstance(right, RewardError):
        return f"could not be graded ({right})"
    if not trace.question.answer.strip():
        return "the question has no gold answer"
    return "no answer" if not answer else f"it is {_short(answer)}, not {_short(trace.question.answer)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
