r"""Three ways to say whether a reply is right, so that a figure names the one it comes from.

    official   the benchmark's own rule (`Task.marks`), which may need a language model as a helper
    lookback   the rule of Look-Back's published evaluation on a whole reply, its oddities included, whatever
               the benchmark: see `rewards/answers.grade_lookback`; a plain mean over rows
    strict     ours, and what training calls accuracy: the box or the final tag must be the gold answer, by
               its kind (`rewards/answers.graded`); nothing is guessed from the rest of the text

What cannot be decided, as without a gold answer or where a grader had to be killed, is not scored, never 0.
Only sympy's questions leave the process, for workers with a hard time-out (`rewards/maths.settle`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from reflectvlm.eval.types import Ask, Item, Mark, Reply, Summary, Task
from reflectvlm.recipe_check import RecipeError, nearest
from reflectvlm.rewards import answers
from reflectvlm.rewards.isolation import RewardError
from reflectvlm.rewards.maths import Equal, settle
from reflectvlm.tags import find_boxes

NAMES = ("official", "lookback", "strict")
AUTO = "auto"
PLACES = (AUTO, "boxed", "answer", "CONCLUSION")
"""Where the strict scorer may look; another tag is named in brackets, so that no misspelt word is one."""
_SHOWN = 200

log = logging.getLogger("reflectvlm")


class Scorer(Protocol):
    """A rule for replies to one benchmark; `task` is None where nobody knows which it is."""

    @property
    def name(self) -> str: ...
    def __call__(self, task: Task | None, replies: Sequence[Reply], /) -> list[Mark]: ...
    def summary(self, task: Task | None, items: Sequence[Item], marks: Sequence[Mark], /) -> Summary: ...


@dataclass(frozen=True, kw_only=True)
class Official:
    """Example: `Official(ask=judge)(task, replies)`"""

    ask: Ask | None = None
    """Decides what the rule leaves to a language model; None: that is not scored."""
    name: ClassVar[str] = "official"

    def __call__(self, task: Task | None, replies: Sequence[Reply], /) -> list[Mark]:
        if task is None:
            return [Mark(value=None, note="no task is named, so its rule is unknown")] * len(replies)
        return task.marks(replies, self.ask)

    def summary(self, task: Task | None, items: Sequence[Item], marks: Sequence[Mark], /) -> Summary:
        return plain(marks) if task is None else task.summary(items, marks)


@dataclass(frozen=True, kw_only=True)
class Lookback:
    """Needs the extra `lookback-scorer`. Example: `Lookback()(None, replies)`"""

    timeout: float = 10.0
    """Seconds for one answer, after which its grader is killed."""
    name: ClassVar[str] = "lookback"

    def __post_init__(self) -> None:
        _check_timeout(self.timeout)
        answers.require_mathruler()

    def __call__(self, task: Task | None, replies: Sequence[Reply], /) -> list[Mark]:
        del task  # one rule for all
        return settled([self._decide(reply) for reply in replies], self.timeout)

    def summary(self, task: Task | None, items: Sequence[Item], marks: Sequence[Mark], /) -> Summary:
        del task, items
        return plain(marks)

    def _decide(self, reply: Reply) -> Mark | Question:
        item = reply.item
        gold = item.answer if item.lookback_answer is None else item.lookback_answer
        if not gold.strip():
            return Mark(value=None, note="no gold answer")
        boxed = answers.lookback_answer(reply.text)
        if answers.lookback_letter(gold, reply.text):  # cheap, and either makes it right
            return _mark(True, boxed)
        found = answers.lookback_question(gold, reply.text)
        return _mark(found, boxed) if isinstance(found, bool) else Question(found, boxed)


@dataclass(frozen=True, kw_only=True)
class Strict:
    r"""Example: `Strict()(None, [Reply(item=Item(id="1", question="2 + 1?", answer="3"),
    text=r"\boxed{3}")])`"""

    answer_from: str = AUTO
    """One of `PLACES`, or another tag as `<NAME>`. auto: see `final_place`."""
    timeout: float = 10.0
    name: ClassVar[str] = "strict"

    def __post_init__(self) -> None:
        _check_timeout(self.timeout)
        _check_place(self.answer_from)

    def __call__(self, task: Task | None, replies: Sequence[Reply], /) -> list[Mark]:
        del task
        return settled([self._decide(reply) for reply in replies], self.timeout)

    def summary(self, task: Task | None, items: Sequence[Item], marks: Sequence[Mark], /) -> Summary:
        return plain(marks) if task is None else task.summary(items, marks)

    def _decide(self, reply: Reply) -> Mark | Question:
        gold = reply.item.answer
        if not gold.strip():
            return Mark(value=None, note="no gold answer")
        answer = final_answer(reply.text, self.answer_from)
        if not answer:
            return Mark(value=0.0, note="no box and no final tag")
        found = answers.graded(gold, answer)
        return _mark(found, answer) if isinstance(found, bool) else Question(found, answer)


def make_scorers(
    names: Sequence[str] | None = None,
    *,
    answer_from: str = AUTO,
    ask: Ask | None = None,
    timeout: float = 10.0,
) -> list[Scorer]:
    """Scorers by name. None: all three, without `lookback` where MathRuler is not installed, which is
    said."""
    if unknown := [name for name in names or () if name not in NAMES]:
        near = nearest(unknown[0], NAMES)
        hint = f" Did you mean {near}?" if near else ""
        raise RecipeError(f"No scorer is called {unknown[0]!r}, only {', '.join(NAMES)}.{hint}")
    if names is not None and (not names or len(set(names)) < len(names)):
        raise RecipeError(
            f"scorers is {', '.join(names) or 'empty'}. Name each of {', '.join(NAMES)} at most once."
        )
    _check_place(answer_from)  # also where no strict scorer is among them
    found: list[Scorer] = []
    for name in NAMES if names is None else names:
        if name == "official":
            found.append(Official(ask=ask))
        elif name == "strict":
            found.append(Strict(answer_from=answer_from, timeout=timeout))
        else:
            try:
                found.append(Lookback(timeout=timeout))
            except ValueError as error:
                if names is not None:
                    raise
                log.warning("no column of the lookback scorer: %s", error)
    return found


@dataclass(frozen=True, slots=True)
class Question:
    """What only sympy can settle, and the answer that it is about."""

    equal: Equal
    answer: str


def settled(found: Sequence[Mark | Question], timeout: float) -> list[Mark]:
    """Marks in their order; all questions are asked at once."""
    asked = [one for one in found if isinstance(one, Question)]
    decisions = iter(settle([one.equal for one in asked], timeout) if asked else ())
    marks = []
    for one in found:
        if isinstance(one, Mark):
            marks.append(one)
            continue
        decision = next(decisions)
        if isinstance(decision, RewardError):
            marks.append(Mark(value=None, answer=one.answer[:_SHOWN], note=f"not graded: {decision.reason}"))
        else:
            marks.append(_mark(decision, one.answer))
    return marks


def final_answer(text: str, answer_from: str = AUTO) -> str | None:
    """What stands in the box or in the tag; None: nothing does."""
    place = final_place(text) if answer_from == AUTO else answer_from
    return answers.extract_boxed(text) if place == "boxed" else answers.extract_tag(text, place.strip("<>"))


def final_place(text: str) -> str:
    """Where a reply's answer is when nobody says: in `<CONCLUSION>` if that is there and closed (Qwen-LA's
    layout), else in whichever ends last, a box or `<answer>`."""
    if answers.extract_tag(text, "CONCLUSION") is not None:
        return "CONCLUSION"
    end = text.rfind("</answer>")
    if end < 0 or answers.extract_tag(text, "answer") is None:
        return "boxed"
    return "answer" if end > max((box.end for box in find_boxes(text)), default=-1) else "boxed"


def place_asked_for(instruction: str) -> str:
    r"""Where an instruction puts the answer, if it names one place: `\boxed{}` or one of the tags; else auto.
    So a model is graded where it was told to answer, as its training does it."""
    named = [tag for tag in ("CONCLUSION", "answer") if f"<{tag}>" in instruction]
    named += ["boxed"] if "\\boxed" in instruction else []
    return named[0] if len(named) == 1 else AUTO


def plain(marks: Sequence[Mark]) -> Summary:
    """The mean of what is scored."""
    values = [mark.value for mark in marks if mark.value is not None]
    mean = math.fsum(values) / len(values) if values else None
    return Summary(headline="accuracy", values={"accuracy": mean}, unscored=len(marks) - len(values))


def _mark(right: bool, answer: str) -> Mark:
    return Mark(value=float(right), answer=answer[:_SHOWN])


def _check_place(place: str) -> None:
    name = place.removeprefix("<").removesuffix(">")
    bracketed = place == f"<{name}>" and name.replace("-", "_").isidentifier()
    if place not in PLACES and not bracketed:
        same = [one for one in PLACES if one.lower() == name.lower()]
        near = same[0] if same else nearest(name, PLACES)
        hint = f" Did you mean {near}?" if near else ""
        raise ValueError(
            f"answer_from is {place!r}. It must be {', '.join(PLACES)}, or another tag in brackets: "
            f"answer_from='<final>'.{hint}"
        )


def _check_timeout(timeout: float) -> None:
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout}. It must be a positive number of seconds.")
