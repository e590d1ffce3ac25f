"""Asks rewards about all groups of a step, and reads what they give as numbers.

A reward is asked once per group, or once per rollout if it is `rowwise`. One that has to wait for
something (a process, a server) may have a method `many(groups)`, which is asked about all of them at once
and gives for each what `reward(group)` would give, or the exception it would raise. All others are called
here, one after the other. Values come by place: what was done first changes nothing. What is known already,
because it was asked while other groups were still decoded (`early.py`), is not asked again.

This is the boundary for rewards: whatever they raise or return becomes a number, None, or an exception
that says why there is none. Before each call a step may be given up.
"""

from __future__ import annotations

import asyncio
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any, TypeAlias

from reflectvlm.protocols import Reward
from reflectvlm.rewards.lanes import side_by_side, still_wanted
from reflectvlm.types import Rollout

Value: TypeAlias = float | BaseException | None
"""A finite number, None where the reward does not apply, or why there is no number."""
Group: TypeAlias = tuple[Rollout, ...]
Unit: TypeAlias = tuple[int, int]
"""What is asked about at one time: (group, 0), or (group, rollout) of a reward that is `rowwise`."""

# sys.exit() in a reward must not end a run, nor a cancelled task of its own; Ctrl-C is the user's.
_FAILURES = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)


def ask_all(
    rewards: Mapping[str, Reward],
    groups: Sequence[Group],
    known: Callable[[str], Mapping[Unit, Any]] | None = None,
) -> dict[str, list[list[Value]]]:
    """For each reward, for each group, one value per rollout. Rewards that wait do so side by side.

    `known` gives what was asked early of a reward, and waits for it if need be: it is called last.
    """
    waiting = [name for name, reward in rewards.items() if hasattr(reward, "many")]
    others = [name for name in rewards if name not in waiting]
    found = {name: ask(rewards[name], groups) for name in others}
    early = {name: {} if known is None else known(name) for name in waiting}
    calls = [partial(ask, rewards[name], groups, early[name]) for name in waiting]
    found |= zip(waiting, side_by_side(calls, len(calls)), strict=True)
    return {name: found[name] for name in rewards}


def ask(
    reward: Reward, groups: Sequence[Group], known: Mapping[Unit, Any] | None = None
) -> list[list[Value]]:
    """One reward's values for each group; of units in `known` that is what it gave."""
    outcomes = known or {}
    asked = {unit: rows for place, group in enumerate(groups) for unit, rows in units(reward, place, group)}
    left = {unit: rows for unit, rows in asked.items() if unit not in outcomes}
    values = dict(zip(left, _ask(reward, list(left.values())), strict=True)) if left else {}
    values |= {unit: _values(outcomes[unit], len(rows)) for unit, rows in asked.items() if unit in outcomes}
    if not getattr(reward, "rowwise", False):
        return [values[place, 0] for place in range(len(groups))]
    return [[values[place, row][0] for row in range(len(group))] for place, group in enumerate(groups)]


def units(reward: Reward, place: int, group: Group) -> list[tuple[Unit, Group]]:
    """What a reward is asked about at one time: each rollout of a group, or the whole of it."""
    if not getattr(reward, "rowwise", False):
        return [((place, 0), group)]
    return [((place, row), (rollout,)) for row, rollout in enumerate(group)]


def _ask(reward: Reward, units: Sequence[Group]) -> list[list[Value]]:
    many = getattr(reward, "many", None)
    if many is None:
        return [_values(_called(reward, unit), len(unit)) for unit in units]
    outcomes = _called(many, units)
    if isinstance(outcomes, BaseException):
        return [[outcomes] * len(unit) for unit in units]
    if len(outcomes) != len(units):
        error = ValueError(f"its many() gave {len(outcomes)} outcomes for {len(units)} groups")
        return [[error] * len(unit) for unit in units]
    return [_values(outcome, len(unit)) for outcome, unit in zip(outcomes, units, strict=True)]


def outcome(call: Callable[[], Any]) -> Any:
    """What a call of a reward gives, or the exception that it fails with."""
    still_wanted()
    try:
        return call()
    except _FAILURES as error:
        return error


def _called(function: Any, argument: Any) -> Any:
    return outcome(partial(function, argument))


def _values(outcome: Any, count: int) -> list[Value]:
    """One value per rollout of a group. A wrong number of them is a failure of all."""
    if isinstance(outcome, BaseException):
        return [outcome] * count
    try:
        listed = _listed(outcome, count)
        if len(listed) != count:
            raise ValueError(f"it gave {len(listed)} values for {count} rollouts")
    except _FAILURES as error:
        return [error] * count
    return [_number(value) for value in listed]


def _listed(values: Any, count: int) -> list[Any]:
    """The values as a list; arrays and tensors too. A text, a mapping or a set is no list of numbers."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        raise TypeError(f"it gave {short(values)}, not one number per rollout")
    if isinstance(values, Iterator):
        # An endless one is read no further than what shows that it is too long.
        return [value for _, value in zip(range(count + 1), values, strict=False)]
    return list(values)


def _number(value: Any) -> Value:
    try:
        if hasattr(value, "tolist"):
            value = value.tolist()
        if value is None:
            return None
        if isinstance(value, (str, bytes)):
            raise TypeError(f"it gave {short(value)}, not a number")
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"it gave {number}, not a finite number")
    except _FAILURES as error:  # a user's value may do anything in float()
        return error
    return number


def short(value: object) -> str:
    try:
        text = reprlib.repr(value)
    except _FAILURES:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
