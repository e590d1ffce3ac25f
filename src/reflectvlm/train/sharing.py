"""A step's groups among processes: each makes its own, and all know of all.

Every process decides by itself which groups carry a signal, what the metrics are and which update a group
belongs to; so it needs everybody's rollouts, but nobody else's pictures. A group that another process made
comes as what fits into a message: ids, log-probs, text and rewards, without the pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from reflectvlm.train.ranks import Ranks
from reflectvlm.types import Patches, Prompt, Rollout, Sample, ScoredGroup


class Placed(NamedTuple):
    """A group and its prompt's place among those of the whole step."""

    place: int
    group: ScoredGroup


def shared(ranks: Ranks, work: Callable[[], Sequence[Placed]]) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
    """The groups that `work` makes in all processes, in the order of their places; and of them those that
    are this process's own, whole."""
    if ranks.world == 1:
        groups = [one.group for one in sorted(work(), key=_place)]
        return groups, groups
    own: list[Placed] = []

    def told() -> list[Placed]:
        own.extend(work())
        return [Placed(place, without_pixels(group)) for place, group in own]

    others = [one for rank, made in enumerate(ranks.together(told)) if rank != ranks.rank for one in made]
    return (
        [one.group for one in sorted([*own, *others], key=_place)],
        [one.group for one in sorted(own, key=_place)],
    )


def without_pixels(group: ScoredGroup) -> ScoredGroup:
    """The group as it can be sent: its rollouts share one prompt that has no pictures."""
    lighter: dict[int, Prompt] = {}

    def light(rollout: Rollout) -> Rollout:
        prompt = lighter.setdefault(id(rollout.prompt), _light(rollout.prompt))
        return dataclasses.replace(rollout, prompt=prompt)

    return dataclasses.replace(group, rollouts=tuple(light(one) for one in group.rollouts))


def _light(prompt: Prompt) -> Prompt:
    sample = prompt.sample
    plain = {name: value for name, value in sample.columns.items() if _plain(value)}
    return dataclasses.replace(
        prompt,
        sample=Sample(id=sample.id, question=sample.question, answer=sample.answer, columns=plain),
        patches=tuple(Patches(pixels=torch.zeros(0, 0), grid=one.grid) for one in prompt.patches),
    )


def _plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _place(one: Placed) -> int:
    return one.place
