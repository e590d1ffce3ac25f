r"""Partial rollouts: an answer that a step does not finish goes on in the next, under the next weights.

    step 1   new prompts ------> tokens --> complete groups are scored and trained on
                                       \-> the others wait, as ids, log-probs and insertions
    step 2   those + new prompts --> tokens --> ...

So the longest answer holds up no step (as in Kimi k1.5, arXiv 2501.12599, "partial rollouts"). Each step
takes as many new prompts as ever, and trains on the groups that are complete; if none is, it goes on until
one is. A group is complete when all its rollouts have ended, and after `max_steps` what has not is cut.

Off-policy correction: every token keeps the log-prob of the policy that sampled it, so the clipped
surrogate's ratio is against the true behaviour policy, token by token. Its clip, and `dual_clip` where the
advantage is negative, bound that ratio. A rollout's `policy_version` is that of its first token.

Left out: a cut in the middle of a step by time, which could not be repeated; and what is begun when the run
ends, which nothing trains on.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention, RolloutEngine
from reflectvlm.rollout.continuing import Begun, BegunGroup
from reflectvlm.rollout.placing import Placed
from reflectvlm.train.feed import Feed, Share
from reflectvlm.types import (
    Insertion,
    Prompt,
    Rollout,
    SamplingParams,
    ScoredGroup,
    Span,
    Spans,
    Text,
    Visual,
)

log = logging.getLogger("reflectvlm")


@dataclass(frozen=True, kw_only=True)
class PartialRollouts:
    """Example: `RLTrainer(..., partial=PartialRollouts(tokens=1024, max_steps=4))`"""

    tokens: int = 512
    """Most tokens that a rollout samples in one step."""
    max_steps: int = 4
    """Steps that a rollout may take part in, so policy versions its tokens may come from."""

    def __post_init__(self) -> None:
        for name in ("tokens", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"PartialRollouts.{name} is {getattr(self, name)}. It must be at least 1.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Waiting:
    """A group that is begun, with what only training needs to know of it."""

    group: BegunGroup
    position: int
    """Of its row in the data."""
    steps: int = 0
    """It has taken part in so many."""
    versions: tuple[tuple[int, ...], ...] = ()
    """Of each rollout's tokens."""

    def after(self, group: BegunGroup, version: int) -> Waiting:
        """With what policy version `version` has added."""
        before = self.versions or ((),) * len(group.rollouts)
        versions = tuple(
            known + (version,) * (len(one.ids) - len(known))
            for known, one in zip(before, group.rollouts, strict=True)
        )
        return dataclasses.replace(self, group=group, versions=versions)

    def rollouts(self, policy: QwenVL) -> tuple[Rollout, ...]:
        return tuple(
            dataclasses.replace(
                rollout,
                policy_version=versions[0],
                token_versions=versions if len({*versions}) > 1 else (),
            )
            for rollout, versions in zip(self.group.finished(policy), self.versions, strict=True)
        )


@dataclass(kw_only=True, eq=False)
class Pending:
    """The groups that are begun, oldest first. Example: see `RLTrainer.sample_groups`."""

    settings: PartialRollouts
    policy: QwenVL
    waiting: list[Waiting] = field(default_factory=list)
    _saved: list[Mapping[str, Any]] = field(default_factory=list, init=False)
    """Groups of a checkpoint whose prompts have not been read yet."""

    def begin(self, share: Share, n: int, seed: int) -> None:
        """New groups for the prompts of this process."""
        self.waiting += [
            Waiting(group=BegunGroup.fresh(prompt, n, seed, place), position=position)
            for (prompt, _), position, place in zip(share.items, share.positions, share.places, strict=True)
        ]

    def go_on(
        self, engine: RolloutEngine, sampling: SamplingParams, reattention: Reattention, version: int
    ) -> Iterator[tuple[int, tuple[Rollout, ...]]]:
        """One step's tokens of all groups. Each that is complete comes with its number, which tells their
        order; the others are kept once the last has come."""
        if not hasattr(engine, "go_on"):
            raise ValueError(
                f"partial is set, but {type(engine).__name__} cannot go on with rollouts that are begun: it "
                "has no method `go_on`. Take InProcessEngine, or leave partial out."
            )
        settings, engine_go_on = self.settings, cast(Any, engine).go_on
        groups = [dataclasses.replace(one, steps=one.steps + 1) for one in self.waiting]
        open_groups = list(range(len(groups)))
        while len(open_groups) == len(groups) > 0:
            begun = [
                dataclasses.replace(groups[i].group, last=groups[i].steps >= settings.max_steps)
                for i in open_groups
            ]
            for place, group in engine_go_on(begun, sampling, reattention, tokens=settings.tokens):
                number = open_groups[place]
                groups[number] = groups[number].after(group, version)
                if group.ended:
                    yield number, groups[number].rollouts(self.policy)
            open_groups = [i for i in open_groups if not groups[i].group.ended]
        self.waiting = [groups[i] for i in open_groups]

    def state(self) -> list[dict[str, Any]]:
        """JSON-like; prompts are read again from their rows."""
        return [*map(dict, self._saved), *(_written(one) for one in self.waiting)]

    def load_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        self.waiting, self._saved = [], list(state)

    def read(self, feed: Feed) -> None:
        """Reads the prompts of a checkpoint's groups. One whose row cannot be used any more is dropped, if
        the rules for rows let a run go on without it."""
        saved, self._saved = self._saved, []
        for one in saved:
            items = feed.these([one["position"]], ahead=False)
            if items:
                self.waiting.append(_read(one, items[0][0]))
            else:
                log.warning("rollouts begun on row %d of the data are dropped with it", one["position"])


def partial_metrics(groups: Sequence[ScoredGroup], version: int, pending: int) -> dict[str, float]:
    """Of the tokens that are trained on: which share an earlier policy sampled, how many optimiser steps ago
    on average; and how many groups wait."""
    ages = [version - of for group in groups for one in group.rollouts for of in versions_of(one)]
    return {
        "partial/off_policy": sum(age > 0 for age in ages) / len(ages),
        "partial/age": sum(ages) / len(ages),
        "partial/pending": float(pending),
    }


def versions_of(rollout: Rollout) -> tuple[int, ...]:
    """The policy version of each sampled token."""
    return rollout.token_versions or (rollout.policy_version,) * len(rollout.sampled_ids)


# -- to JSON and back -----------------------------------------------------------------------------


def _written(one: Waiting) -> dict[str, Any]:
    group = one.group
    return {
        "position": one.position,
        "steps": one.steps,
        "seed": group.seed,
        "number": group.number,
        "rollouts": [
            {
                "ids": list(begun.ids),
                "logprobs": list(begun.logprobs),
                "placed": [_placed_written(placed) for placed in begun.placed],
                "stop": begun.stop,
                "versions": [[version, len([*same])] for version, same in itertools.groupby(versions)],
            }
            for begun, versions in zip(group.rollouts, one.versions, strict=True)
        ],
    }


def _read(state: Mapping[str, Any], prompt: Prompt) -> Waiting:
    rollouts = tuple(
        Begun(
            ids=tuple(one["ids"]),
            logprobs=tuple(one["logprobs"]),
            placed=tuple(_placed_read(placed) for placed in one["placed"]),
            stop=one["stop"],
        )
        for one in state["rollouts"]
    )
    return Waiting(
        group=BegunGroup(prompt=prompt, seed=state["seed"], number=state["number"], rollouts=rollouts),
        position=state["position"],
        steps=state["steps"],
        versions=tuple(
            tuple(version for version, count in one["versions"] for _ in range(count))
            for one in state["rollouts"]
        ),
    )


def _placed_written(placed: Placed) -> dict[str, Any]:
    return {
        "start": placed.start,
        "stop": placed.stop,
        "before": [_span_written(span) for span in placed.insertion.before],
        "after": [_span_written(span) for span in placed.insertion.after],
    }


def _placed_read(state: Mapping[str, Any]) -> Placed:
    return Placed(
        start=state["start"],
        stop=state["stop"],
        insertion=Insertion(before=_spans_read(state["before"]), after=_spans_read(state["after"])),
    )


def _span_written(span: Span) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in _fields(span)}


def _fields(span: Span) -> list[tuple[str, Any]]:
    return [(one.name, getattr(span, one.name)) for one in dataclasses.fields(span)]


def _spans_read(state: Sequence[Mapping[str, Any]]) -> Spans:
    given: list[dict[str, Any]] = [
        {name: tuple(value) if isinstance(value, list) else value for name, value in one.items()}
        for one in state
    ]
    return tuple(Visual(**one) if "image" in one else Text(**one) for one in given)
