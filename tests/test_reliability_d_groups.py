"""Sections D2 and D3, groups that teach nothing: equal rewards, one member, empty and cut answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from edges import ADVANTAGES, BRPO, OBJECTIVES, finite, places, trainer_with, unchanged, weights
from reflectvlm.models.tiny import random_tiny
from reflectvlm.objectives import KL, ClippedSurrogate, CrossEntropy
from reflectvlm.protocols import Advantage, Objective
from reflectvlm.rewards.lift import per_rollout
from reflectvlm.rewards.reflection import brpo_rubric
from reflectvlm.train.optim import AdamW
from reflectvlm.train.rl import RLTrainer
from reflectvlm.types import Rollout, SamplingParams, Text
from training import remainder, small_rl


def same(_: Rollout) -> float:
    return 0.1


# -- D2 all rewards equal -------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("advantage", ADVANTAGES, ids=repr)
def test_d2_equal_rewards_move_no_weight(tmp_path: Path, advantage: Advantage, keep: bool) -> None:
    """Bug: 0.1 - mean(0.1, 0.1, 0.1) is 1e-17 and not 0; divided by a deviation of 1e-17 it is an update."""
    trainer = trainer_with(tmp_path, per_rollout(same), advantage=advantage, keep_equal_groups=keep)
    before = weights(trainer)
    result = trainer.step(0)
    assert [group.rewards for group in result.groups] == [(0.1, 0.1, 0.1)] * 2
    assert all(not advantage(group).any() for group in result.groups)
    assert ("loss" in result.metrics) == keep
    assert trainer.updates == keep
    assert unchanged(trainer, before)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_d2_equal_rewards_have_no_gradient_in_any_objective(
    tmp_path: Path, objective: ClippedSurrogate
) -> None:
    """Bug: an objective in which advantage 0 is not gradient 0. At the first update policy and reference
    agree, so a KL penalty has none either."""
    trainer = trainer_with(tmp_path, per_rollout(same), objective=objective, keep_equal_groups=True)
    before = weights(trainer)
    metrics = trainer.step(0).metrics
    assert metrics["grad_norm"] == pytest.approx(0.0, abs=1e-6)
    if objective.kl is None:
        assert metrics["grad_norm"] == 0.0
        assert unchanged(trainer, before)


def test_d2_equal_rewards_decay_as_declared_and_no_more(tmp_path: Path) -> None:
    """Bug: a group that teaches nothing moves weights by more than lr * weight_decay * weight."""
    trainer = trainer_with(
        tmp_path, per_rollout(same), keep_equal_groups=True, optimizer=AdamW(lr=1e-3, weight_decay=0.5)
    )
    before = weights(trainer)
    trainer.step(0)
    wanted = [weight * (1 - 1e-3 * 0.5) for weight in before]
    assert not unchanged(trainer, before)
    assert unchanged(trainer, wanted)


def test_d2_the_penalty_alone_pulls_towards_the_reference(tmp_path: Path) -> None:
    """Bug: groups without a signal are kept for their KL term, which then is not taken."""
    trainer = trainer_with(
        tmp_path,
        per_rollout(same),
        objective=ClippedSurrogate(reduce="token_mean", kl=KL(1.0)),
        keep_equal_groups=True,
        epochs_per_step=8,
    )
    trainer.prepare()
    with torch.no_grad():
        trainer.policy.model.lm_head.weight[100:600] *= 1.5
    groups = trainer.sample_groups(0)
    distances = []
    for step in range(2):
        distances.append(trainer.update(groups, step)["kl"])
    assert 0 < distances[1] < 0.9 * distances[0]


def test_d2_equal_rewards_under_brpo(tmp_path: Path) -> None:
    """Bug: a random policy, whose answers are all wrong in the same way, is moved by BRPO."""
    given = brpo_rubric(none=0.0, clip=(0.0, 1.0))
    for keep in (False, True):
        trainer = trainer_with(
            tmp_path,
            per_rollout(same),
            rubric=given,
            objective=dataclasses.replace(BRPO, kl=None),
            keep_equal_groups=keep,
        )
        before = weights(trainer)
        groups = trainer.step(0).groups
        assert [group.rewards for group in groups] == [(0.0, 0.0, 0.0)] * 2
        assert all(all(group.scored) for group in groups)
        assert unchanged(trainer, before)


# -- D3 groups of one, empty and cut answers ------------------------------------------------------


def test_d3_a_group_of_one_is_refused(tmp_path: Path) -> None:
    """Bug: a run of days whose only advantage is 0."""
    with pytest.raises(ValueError, match=r"group_size is 1: its only advantage is 0.*Use 2 or more"):
        small_rl(tmp_path, group_size=1)


@pytest.mark.parametrize("advantage", ADVANTAGES, ids=repr)
def test_d3_a_group_with_one_scored_rollout_teaches_nothing(tmp_path: Path, advantage: Advantage) -> None:
    """Bug: the deviation of one number, 0 / 0, is NaN; n / (n - 1) is 1 / 0."""

    def first_only(group: Sequence[Rollout]) -> list[float | None]:
        return [1.0, *[None] * (len(group) - 1)]

    for keep in (False, True):
        trainer = trainer_with(tmp_path, first_only, advantage=advantage, keep_equal_groups=keep)
        before = weights(trainer)
        result = trainer.step(0)
        assert result.metrics["unscored"] == pytest.approx(2 / 3)
        assert all(advantage(group).tolist() == [0.0] * 3 for group in result.groups)
        assert unchanged(trainer, before)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_d3_answers_that_end_at_once(tmp_path: Path, objective: ClippedSurrogate) -> None:
    """Bug: an answer without text has no token to divide by. Its one token is the end of its turn."""
    policy = random_tiny()
    trainer = trainer_with(tmp_path, places, policy=policy, objective=objective, drop_truncated=True)
    ended = policy.end_ids[0]

    def at_once(prompts: Any, seed: int, *_: Any) -> Any:
        groups = RLTrainer.rollouts(trainer, prompts, seed)
        prompt_groups = []
        for group in groups:
            spans = (Text(ids=(ended,), trained=True, logprobs=(-7.0,)),)
            changed = {"spans": spans, "text": "", "stop": "eos", "offsets": ()}
            prompt_groups.append(tuple(dataclasses.replace(rollout, **changed) for rollout in group))
        return prompt_groups

    trainer.rollouts = at_once  # type: ignore[method-assign]
    result = trainer.step(0)
    assert trainer.updates == 1
    assert trainer.batch(result.groups).num_tokens == 6
    assert math.isfinite(result.metrics["loss"])
    assert math.isfinite(result.metrics["grad_norm"])
    assert finite(trainer)


def test_d3_all_truncated_moves_no_weight(tmp_path: Path) -> None:
    """Bug: overlong filtering that leaves nothing divides by it, or moves weights by decay alone."""
    for keep in (False, True):
        trainer = trainer_with(
            tmp_path,
            per_rollout(remainder),
            drop_truncated=True,
            keep_equal_groups=keep,
            sampling=SamplingParams(max_tokens=2),
            optimizer=AdamW(lr=1e-3, weight_decay=0.5),
        )
        before = weights(trainer)
        result = trainer.step(0)
        assert result.metrics["truncated"] == 1.0
        assert result.metrics["unscored"] == 1.0
        assert "loss" not in result.metrics
        assert trainer.updates == 0
        assert unchanged(trainer, before)


@pytest.mark.parametrize("objective", [*OBJECTIVES, CrossEntropy()], ids=repr)
def test_d3_rows_without_a_trained_token(tmp_path: Path, objective: Objective) -> None:
    """Bug: 0 / 0 in a row's mean; a micro-batch without a gradient path ends the backward pass. Here
    masked rows are micro-batches of their own, and all of the batch."""
    trainer = trainer_with(tmp_path, places, objective=objective, micro_tokens=1)
    batch = trainer.batch(trainer.sample_groups(0))
    ref = None if getattr(objective, "kl", None) is None else batch.old_logprobs
    batch = dataclasses.replace(batch, ref_logprobs=ref)
    mask = batch.trained.clone()
    mask[2:4] = False
    some = dataclasses.replace(batch, trained=mask, num_tokens=float(mask.sum()))
    metrics = trainer.updater(some, 1e-3)
    assert math.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0
    assert finite(trainer)

    plain = trainer_with(tmp_path, places, objective=objective)
    before = weights(plain)
    nothing = dataclasses.replace(batch, trained=torch.zeros_like(mask), num_tokens=0.0)
    metrics = plain.updater(nothing, 1e-3)
    assert (metrics["loss"], metrics["grad_norm"]) == (0.0, 0.0)
    assert unchanged(plain, before)
