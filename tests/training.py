"""Small trainers for tests: random weights, a reward that every rollout gets, seconds per run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.models.new_tags import add_tags
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.tiny import random_tiny
from reflectvlm.objectives import KL, ClippedSurrogate
from reflectvlm.reattention import VisualCopy
from reflectvlm.rewards.lift import per_rollout
from reflectvlm.rewards.reflection import brpo_rubric
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


def reflecting_tiny() -> QwenVL:
    """Random weights that reflect: both ends of `<REFLECTION>` are often sampled."""
    policy, tags = random_tiny(), ("<REFLECTION>", "</REFLECTION>")
    ids = list(add_tags(policy.model, policy.tokenizer, tags))
    with torch.no_grad():
        weight = policy.model.get_output_embeddings().weight
        (newline,) = policy.tokenizer.encode("\n", add_special_tokens=False)
        weight[ids] += 9 * weight[newline]  # which every answer follows: what is like it has a high logit
    return policy


def small_brpo_copy(root: Path, **changes: Any) -> RLTrainer:
    """BRPO with Qwen-LA's COPY: at every reflection the image is put in again."""
    # Its ten tokens would not hold a right answer, which the checks at the start rightly refuse.
    output = {"checks": False} | changes.pop("output", {})
    settings: dict[str, Any] = {
        "policy": reflecting_tiny(),
        "rubric": brpo_rubric(
            target_tokens=2,
            none=-0.5,
            extra={"remainder": per_rollout(remainder)},
            extra_weights={"remainder": 1.0},
        ),
        "reattention": VisualCopy(limit=2),
        "sampling": SamplingParams(max_tokens=10),
        "updates_per_step": 1,
        "name": "brpo",
        "output": output,
    }
    return small_rl(root, **settings | changes)


def logged(folder: Path) -> list[dict[str, Any]]:
    """All logged values but wall-clock times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


class Crash(BaseException):  # no boundary for errors of data or rewards may keep it
    """A run that dies at once, as far as one process can show it."""


def crash() -> None:
    raise Crash


def at_call(
    owner: Any, name: str, number: int, act: Callable[[], None], patch: Any, within: Any = None
) -> None:
    """Does `act` just before the call number `number` (from 1) of a method; earlier and later ones pass.
    With a trainer as `within` calls count from its first step on."""
    real, calls, begun = getattr(owner, name), [], [within is None]
    if within is not None:
        take = within.step

        def step(number: int) -> Any:
            begun[0] = True
            return take(number)

        within.step = step

    def counted(*arguments: Any, **named: Any) -> Any:
        if begun[0]:
            calls.append(1)
        if begun[0] and len(calls) == number:
            act()
        return real(*arguments, **named)

    patch.setattr(owner, name, counted)


def crashed(trainer: Any, owner: Any, name: str, number: int, within: Any = None) -> None:
    """Runs a trainer that dies at a call."""
    with pytest.MonkeyPatch.context() as patch:
        at_call(owner, name, number, crash, patch, within)
        with pytest.raises(Crash):
            trainer.run()


def same_runs(one: Path, other: Path) -> None:
    """Asserts that two runs logged the same, said the same, and ended with the same weights, bit for bit."""
    assert logged(one) == logged(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    assert summaries[0] == summaries[1]
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, values in weights[0].items():
        assert bool((values == weights[1][name]).all()), name
