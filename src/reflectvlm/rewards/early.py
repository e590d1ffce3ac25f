"""Rewards that wait begin while other groups are still decoded.

    with Early(rubric) as early:
        for number, group in engine.groups(...):
            early.take(number, group)
        scored = early.score(groups)

Early asked is only what waits for something else than this process: a function in processes of its own, a
judge. Plain Python gains nothing from a thread (it would only take turns with the decoding) and is asked at
the end, as ever, and so is a reward of a user's own, whose `many` was promised all groups at once. A reward
takes part if it has

    lanes                 how many calls of it may wait at one time
    early(group, place)   an `Ahead` that gives what `reward(group)` would, or None: nothing to wait for

`group` is a single rollout if the reward is `rowwise`. Everything is then noted, counted and told by
`Rubric.score` as if all had been asked at the end: what differs is when a reward is asked, and that one
which keeps something between its calls sees groups in the order in which they were complete.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from reflectvlm.rewards.asking import Group, Unit, outcome, units
from reflectvlm.rewards.lanes import Ahead, Lanes
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.types import Rollout, ScoredGroup


@dataclass(kw_only=True, eq=False)
class _Asked:
    """One reward's calls of a step."""

    lanes: Lanes
    calls: dict[Unit, int] = field(default_factory=dict)
    """Number of the call that tells of a unit."""
    keys: dict[Hashable, int] = field(default_factory=dict)
    """Number of the call with a key."""


class Early:
    """One step's rewards; see above."""

    def __init__(self, rubric: Rubric, *, on: bool = True) -> None:
        """`on=False`: all is asked in `score`."""
        self.rubric = rubric
        rewards: Mapping[str, Any] = rubric.rewards if on else {}
        self._asked = {
            name: _Asked(lanes=Lanes(int(reward.lanes)))
            for name, reward in rewards.items()
            if hasattr(reward, "early")
        }

    def __enter__(self) -> Early:
        return self

    def __exit__(self, *_: object) -> None:
        for asked in self._asked.values():
            asked.lanes.leave()

    def take(self, number: int, group: Sequence[Rollout]) -> None:
        """A group that is complete, and its number among those that `score` will be given."""
        for name, asked in self._asked.items():
            reward: Any = self.rubric.rewards[name]
            for (_, row), rows in (listed := units(reward, number, tuple(group))):
                self._put(asked, reward, (number, row), rows, number * len(listed) + row)

    def score(
        self, groups: Sequence[Sequence[Rollout]], numbers: Sequence[int] | None = None
    ) -> list[ScoredGroup]:
        """The step's groups, in this order; those that were not taken are asked about now. `numbers` are
        those they were taken with, by default 0, 1, 2, …"""
        places = {number: place for place, number in enumerate(numbers or range(len(groups)))}
        return self.rubric.score(groups, known=partial(self._known, places))

    def _put(self, asked: _Asked, reward: Any, unit: Unit, rows: Group, place: int) -> None:
        ahead: Ahead | BaseException | None = outcome(partial(reward.early, rows, place))
        if ahead is None or isinstance(ahead, BaseException):
            return  # asked at the end, where it fails again if it must
        number = asked.keys.get(ahead.key) if ahead.key is not None else None
        if number is None:
            # Calls that may be left out are spread over the lanes by how many there are.
            lane = place if ahead.key is None else len(asked.keys)
            number = asked.lanes.put(lane, partial(outcome, ahead.call), ahead.stop)
        if ahead.key is not None:
            asked.keys[ahead.key] = number
        asked.calls[unit] = number

    def _known(self, places: Mapping[int, int], name: str) -> dict[Unit, Any]:
        """What one reward has given, once it has given all."""
        asked = self._asked.get(name)
        if asked is None:
            return {}
        asked.lanes.wait()
        return {
            (places[number], row): asked.lanes.done[call]
            for (number, row), call in asked.calls.items()
            if number in places
        }
