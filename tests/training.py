"""Small trainers for tests: random weights, a reward that every rollout gets, seconds per run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.models.tiny import random_tiny
from reflectvlm.objectives import KL, ClippedSurrogate
from reflectvlm.rewards.lift import per_rollout
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.train.evaluate import Evaluation
from reflectvlm.train.optim import AdamW
from reflectvlm.train.rl import RLTrainer
from reflectvlm.train.run import Output
from reflectvlm.train.sft import SFTTrainer
from reflectvlm.types import Rollout, SamplingParams


def remainder(rollout: Rollout) -> float:
    """A reward that differs between rollouts of a random policy."""
    return (sum(rollout.sampled_ids) % 7) / 7


def rubric() -> Rubric:
    return Rubric(rewards={"remainder": per_rollout(remainder)}, weights={"remainder": 1.0})


def small_rl(root: Path, **changes: Any) -> RLTrainer:
    output = {"root": str(root), "save_every": 2, "eval_every": 2} | changes.pop("output", {})
    settings: dict[str, Any] = {
        "policy": random_tiny(),
        "data": Digits(size=12),
        "rubric": rubric(),
        "steps": 5,
        "group_size": 3,
        "prompts_per_step": 2,
        "updates_per_step": 2,
        "epochs_per_step": 2,
        "sampling": SamplingParams(max_tokens=8),
        "objective": ClippedSurrogate(kl=KL()),
        "optimizer": AdamW(lr=1e-3, schedule="cosine"),
        "evaluation": Evaluation(data=Digits(split="validation", size=3), max_tokens=4),
        "test": Evaluation(data=Digits(split="test", size=3), max_tokens=4),
        "output": Output(**output),
    }
    return RLTrainer(**settings | changes)


def small_sft(root: Path, **changes: Any) -> SFTTrainer:
    output = {"root": str(root), "save_every": 2, "eval_every": 2} | changes.pop("output", {})
    settings: dict[str, Any] = {
        "policy": random_tiny(),
        "data": DigitTraces(data=Digits(size=10)),
        "rubric": rubric(),
        "steps": 5,
        "rows_per_step": 3,
        "optimizer": AdamW(lr=1e-3),
        "evaluation": Evaluation(data=Digits(split="validation", size=3), max_tokens=4),
        "test": Evaluation(data=Digits(split="test", size=3), max_tokens=4),
        "output": Output(**output),
    }
    return SFTTrainer(**settings | changes)


def logged(folder: Path) -> list[dict[str, Any]]:
    """All logged values but wall-clock times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]
