"""bfloat16 matrix products and gradient checkpointing on the tiny policy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fixtures import make_policy, make_prompt
from reflectvlm.models.qwen_vl import QwenVL, load_policy
from reflectvlm.models.tiny import tiny_folder
from reflectvlm.reattention import Implicit
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.types import Prompt, SamplingParams, Spans, Text
from training import small_rl


def rows(policy: QwenVL) -> list[tuple[Prompt, Spans]]:
    return [(make_prompt(policy, i), (Text(ids=tuple(range(100, 110 + i)), trained=True),)) for i in range(3)]


def test_compute_dtype_is_that_of_the_products_not_of_the_weights() -> None:
    """Bug: `compute=bfloat16` changes nothing, or casts the weights and so loses small steps."""
    policy = make_policy(gain=1.0)
    rough = dataclasses.replace(policy, compute="bfloat16")
    with torch.no_grad():
        batch = policy.batch(rows(policy))
        exact, near = (p.score(batch, p.features(batch.images)).logprobs for p in (policy, rough))
    assert all(parameter.dtype == torch.float32 for parameter in rough.module.parameters())
    assert 0 < (exact - near).abs().max() < 0.1


def test_engine_and_trainer_agree_in_bfloat16_as_well_as_its_rounding_allows() -> None:
    """Bug: one of the two computes in another dtype, and every ratio is biased."""
    policy = dataclasses.replace(make_policy(gain=1.0), compute="bfloat16")
    group = InProcessEngine(policy=policy).generate(
        [make_prompt(policy)], 4, SamplingParams(max_tokens=12), Implicit(), seed=1
    )[0]
    with torch.no_grad():
        batch = policy.batch([(rollout.prompt, rollout.spans) for rollout in group])
        scores = policy.score(batch, policy.features(batch.images))
    assert (scores.logprobs - batch.old_logprobs).abs().max() < 0.05


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    """Bug: recomputation drops the features' gradient, or is silently off."""
    folder = str(tiny_folder(tmp_path / "tiny"))
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(folder, gradient_checkpointing=checkpointing)
        assert checkpointing == any(
            getattr(m, "gradient_checkpointing", False) for m in policy.module.modules()
        )
        policy.module.train()
        batch = policy.batch(rows(policy))
        policy.score(batch, policy.features(batch.images)).logprobs.sum().backward()
        gradients.append([p.grad for p in policy.module.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 50
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_reference_is_kept_in_the_compute_dtype(tmp_path: Path) -> None:
    """Bug: a frozen copy of float32 weights doubles the memory of a run."""
    policy = dataclasses.replace(make_policy(gain=1.0), compute="bfloat16")
    trainer = small_rl(tmp_path, policy=policy)
    assert trainer.reference is not None
    assert {p.dtype for p in trainer.reference.module.parameters()} == {torch.bfloat16}
    assert "loss" in trainer.step(0).metrics


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(tmp_path: Path, attention: str) -> None:
    """Bug: a boolean mask handed to eager attention is added instead of applied."""
    folder = str(tiny_folder(tmp_path / "tiny"))
    policy = load_policy(folder, attention=attention)
    group = InProcessEngine(policy=policy).generate(
        [make_prompt(policy)], 3, SamplingParams(max_tokens=8), Implicit(), seed=1
    )[0]
    with torch.no_grad():
        plain = dataclasses.replace(policy, share_prefix=False)
        batch = policy.batch([(rollout.prompt, rollout.spans) for rollout in group])
        packed, unpacked = (p.score(batch, p.features(batch.images)).logprobs for p in (policy, plain))
    assert (packed - unpacked).abs().max() < 1e-5
    assert (packed - batch.old_logprobs).abs().max() < 1e-5
