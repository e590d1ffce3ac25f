"""The rubric: named rewards, their weights, and what happens when one of them fails.

    R_i = sum over names of weight[name] * reward[name](group)_i

A reward may give None for a rollout: it does not apply there (TRL's convention). That is no failure;
the sum is over the rewards that apply, and only a rollout to which none applies is unscored.
NaN is a failure.

This file is the boundary for rewards: whatever they raise or return, the batch stays finite and
every failure is told once. Weight 0.0 means measured and logged only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

from reflectvlm.protocols import Reward
from reflectvlm.rewards.isolation import RewardError
from reflectvlm.types import Rollout, ScoredGroup

_log = logging.getLogger("reflectvlm")
OnError: TypeAlias = Literal["drop", "zero", "raise"]
_POLICIES = ("drop", "zero", "raise")


class RewardFailure(Exception):
    """A reward failed and the rubric was told not to go on."""


@dataclass
class _Tally:
    failures: int = 0


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
    """More failed values than this since the rubric was made raise `RewardFailure`; None is no limit."""
    _tally: _Tally = field(default_factory=_Tally, init=False, repr=False, compare=False)

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
        if self.on_error not in _POLICIES:
            near = get_close_matches(str(self.on_error), _POLICIES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"rubric.on_error is {self.on_error!r}, not one of {list(_POLICIES)}. Meant {near!r}?"
            )
        if self.max_failures is not None and self.max_failures < 0:
            raise ValueError(f"rubric.max_failures is {self.max_failures}. It must be 0 or more, or None.")

    def __call__(self, group: Sequence[Rollout], /) -> ScoredGroup:
        rollouts = tuple(group)
        parts = {name: self._measure(name, rollouts) for name in self.rewards}
        weighted = [name for name, weight in self.weights.items() if weight != 0]
        totals, scored = [0.0] * len(rollouts), [True] * len(rollouts)
        for row in range(len(rollouts)):
            values = {name: parts[name][row] for name in weighted}
            used = {name: value for name, value in values.items() if value is not None}
            none_applies = bool(weighted) and not used
            if none_applies or (self.on_error == "drop" and any(map(math.isnan, used.values()))):
                scored[row] = False
                continue
            totals[row] = sum(
                self.weights[name] * part for name, part in used.items() if not math.isnan(part)
            )
            if not math.isfinite(totals[row]):
                self._report(
                    "the weighted sum", rollouts[row : row + 1], OverflowError(f"parts {used} overflow")
                )
                totals[row], scored[row] = 0.0, self.on_error == "zero"
        return ScoredGroup(
            rollouts=rollouts,
            rewards=tuple(totals),
            parts={
                name: tuple(math.nan if value is None else value for value in values)
                for name, values in parts.items()
            },
            scored=tuple(scored),
        )

    def _measure(self, name: str, rollouts: tuple[Rollout, ...]) -> list[float | None]:
        """One reward's raw values; None where it does not apply, NaN where it failed and was reported."""
        reward = self.rewards[name]
        if getattr(reward, "rowwise", False):
            return [self._ask(name, reward, (rollout,))[0] for rollout in rollouts]
        return self._ask(name, reward, rollouts)

    def _ask(self, name: str, reward: Reward, rollouts: tuple[Rollout, ...]) -> list[float | None]:
        # Boundary: rewards are user code. sys.exit() in one must not end a training run either.
        try:
            values = _listed(reward(rollouts))
            if len(values) != len(rollouts):
                raise ValueError(f"it gave {len(values)} values for {len(rollouts)} rollouts")
        except (Exception, SystemExit) as error:  # noqa: BLE001
            self._report(name, rollouts, error)
            return [math.nan] * len(rollouts)
        return [self._number(name, value, rollout) for value, rollout in zip(values, rollouts, strict=True)]

    def _number(self, name: str, value: Any, rollout: Rollout) -> float | None:
        if value is None:
            return None
        try:
            return _finite(value)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's value may do anything in float()
            self._report(name, (rollout,), error)
            return math.nan

    def _report(self, name: str, rollouts: tuple[Rollout, ...], error: BaseException) -> None:
        """Says once what failed, or raises if that is the policy or the budget is used up."""
        ids = dict.fromkeys(rollout.prompt.sample.id for rollout in rollouts)
        what = (
            f"Reward {name!r} failed on sample {', '.join(map(repr, ids))}: {_reason(error)} "
            f"({len(rollouts)} rollout{'s' if len(rollouts) != 1 else ''}"
        )
        if self.on_error == "raise":
            raise RewardFailure(f"{what}; on_error='raise').") from error
        self._tally.failures += len(rollouts)
        if self.max_failures is not None and self._tally.failures > self.max_failures:
            raise RewardFailure(
                f"{what}; {self._tally.failures} failures so far, max_failures={self.max_failures}). "
                "Repair the reward, or raise rubric.max_failures."
            ) from error
        effect = "only measured" if self.weights.get(name) == 0 else f"on_error={self.on_error!r}"
        _log.warning("%s; %s).", what, effect)


def _listed(values: Any) -> list[Any]:
    """The values as a list; arrays and tensors too. A text or a mapping is no list of numbers."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"it gave {_short(values)}, not one number per rollout")
    return list(values)


def _finite(value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise TypeError(f"it gave {_short(value)}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"it gave {number}, not a finite number")
    return number


def _reason(error: BaseException) -> str:
    """`RewardError` says its reason itself; of other errors the type matters."""
    text = str(error).strip()
    if isinstance(error, RewardError):
        return text
    return f"{type(error).__name__}: {text}" if text else repr(error)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _names(names: Iterable[str]) -> str:
    return f"{{{', '.join(sorted(names))}}}"
