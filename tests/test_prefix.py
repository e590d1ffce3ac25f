"""Shared-prefix packing gives the log-probs and gradients of plain rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from fixtures import make_prompt
from reflectvlm.batch import Batch
from reflectvlm.models import qwen_vl
from reflectvlm.models.prefix import Packed, branch_mask, pack, worth_packing
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.types import Prompt, Spans, Text, Visual

TOLERANCE = 1e-5


def rows(policy: QwenVL) -> list[tuple[Prompt, Spans]]:
    """Two groups of unequal prompts and answers, interleaved, with blocks in two of the answers."""
    one = make_prompt(policy, 0, instruction="Answer.")
    two = make_prompt(policy, 1, "<image> or <image>?", ((64, 48), (32, 32)))

    def text(first: int, n: int) -> Text:
        return Text(ids=tuple(range(first, first + n)), trained=True)

    return [
        (one, (text(100, 5),)),
        (two, (text(120, 3), Visual(image=1), text(140, 4))),
        (one, (text(160, 2), Visual(image=0, keep=(1, 7), before_sampled=True), text(180, 6))),
        (two, (text(200, 9),)),
        (one, (text(220, 1),)),
    ]


def gradients(policy: QwenVL, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probs, and the gradient of a weighted sum of them."""
    policy.module.zero_grad(set_to_none=True)
    logprobs = policy.score(batch, policy.features(batch.images)).logprobs
    (logprobs * torch.cos(batch.ids)).sum().backward()
    return logprobs.detach(), [p.grad.clone() for p in policy.module.parameters() if p.grad is not None]


@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_rows_equal_plain_rows(exact_policy: QwenVL, side: str) -> None:
    """Bug: an answer sees its siblings, or stands at positions it would not have alone."""
    plain = dataclasses.replace(exact_policy, share_prefix=False, padding_side=side)
    packed = dataclasses.replace(exact_policy, share_prefix=True, padding_side=side)
    batch = plain.batch(rows(plain))
    assert worth_packing(batch)
    (expected, wanted), (found, got) = gradients(plain, batch), gradients(packed, batch)
    assert (found - expected).abs().max() < TOLERANCE
    assert len(wanted) == len(got)
    for one, other in zip(wanted, got, strict=True):
        # The rotary embedding is computed in float32 whatever the weights are.
        assert (one - other).abs().max() <= TOLERANCE * max(1.0, float(one.abs().max()))


def siblings_seen(made: Packed) -> Packed:
    """Plain causal attention over the packed row."""
    return dataclasses.replace(made, mask=torch.ones_like(made.mask).tril())


def positions_run_on(made: Packed) -> Packed:
    """Answers stand one behind the other instead of each right behind the prompt."""
    steps = torch.arange(made.ids.shape[1]).expand_as(made.positions)
    return dataclasses.replace(made, positions=steps)


def answers_swapped(made: Packed) -> Packed:
    """Scores are read from the neighbour's place."""
    return dataclasses.replace(made, where=made.where.roll(1, 0))


def prompt_hidden(made: Packed) -> Packed:
    """Answers see only themselves."""
    mask = made.mask.clone()
    mask[:, :, 60:, :40] = False
    return dataclasses.replace(made, mask=mask)


@pytest.mark.parametrize("mistake", [siblings_seen, positions_run_on, answers_swapped, prompt_hidden])
def test_the_equality_sees_a_mistake(
    exact_policy: QwenVL, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Packed], Packed]
) -> None:
    """Bug: the tolerance above is so wide, or the rows so tame, that packing may be wrong."""
    plain = dataclasses.replace(exact_policy, share_prefix=False)
    batch = plain.batch(rows(plain))
    expected = gradients(plain, batch)[0]
    monkeypatch.setattr(qwen_vl, "pack", lambda batch, pad_id: mistake(pack(batch, pad_id)))
    found = gradients(dataclasses.replace(exact_policy, share_prefix=True), batch)[0]
    assert (found - expected).abs().max() > 100 * TOLERANCE


def test_each_prompt_is_run_once(exact_policy: QwenVL) -> None:
    """Bug: packing that packs nothing and costs as much as plain rows."""
    batch = exact_policy.batch(rows(exact_policy))
    made = pack(batch, exact_policy.pad_id)
    prompts = {int(p): int(n) for p, n in zip(batch.prompt, batch.prompt_tokens, strict=True)}
    answers = int((batch.attention.sum(1) - batch.prompt_tokens).sum())
    used = int((made.mask.sum(-1) > 1).sum())
    # Every token but each packed row's first sees more than itself; padding sees itself alone.
    assert used == sum(prompts.values()) + answers - len(prompts)
    assert len(made.ids) == len(prompts) == 2


def test_a_batch_of_different_prompts_is_left_alone(exact_policy: QwenVL) -> None:
    """Bug: SFT rows, which share nothing, pay for a dense mask."""
    batch = exact_policy.batch(rows(exact_policy)[:2])
    assert not worth_packing(batch)


def test_branch_mask_by_hand() -> None:
    """Prompt of two tokens, answers of two and one, one column of padding."""
    mask = branch_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
