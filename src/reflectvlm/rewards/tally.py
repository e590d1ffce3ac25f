"""Failures of rewards: counted, told once per reason, and a limit to how many a run may have.

A reason is told in full once; after that each step has at most one line per reward, with the number of
rows and the first of their names. Two budgets end the run: an absolute number, and a share of a reward's
latest values, for one that fails on every second row and would train on the other half for days.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reflectvlm.rewards.isolation import RewardError
from reflectvlm.types import Rollout

WINDOW = 1024
"""Latest values of a reward that the share is taken over."""
LEAST = 256
"""Fewer values say nothing about a share."""
_MAX_REASONS = 20
_MAX_REASON_CHARACTERS = 300
_MAX_IDS = 8
_VARYING = re.compile(r"0x[0-9a-f]+|'[^']*'|\"[^\"]*\"|\d+")


@dataclass(frozen=True)
class Failure:
    """Rollouts on which a reward failed for one reason, and the first exception of it."""

    rollouts: tuple[Rollout, ...]
    error: BaseException

    @property
    def reason(self) -> str:
        return reason(self.error)

    @property
    def where(self) -> str:
        ids = list(dict.fromkeys(rollout.prompt.sample.id for rollout in self.rollouts))
        more = f" and {len(ids) - _MAX_IDS} more" if len(ids) > _MAX_IDS else ""
        return ", ".join(map(repr, ids[:_MAX_IDS])) + more


def failures(rows: Sequence[tuple[Rollout, BaseException]]) -> list[Failure]:
    """Rows that failed, put together by reason, in the order in which the reasons came up."""
    found: dict[str, list[tuple[Rollout, BaseException]]] = {}
    for rollout, error in rows:
        found.setdefault(kind_of_reason(error), []).append((rollout, error))
    return [Failure(tuple(rollout for rollout, _ in same), same[0][1]) for same in found.values()]


@dataclass
class Tally:
    """What a rubric remembers of its rewards. `state` of it goes into a checkpoint."""

    failed: int = 0
    """Values without a number so far, of all rewards."""
    recent: dict[str, deque[tuple[int, int]]] = field(default_factory=dict)
    """Per reward, of each of its latest steps: failed values, values asked for."""
    told: set[tuple[str, str]] = field(default_factory=set)
    lost: int = 0
    """Rollouts that a failure left unscored, counted by this process; in no checkpoint."""

    def count(self, name: str, failed: int, asked: int) -> None:
        self.failed += failed
        window = self.recent.setdefault(name, deque())
        window.append((failed, asked))
        while sum(step for _, step in window) - window[0][1] >= WINDOW:
            window.popleft()

    def share(self, name: str) -> tuple[float, int]:
        """Share of a reward's latest values that failed, and of how many; 0 while they are too few."""
        window = self.recent.get(name, ())
        asked = sum(step for _, step in window)
        return (sum(bad for bad, _ in window) / asked if asked >= LEAST else 0.0), asked

    def lines(self, name: str, found: Sequence[Failure], effect: str) -> list[str]:
        """What is to be told of a step's failures of one reward: new reasons, then the rest in one line."""
        again: list[Failure] = []
        lines: list[str] = []
        for failure in found:
            key = (name, kind_of_reason(failure.error))
            if key in self.told or sum(other == name for other, _ in self.told) >= _MAX_REASONS:
                again.append(failure)
                continue
            self.told.add(key)
            lines.append(f"{described(name, failure)}; {effect}).")
        if again:
            reasons = Counter({failure.reason: len(failure.rollouts) for failure in again})
            listed = ", ".join(f"{text} ({times})" for text, times in reasons.most_common(3))
            rows = Failure(tuple(r for failure in again for r in failure.rollouts), again[0].error)
            lines.append(
                f"Reward {name!r} failed again on sample {rows.where}: {listed} "
                f"({rollouts(len(rows.rollouts))}; {self.failed:,} failures so far; {effect})."
            )
        return lines

    def state(self) -> dict[str, Any]:
        """JSON-like. What has been told is left out: a resumed run tells it once more."""
        recent = {name: [list(step) for step in steps] for name, steps in self.recent.items()}
        return {"failed": self.failed, "recent": recent}

    def load(self, state: Mapping[str, Any]) -> None:
        try:
            failed = int(state["failed"])
            recent = {
                str(name): deque((int(bad), int(asked)) for bad, asked in steps)
                for name, steps in state["recent"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"The rubric's state cannot be read: {error!r}. It is {{'failed': number, 'recent': "
                "{reward: [[failed, asked], ...]}}, as rubric.state() gives it. "
                "Resume from another checkpoint."
            ) from error
        self.failed, self.recent = failed, recent


def described(name: str, failure: Failure) -> str:
    return (
        f"Reward {name!r} failed on sample {failure.where}: {failure.reason} "
        f"({rollouts(len(failure.rollouts))}"
    )


def rollouts(count: int) -> str:
    return f"{count} rollout{'s' if count != 1 else ''}"


def reason(error: BaseException) -> str:
    """`RewardError` says its reason itself; of other errors the type matters. One line, not too long."""
    text = " ".join(_text(error).split())
    if not isinstance(error, RewardError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if len(text) > _MAX_REASON_CHARACTERS:
        text = f"{text[: _MAX_REASON_CHARACTERS - 3]}..."
    return text.encode(errors="backslashreplace").decode()


def kind_of_reason(error: BaseException) -> str:
    """The reason without numbers and quoted texts, which are another row's in every line."""
    return _VARYING.sub("#", reason(error))


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # noqa: BLE001 - an exception of a user's class may fail when it is printed
        return f"its text cannot be made ({type(broken).__name__})"
