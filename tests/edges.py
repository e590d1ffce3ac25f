"""Steps of small trainers with any reward: every objective and advantage, and what became of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reflectvlm.advantages import GroupMean, LeaveOneOut
from reflectvlm.objectives import KL, ClippedSurrogate, dapo, dr_grpo, grpo, gspo
from reflectvlm.protocols import Advantage
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.train.optim import AdamW
from reflectvlm.train.rl import RLTrainer
from reflectvlm.types import Rollout
from training import small_rl

BRPO = ClippedSurrogate(clip_low=0.2, clip_high=0.2, reduce="token_mean", kl=KL(0.1))
"""As in recipes/qwen_la_brpo_7b.yaml."""
ADVANTAGES: list[Advantage] = [GroupMean(), GroupMean(scale="none"), LeaveOneOut()]
OBJECTIVES: list[ClippedSurrogate] = [
    grpo(),
    dr_grpo(max_tokens=8),
    dapo(),
    gspo(),
    ClippedSurrogate(dual_clip=3.0),
    ClippedSurrogate(ratio="sequence", dual_clip=3.0, reduce="token_mean", kl=KL(0.1, "k2")),
    grpo(kl=KL(0.1, "full")),
    BRPO,
]
NO_DECAY = AdamW(lr=1e-3, weight_decay=0.0)


def rubric(reward: Any) -> Rubric:
    return Rubric(rewards={"reward": reward}, weights={"reward": 1.0})


def trainer_with(tmp_path: Path, reward: Any, **changes: Any) -> RLTrainer:
    plain = {
        "rubric": rubric(reward),
        "updates_per_step": 1,
        "epochs_per_step": 1,
        "objective": grpo(),
        "optimizer": NO_DECAY,
    }
    return small_rl(tmp_path, **plain | changes)


def places(group: Sequence[Rollout]) -> list[float]:
    """A reward that differs although all answers are equal."""
    return [float(place) for place, _ in enumerate(group)]


def weights(trainer: RLTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.policy.module.parameters()]


def unchanged(trainer: RLTrainer, before: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


def finite(trainer: RLTrainer) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in trainer.policy.module.parameters())
