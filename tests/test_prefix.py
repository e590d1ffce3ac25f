"""Shared-prefix packing gives the log-probs and gradients of plain rows, whichever way it attends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointError

from fixtures import make_policy, make_prompt
from reflectvlm.batch import Batch
from reflectvlm.models import qwen_vl, tree_attention
from reflectvlm.models.loading import enable_checkpointing
from reflectvlm.models.prefix import Packed, branch_mask, pack
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.tree import Line, line_up
from reflectvlm.models.varlen_kernels import plain_varlen
from reflectvlm.train.update import score_without_grad
from reflectvlm.types import Prompt, Spans, Text, Visual

TOLERANCE = 1e-5
KINDS = ("dense", "split", "varlen")
"""Those with gradients on a CPU, where a plain loop over its segments stands in for varlen's kernel."""


@pytest.fixture(autouse=True)
def plain_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_attention, "varlen_kernel", lambda _: plain_varlen)


def text(first: int, n: int) -> Text:
    return Text(ids=tuple(range(first, first + n)), trained=True)


def rows(policy: QwenVL) -> list[tuple[Prompt, Spans]]:
    """Two groups of unequal prompts and answers, interleaved, with blocks in two of the answers and none at
    all in one; and a prompt with a single answer."""
    one = make_prompt(policy, 0, instruction="Answer.")
    two = make_prompt(policy, 1, "<image> or <image>?", ((64, 48), (32, 32)))
    return [
        (one, (text(100, 5),)),
        (two, (text(120, 3), Visual(image=1), text(140, 4))),
        (one, (text(160, 2), Visual(image=0, keep=(1, 7), before_sampled=True), text(180, 6))),
        (make_prompt(policy, 2, "One and one?", ()), (text(300, 4),)),
        (two, (text(200, 9),)),
        (one, ()),
        (one, (text(220, 1),)),
    ]


def gradients(policy: QwenVL, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probs, and the gradient of a weighted sum of them."""
    policy.module.zero_grad(set_to_none=True)
    logprobs = policy.score(batch, policy.features(batch.images)).logprobs
    (logprobs * torch.cos(batch.ids)).sum().backward()
    return logprobs.detach(), [p.grad.clone() for p in policy.module.parameters() if p.grad is not None]


def farthest(wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """Largest difference, relative to what is above 1."""
    assert len(wanted) == len(got)
    pairs = zip(wanted, got, strict=True)
    return max(float((a - b).abs().max()) / max(1.0, float(a.abs().max())) for a, b in pairs)


def both_ways(policy: QwenVL, kind: Any, **settings: Any) -> tuple[float, float]:
    """How far packed rows are from plain ones: log-probs and gradients."""
    plain = dataclasses.replace(policy, share_prefix=False, **settings)
    packed = dataclasses.replace(policy, share_prefix=True, prefix_attention=kind, **settings)
    batch = plain.batch(rows(plain))
    assert line_up(batch) is not None
    (expected, wanted), (found, got) = gradients(plain, batch), gradients(packed, batch)
    return float((found - expected).abs().max()), farthest(wanted, got)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_rows_equal_plain_rows(exact_policy: QwenVL, side: str, kind: str) -> None:
    """Bug: an answer sees its siblings, or stands at positions it would not have alone."""
    # The rotary embedding is computed in float32 whatever the weights are.
    assert max(both_ways(exact_policy, kind, padding_side=side)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_plain_rows_in_float32(kind: str) -> None:
    """Bug: an economy that is exact on paper and loses digits where training runs."""
    assert max(both_ways(make_policy(gain=1.0), kind)) < TOLERANCE


@pytest.mark.parametrize("kind", ["dense", "split"])
def test_no_worse_than_plain_rows_in_bfloat16(kind: str) -> None:
    """Bug: under autocast a part runs in a narrower dtype than the library's own attention. The yardstick
    is how far plain rows in bfloat16 are from plain rows in float32. (Between rows padded on one side and on
    the other there is no noise at all on a CPU without bfloat16 instructions.)"""
    exact = dataclasses.replace(make_policy(gain=2.0), share_prefix=False)
    plain = dataclasses.replace(exact, compute="bfloat16")
    packed = dataclasses.replace(plain, share_prefix=True, prefix_attention=kind)
    right, *rounded = [
        gradients(policy, batch)[0][batch.trained]
        for policy in (exact, plain, packed)
        for batch in (policy.batch(rows(policy)),)
    ]
    noise, ours = ((one - right).square().mean().sqrt() for one in rounded)
    assert 1e-4 < noise < 0.2
    assert ours < 1.5 * noise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_tokens", [1, 200, 4096])
def test_old_and_reference_scores_are_those_of_plain_rows(
    exact_policy: QwenVL, kind: str, micro_tokens: int
) -> None:
    """Bug: scores of a pass that are written to another row, where passes are made of groups."""
    plain = dataclasses.replace(exact_policy, share_prefix=False)
    batch = plain.batch(rows(plain))
    packed = dataclasses.replace(exact_policy, prefix_attention=kind)
    expected = score_without_grad(plain, batch, 4096, 0.7)
    assert (score_without_grad(packed, batch, micro_tokens, 0.7) - expected).abs().max() < TOLERANCE
    assert expected.abs().max() > 1


def test_flex_scores_equal_plain_scores(exact_policy: QwenVL) -> None:
    """Bug: FlexAttention's mask lets an answer see its siblings. On a CPU it has no gradients."""
    plain = dataclasses.replace(exact_policy, share_prefix=False)
    batch = plain.batch(rows(plain))
    flex = dataclasses.replace(exact_policy, prefix_attention="flex")
    # On a CPU it runs without a compiler, and says that this is slow.
    with pytest.warns(UserWarning, match="unfused"):
        found = score_without_grad(flex, batch, 4096, 1.0)
    assert (found - score_without_grad(plain, batch, 4096, 1.0)).abs().max() < TOLERANCE
    with pytest.raises(ValueError, match="'flex' has no gradients on a CPU"):
        gradients(flex, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_attends_the_same_way_again(kind: str) -> None:
    """Bug: layers that run again on the way back find another attention function than the first time, and
    the gradients are those of answers that see their siblings."""
    policy = make_policy(dtype=torch.float64)
    plain = dataclasses.replace(policy, share_prefix=False)
    batch = plain.batch(rows(plain))
    expected, wanted = gradients(plain, batch)
    enable_checkpointing(policy.model)
    policy.module.train()
    layers, runs = policy.model.model.language_model.layers, []
    assert len(layers) > 1
    hooks = [layer.self_attn.register_forward_hook(lambda *_: runs.append(1)) for layer in layers]
    found, got = gradients(dataclasses.replace(policy, prefix_attention=kind), batch)
    for hook in hooks:
        hook.remove()
    assert len(runs) == 2 * len(layers)
    assert (found - expected).abs().max() < TOLERANCE
    assert farthest(wanted, got) < TOLERANCE


def test_the_comparison_sees_an_attention_function_that_is_taken_away() -> None:
    """The mistake: put in for the time of the forward alone, as one would with a context manager."""
    policy = dataclasses.replace(make_policy(dtype=torch.float64), prefix_attention="split")
    batch = policy.batch(rows(policy))
    enable_checkpointing(policy.model)
    policy.module.train()
    logprobs = policy.score(batch, policy.features(batch.images)).logprobs
    policy.model.model.language_model.config._attn_implementation = "sdpa"
    with pytest.raises(CheckpointError, match="different number of tensors was saved"):
        logprobs.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_plain_rows_with_lora(kind: str) -> None:
    """Bug: adapters around the language model's linear layers see other rows, or get no gradient."""
    peft = pytest.importorskip("peft", reason="adapters come with peft, which the library does not need")
    policy = make_policy(dtype=torch.float64)
    config = peft.LoraConfig(r=4, target_modules=r"model\.language_model\..*\.(q|k|v|o|up|down|gate)_proj")
    peft.inject_adapter_in_model(config, policy.model)
    adapters = {name: p for name, p in policy.module.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 7 * len(policy.model.model.language_model.layers)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.module.named_parameters():
        parameter.requires_grad_(name in adapters)
        if name in adapters:  # the second factor starts at 0, which would hide it
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    assert max(both_ways(policy, kind)) < TOLERANCE
    assert all(float(p.grad.abs().max()) > 0 for p in adapters.values() if p.grad is not None)


def test_sliding_windows_are_refused() -> None:
    """Bug: layers that look back only so far look back farther where prompts are shared."""
    policy = make_policy()
    policy.model.model.language_model.config.layer_types[1] = "sliding_attention"
    with pytest.raises(ValueError, match=r"layer 1 has sliding_attention .* share_prefix=False"):
        gradients(policy, policy.batch(rows(policy)))


def test_rows_that_share_nothing_are_untouched_by_the_attention_function() -> None:
    """Bug: plain rows score differently once packed ones have put their attention function in."""
    policy = dataclasses.replace(make_policy(), prefix_attention="split")
    batch = policy.batch(rows(policy)[2:4])
    assert line_up(batch) is None
    before = gradients(policy, batch)
    gradients(policy, policy.batch(rows(policy)))
    assert policy.model.model.language_model.config._attn_implementation == tree_attention.NAME
    after = gradients(policy, batch)
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(one, other) for one, other in zip(before[1], after[1], strict=True))


def siblings_seen(made: Packed) -> Packed:
    """Plain causal attention over the packed row."""
    assert made.mask is not None
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
    assert made.mask is not None
    mask = made.mask.clone()
    mask[:, :, 60:, :40] = False
    return dataclasses.replace(made, mask=mask)


MISTAKES = [
    ("dense", siblings_seen),
    ("dense", prompt_hidden),
    *(
        (kind, mistake)
        for kind in ("dense", "split", "varlen")
        for mistake in (positions_run_on, answers_swapped)
    ),
]


@pytest.mark.parametrize(("kind", "mistake"), MISTAKES)
def test_the_equality_sees_a_mistake(
    exact_policy: QwenVL, monkeypatch: pytest.MonkeyPatch, kind: str, mistake: Callable[[Packed], Packed]
) -> None:
    """Bug: the tolerance above is so wide, or the rows so tame, that packing may be wrong."""
    monkeypatch.setattr(qwen_vl, "pack", lambda *arguments: mistake(pack(*arguments)))
    assert both_ways(exact_policy, kind)[0] > 100 * TOLERANCE


def test_each_prompt_is_run_once(exact_policy: QwenVL) -> None:
    """Bug: packing that packs nothing and costs as much as plain rows."""
    batch = exact_policy.batch(rows(exact_policy))
    made = pack(batch, lined_up(batch), "dense", exact_policy.pad_id)
    assert made.mask is not None
    prompts = {int(p): int(n) for p, n in zip(batch.prompt, batch.prompt_tokens, strict=True)}
    answers = int((batch.attention.sum(1) - batch.prompt_tokens).sum())
    used = int((made.mask.sum(-1) > 1).sum())
    # Every token but each packed row's first sees more than itself; padding sees itself alone.
    assert used == sum(prompts.values()) + answers - len(prompts)
    assert len(made.ids) == len(prompts) == 3
    line = pack(batch, lined_up(batch), "split", exact_policy.pad_id)
    assert line.ids.shape == (1, sum(prompts.values()) + answers)


def lined_up(batch: Batch) -> Line:
    line = line_up(batch)
    assert line is not None
    return line


def test_a_batch_of_different_prompts_is_left_alone(exact_policy: QwenVL) -> None:
    """Bug: SFT rows, which share nothing, pay for a dense mask."""
    batch = exact_policy.batch(rows(exact_policy)[2:4])
    assert line_up(batch) is None


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
