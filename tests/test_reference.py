"""The reference of the KL term: a copy, or with LoRA the policy itself with its adapters switched off."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapting import ALL, FIRST, IDS, TAGS, adapters_of, bits, disturb, lora_tiny, random_lora, same
from reflectvlm.models.adapters import change_nothing, switched_off
from reflectvlm.models.lora import LoRA
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.reference import AdaptersOff, make_reference
from reflectvlm.train.reference_sync import ReferenceSync
from reflectvlm.train.update import Scorer, score_without_grad
from reflectvlm.types import SamplingParams, Text
from test_lora import rows
from training import small_rl

pytest.importorskip("peft", reason="adapters come with the extra lora")


def logprobs(reference: Scorer, policy: QwenVL, micro_tokens: int = 4096) -> Tensor:
    """Of answers that hold new tags, where the policy has any."""
    sequences = rows(policy)
    if len(policy.tokenizer) > FIRST:
        sequences.append((sequences[0][0], (Text(ids=(FIRST, 100, FIRST + 1), trained=True),)))
    return score_without_grad(reference, policy.batch(sequences), micro_tokens, 1.0)


def fresh(dora: bool = False) -> QwenVL:
    return lora_tiny(LoRA(rank=4, dora=dora, **ALL), TAGS)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_it_is_the_copy_made_at_the_start(dora: bool) -> None:
    """Bug: a reference that moves with the policy: its new rows, an adapter of the tower that stays on."""
    policy = fresh(dora)
    frozen = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    reference = make_reference(policy)
    wanted = logprobs(frozen, policy)
    assert torch.allclose(logprobs(reference, policy), wanted, atol=1e-6)
    disturb(policy)
    assert (logprobs(policy, policy) - wanted).abs().max() > 1e-2
    assert torch.allclose(logprobs(reference, policy), wanted, atol=1e-6)
    assert torch.allclose(logprobs(reference, policy, micro_tokens=1), wanted, atol=1e-5)


def test_no_second_model_is_held() -> None:
    """Bug: the copy is made all the same, and memory is what it was."""
    policy = fresh()
    reference = make_reference(policy)
    assert isinstance(reference, AdaptersOff)
    assert reference.module is policy.module
    held = sum(rows.start.numel() for rows in reference._rows)
    assert held == 2 * 128  # two tags of a tied embedding


def test_the_policy_is_what_it_was_bit_for_bit() -> None:
    """Bug: an adapter that stays off, rows that come back rounded, or a parameter that trains no more; also
    after an error inside."""
    policy = fresh()
    off = AdaptersOff(policy=policy)
    disturb(policy)
    next(iter(adapters_of(policy).values())).requires_grad_(False)  # somebody's own choice
    before, training = bits(policy), [p.requires_grad for p in policy.module.parameters()]
    expected = logprobs(policy, policy)
    logprobs(off, policy)
    with off.as_it_began():
        assert not same(bits(policy), before)  # the rows are those of the start

    def fails() -> None:
        with off.as_it_began():
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert same(bits(policy), before)
    assert [p.requires_grad for p in policy.module.parameters()] == training
    assert torch.equal(logprobs(policy, policy), expected)


def test_a_graph_that_is_alive_goes_back_through_the_policy() -> None:
    """Bug: a reference pass between a forward and its backward, as for an exact KL, changes the gradient or
    makes autograd complain of writes."""
    policy = random_lora(ids=IDS)
    off = AdaptersOff(policy=policy)
    disturb(policy, seed=1)
    batch = policy.batch(rows(policy))

    def gradients(within: bool) -> list[Tensor]:
        policy.module.zero_grad(set_to_none=True)
        loss = policy.score(batch, policy.features(batch.images)).logprobs.sum()
        if within:
            logprobs(off, policy)
        loss.backward()
        return [p.grad.clone() for p in policy.module.parameters() if p.grad is not None]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, other)


def test_adapters_that_are_trained_already_need_a_copy(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: RL after SFT in one process measures its KL from the base, not from where it began."""
    policy = disturb(fresh())
    assert not change_nothing(policy.module)
    with caplog.at_level("INFO", logger="reflectvlm"):
        reference = make_reference(policy)
    assert isinstance(reference, QwenVL)
    assert "the reference is a copy of the whole model" in caplog.text
    wanted = logprobs(policy, policy)
    disturb(policy, seed=1)
    assert torch.allclose(logprobs(reference, policy), wanted, atol=1e-6)


def test_without_adapters_it_is_a_copy(tmp_path: Path) -> None:
    """Bug: today's reference is lost."""
    trainer = small_rl(tmp_path)
    trainer.prepare()
    assert isinstance(trainer.reference, QwenVL)
    assert trainer.reference.module is not trainer.policy.module


def test_the_kl_term_begins_at_0_and_grows(tmp_path: Path) -> None:
    """Bug: the trainer asks the trained policy for both sides of its KL, which is then 0 for ever; or a ratio
    other than 1 before the first update."""
    loud = SamplingParams(max_tokens=8, temperature=2.0)
    trainer = small_rl(tmp_path, policy=fresh(), updates_per_step=1, epochs_per_step=1, sampling=loud)
    trainer.prepare()
    metrics = [trainer.step(number).metrics for number in range(3)]
    assert metrics[0]["kl"] == 0
    assert all(one["kl"] > 1e-3 for one in metrics[1:])
    assert all(one["ratio_gap"] < 1e-5 for one in metrics)


def test_a_reference_that_follows_is_refused(tmp_path: Path) -> None:
    """Bug: the sync writes the policy's weights into the policy."""
    with pytest.raises(
        ValueError, match=r"reference_sync is set, and the policy trains adapters .*lora=null"
    ):
        small_rl(tmp_path, policy=fresh(), reference_sync=ReferenceSync(every=2))


def test_switched_off_is_the_base() -> None:
    """Bug: a layer of the tower stays on."""
    policy = random_lora(LoRA(rank=4, **ALL))
    on = logprobs(policy, policy)
    with switched_off(policy.module):
        off = logprobs(policy, policy)
    from fixtures import make_policy

    base = make_policy(dtype=torch.float64)
    assert torch.equal(off, logprobs(base, base))
    assert torch.equal(logprobs(policy, policy), on)
