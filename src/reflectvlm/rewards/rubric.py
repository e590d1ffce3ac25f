"""The rubric: named rewards, their weights, and what happens when one of them fails.

    R_i = sum over names of weight[name] * reward[name](group)_i

A reward may give None for a rollout: it does not apply there (TRL's convention). That is no failure;
the sum is over the rewards that apply, and only a rollout to which none applies is unscored.
NaN is a failure.

Whatever rewards raise or return, the batch stays finite, every failure is told and none too often.
Weight 0.0 means measured and logged only. A reward that is called here, in this process, can still hang
or crash the run: `Custom` runs one that is not trusted in a process that can be killed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

from reflectvlm.advantages import LARGEST
from reflectvlm.protocols import Reward
from reflectvlm.rewards.asking import Group, Unit, Value, ask_all
from reflectvlm.rewards.tally import Failure, Tally, described, failures
from reflectvlm.types import Rollout, ScoredGroup

_log = logging.getLogger("reflectvlm")
OnError: TypeAlias = Literal["drop", "zero", "raise"]
_POLICIES = ("drop", "zero", "raise")
MAX_FAILED_SHARE = 0.25


class RewardFailure(Exception):
    """A reward failed and the rubric was told not to go on."""


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """Example: `Rubric(rewards={"accuracy": Accuracy(), "format": TagFormat(layout=look_back())},
    weights={"accuracy": 0.9, "format": 0.1})(group).rewards`
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    on_error: OnError = "drop"
    """What a failure (an exception, NaN, infinity, a text, a wrong number of values) does to its
    rollouts. drop: they are unscored. zero: the reward counts as 0. raise: `RewardFailure`."""
    max_failures: int | None = None
    """More failed values than this since the run began raise `RewardFailure`; None is no limit."""
    max_failed_share: float | None = MAX_FAILED_SHARE
    """So does a reward that failed on a greater share than this of its latest 1,024 values, once it was
    asked for 256; values it does not apply to and rewards of weight 0 do not count. None is no limit."""
    _tally: Tally = field(default_factory=Tally, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rewards, weights = set(self.rewards), set(self.weights)
        for owner, lacking in (("weights", rewards - weights), ("rewards", weights - rewards)):
            if lacking:
                raise ValueError(
                    f"rubric.{owner} lacks {', '.join(map(repr, sorted(lacking)))}. "
                    "Rewards and weights must name the same terms: "
                    f"rewards {_names(rewards)}, weights {_names(weights)}."
                )
        if not rewards:
            raise ValueError("Rubric has no rewards. Name at least one reward and its weight.")
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"rubric.weights[{name!r}] is {weight}. A weight must be a finite number.")
            if not callable(self.rewards[name]):
                raise ValueError(  # noqa: TRY004 - what a user wrote
                    f"rubric.rewards[{name!r}] is {self.rewards[name]!r}. "
                    "A reward must be callable: a function of a group, or an object such as Accuracy()."
                )
        self._check_policy()

    def _check_policy(self) -> None:
        if self.on_error not in _POLICIES:
            near = get_close_matches(str(self.on_error), _POLICIES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"rubric.on_error is {self.on_error!r}, not one of {list(_POLICIES)}. Meant {near!r}?"
            )
        if self.max_failures is not None and self.max_failures < 0:
            raise ValueError(f"rubric.max_failures is {self.max_failures}. It must be 0 or more, or None.")
        if self.max_failed_share is not None and not 0 <= self.max_failed_share <= 1:
            raise ValueError(
                f"rubric.max_failed_share is {self.max_failed_share}. It must be in [0, 1], or None."
            )

    def __call__(self, group: Sequence[Rollout], /) -> ScoredGroup:
        return self.score([group])[0]

    def score(
        self,
        groups: Sequence[Sequence[Rollout]],
        /,
        *,
        known: Callable[[str], Mapping[Unit, Any]] | None = None,
    ) -> list[ScoredGroup]:
        """Scores all groups of a step at once: rewards that wait for a process or a server do so together.

        The values are those of one group after another, in the same order. `known`: what was asked before,
        see `early.py`.
        """
        rows = [tuple(group) for group in groups]
        asked = ask_all(self.rewards, rows, known)
        for name, values in asked.items():
            self._note(name, rows, values)
        sums = [self._sums(group, {n: asked[n][at] for n in asked}) for at, group in enumerate(rows)]
        overflows = [
            (rollout, value)
            for group, totals in zip(rows, sums, strict=True)
            for rollout, value in zip(group, totals, strict=True)
            if isinstance(value, OverflowError)
        ]
        self._report("the weighted sum", failures(overflows))
        scored = [
            self._scored(group, {n: asked[n][at] for n in asked}, sums[at]) for at, group in enumerate(rows)
        ]
        self._tally.lost += _lost(scored, asked, [name for name in asked if self.weights[name] != 0], sums)
        _let_go(asked)
        return scored

    @property
    def lost(self) -> int:
        """Rollouts so far, in this process, that are unscored because something failed; those to which no
        reward applied do not count."""
        return self._tally.lost

    def state(self) -> dict[str, Any]:
        """Failures so far, for a checkpoint: JSON-like, and small."""
        return self._tally.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on counting where `state` was taken, so that a resumed run has no new budget."""
        self._tally.load(state)

    def _sums(self, group: Group, parts: Mapping[str, Sequence[Value]]) -> list[Value]:
        """The weighted sum per rollout; None where it is unscored, an OverflowError where it has none."""
        weighted = [name for name, weight in self.weights.items() if weight != 0]
        sums: list[Value] = []
        for row in range(len(group)):
            used = {name: value for name in weighted if (value := parts[name][row]) is not None}
            failed = any(isinstance(value, BaseException) for value in used.values())
            if (weighted and not used) or (self.on_error == "drop" and failed):
                sums.append(None)
                continue
            numbers = {name: value for name, value in used.items() if isinstance(value, float)}
            total = float(sum(self.weights[name] * part for name, part in numbers.items()))
            sums.append(total if abs(total) <= LARGEST else OverflowError(f"parts {numbers} overflow"))
        return sums

    def _scored(
        self, group: Group, parts: Mapping[str, Sequence[Value]], sums: Sequence[Value]
    ) -> ScoredGroup:
        return ScoredGroup(
            rollouts=group,
            rewards=tuple(value if isinstance(value, float) else 0.0 for value in sums),
            parts={
                name: tuple(value if isinstance(value, float) else math.nan for value in values)
                for name, values in parts.items()
            },
            scored=tuple(
                self.on_error == "zero" if isinstance(value, OverflowError) else value is not None
                for value in sums
            ),
        )

    def _note(self, name: str, groups: Sequence[Group], values: Sequence[Sequence[Value]]) -> None:
        """Counts and tells one reward's failures, or raises if that is the policy or a budget is used up."""
        pairs = [
            (rollout, value)
            for group, row in zip(groups, values, strict=True)
            for rollout, value in zip(group, row, strict=True)
        ]
        failed = failures([(rollout, value) for rollout, value in pairs if isinstance(value, BaseException)])
        asked = sum(value is not None for _, value in pairs)
        self._report(name, failed, asked)
        share, latest = self._tally.share(name)
        if self.max_failed_share is None or share <= self.max_failed_share or self.weights[name] == 0:
            return
        last = f"{described(name, failed[-1])}). " if failed else ""
        raise RewardFailure(
            f"Reward {name!r} failed on {share:.0%} of its latest {latest:,} values, "
            f"max_failed_share={self.max_failed_share:g}. {last}What trains is the rest, which is no fair "
            "sample. Repair the reward, or raise rubric.max_failed_share; resume=auto goes on from the last "
            "checkpoint."
        )

    def _report(self, name: str, failed: Sequence[Failure], asked: int = 0) -> None:
        count = sum(len(failure.rollouts) for failure in failed)
        if failed and self.on_error == "raise":
            raise RewardFailure(f"{described(name, failed[0])}; on_error='raise').") from failed[0].error
        if asked or count:
            self._tally.count(name, count, asked or count)
        if count and self.max_failures is not None and self._tally.failed > self.max_failures:
            raise RewardFailure(
                f"{described(name, failed[-1])}; {self._tally.failed} failures so far, "
                f"max_failures={self.max_failures}). Repair the reward, or raise rubric.max_failures."
            ) from failed[-1].error
        effect = "only measured" if self.weights.get(name) == 0 else f"on_error={self.on_error!r}"
        for line in self._tally.lines(name, failed, effect):
            _log.warning("%s", line)


def with_extras(
    owner: str,
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    extra: Mapping[str, Reward] | None,
    extra_weights: Mapping[str, float] | None,
    **settings: Any,
) -> Rubric:
    """A paper's rubric with further rewards beside its own. `settings` are those of `Rubric`."""
    if taken := sorted(set(rewards) & {*(extra or ()), *(extra_weights or ())}):
        raise ValueError(
            f"{owner} has an extra reward called {taken[0]!r}, which is a part of its own. "
            f"Choose another name; the parameters of {owner} change the parts it has."
        )
    return Rubric(
        rewards={**rewards, **(extra or {})}, weights={**weights, **(extra_weights or {})}, **settings
    )


def _lost(
    scored: Sequence[ScoredGroup],
    asked: Mapping[str, Sequence[Sequence[Value]]],
    weighted: Sequence[str],
    sums: Sequence[Sequence[Value]],
) -> int:
    """How many rollouts are unscored although a reward that counts applied to them: it failed."""
    return sum(
        not keep and (sums[at][row] is not None or any(asked[name][at][row] is not None for name in weighted))
        for at, group in enumerate(scored)
        for row, keep in enumerate(group.scored)
    )


def _let_go(asked: Mapping[str, Sequence[Sequence[Value]]]) -> None:
    """A traceback holds the frames that hold the error: such a ring would keep rewards, and their
    processes, until the garbage collector comes by. What it had to tell has been told."""
    for groups in asked.values():
        for values in groups:
            for value in values:
                if isinstance(value, BaseException):
                    value.__traceback__ = None


def _names(names: Iterable[str]) -> str:
    return f"{{{', '.join(sorted(names))}}}"
