"""One optimiser step: however it is cut into micro-batches, and never with a number that is not one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures import make_policy, make_prompt, score_batch
from reflectvlm.batch import Batch, LossInputs, LossOutputs
from reflectvlm.models.freezing import freeze, part_of
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.objectives import KL, CrossEntropy, dapo, grpo
from reflectvlm.protocols import Objective
from reflectvlm.train.budget import image_parts, passes
from reflectvlm.train.optim import AdamW
from reflectvlm.train.runtime import Runtime
from reflectvlm.train.update import NonFinite, Updater, loss_inputs
from reflectvlm.types import Prompt, Spans, Text, Visual

TOLERANCE = 1e-5
NO_CLIP = 1e9
WHOLE, ROW_BY_ROW = 4096, 1
BUDGETS = (WHOLE, ROW_BY_ROW, 100, 150)
"""Of `make_batch`, whose rows have 58, 79, 61 and 39 tokens, 55 of the first two the same: packed 82."""


def answer(*pieces: int | Visual) -> Spans:
    """Runs of trained tokens with blocks between them."""
    spans: list[Text | Visual] = []
    for piece in pieces:
        if isinstance(piece, Visual):
            spans.append(piece)
        else:
            spans.append(Text(ids=tuple(range(100, 100 + piece)), trained=True))
    return tuple(spans)


def make_batch(policy: QwenVL, order: Sequence[int] = (0, 1, 2, 3)) -> Batch:
    """Four rows of unequal lengths: one prompt twice, one with two images and a block, one without.
    Behaviour and reference log-probs are near the policy's own, so that some ratios are clipped."""
    one, two = make_prompt(policy, 0), make_prompt(policy, 1, "<image> or <image>?", ((64, 48), (32, 32)))
    none = make_prompt(policy, 2, "One and one?", ())
    rows: list[tuple[Prompt, Spans]] = [
        (one, answer(3)),
        (one, answer(2, Visual(image=0, before_sampled=True), 4)),
        (two, answer(1, Visual(image=1), 5)),
        (none, answer(8)),
    ]
    batch = policy.batch([rows[i] for i in order])
    advantages = torch.tensor([1.0, -0.5, 0.7, -1.2], device=policy.device)[list(order)]
    own = score_batch(policy, batch).logprobs.float()
    near = torch.where(batch.trained, own + 0.25 * torch.cos(batch.ids.float()), 0.0)
    reference = torch.where(batch.trained, own + 0.3, 0.0)
    return dataclasses.replace(batch, advantages=advantages, old_logprobs=near, ref_logprobs=reference)


def make_updater(policy: QwenVL, objective: Objective, micro_tokens: int, **settings: Any) -> Updater:
    trained = [p for p in policy.module.parameters() if p.requires_grad]
    chosen: dict[str, Any] = {
        "optimizer": torch.optim.SGD(trained, lr=0.0),
        "max_grad_norm": NO_CLIP,
        **settings,
    }
    return Updater(policy=policy, objective=objective, runtime=Runtime(), micro_tokens=micro_tokens, **chosen)


def gradients(policy: QwenVL) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def in_one_graph(policy: QwenVL, objective: Objective, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients without any of the updater's economies."""
    policy.model.zero_grad(set_to_none=True)
    scores = policy.score(batch, policy.features(batch.images))
    loss = objective(loss_inputs(batch, scores.logprobs, scores.entropy)).loss
    loss.backward()
    return float(loss.detach()), gradients(policy)


@pytest.fixture(scope="module")
def policy() -> QwenVL:
    """Float64; the tests that use it never move its weights."""
    return make_policy(dtype=torch.float64)


OBJECTIVES = [grpo(kl=KL()), dapo(), CrossEntropy()]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["grpo", "dapo", "sft"])
@pytest.mark.parametrize("frozen", [(), ("vision",), ("vision", "projector")], ids=str)
def test_micro_batches_change_nothing(policy: QwenVL, objective: Objective, frozen: tuple[Any, ...]) -> None:
    """4 rows x 1 is 1 row x 4: a mean inside a micro-batch, or a feature gradient that only the last
    micro-batch sends back, makes memory settings change the result."""
    freeze(policy.model, frozen)
    batch = make_batch(policy)
    loss, expected = in_one_graph(policy, objective, batch)
    trained = {name for name, _ in policy.model.named_parameters() if part_of(name) not in frozen}
    assert set(expected) == trained
    reports = []
    assert [len(passes(batch.layout, n, share_prefix=True)) for n in BUDGETS] == [1, 4, 3, 2]
    for micro_tokens in BUDGETS:
        report = make_updater(policy, objective, micro_tokens)(batch, lr=0.0)
        assert report["loss"] == pytest.approx(loss, abs=TOLERANCE)
        assert largest(gradients(policy), expected) < TOLERANCE
        total = sum(float(g.square().sum()) for g in expected.values())
        assert report["grad_norm"] == pytest.approx(total**0.5, rel=TOLERANCE)
        reports.append(report)
    for report in reports[1:]:
        assert report == pytest.approx(reports[0], abs=TOLERANCE)
    assert max(float(g.abs().max()) for g in expected.values()) > 1000 * TOLERANCE


def local_mean(inputs: LossInputs) -> LossOutputs:
    """The mistake: each micro-batch divides by its own count."""
    loss = -(inputs.logprobs * inputs.mask).sum() / inputs.mask.sum()
    return LossOutputs(loss=loss, metrics={})


def test_the_comparison_sees_a_local_mean(policy: QwenVL) -> None:
    freeze(policy.model, ())
    batch = make_batch(policy)
    make_updater(policy, local_mean, WHOLE)(batch, lr=0.0)
    whole = gradients(policy)
    make_updater(policy, local_mean, ROW_BY_ROW)(batch, lr=0.0)
    assert largest(gradients(policy), whole) > 1000 * TOLERANCE


def test_the_vision_tower_runs_once_each_way(policy: QwenVL) -> None:
    """Once a micro-batch would cost most of the update; never back would train nothing."""
    freeze(policy.model, ())
    batch = make_batch(policy)
    calls = {"forward": 0, "backward": 0}
    tower = policy.model.model.visual

    def count(way: str) -> None:
        calls[way] += 1

    hooks = [
        tower.register_forward_hook(lambda *_: count("forward")),
        tower.patch_embed.proj.weight.register_hook(lambda _: count("backward")),
    ]
    assert len(batch.images) == 3 < len(batch)  # two micro-batches, one part of images
    make_updater(policy, grpo(), 150)(batch, lr=0.0)
    for hook in hooks:
        hook.remove()
    assert calls == {"forward": 1, "backward": 1}
    assert tower.patch_embed.proj.weight.grad.abs().max() > 1e-3


def test_rows_in_another_order_keep_their_images(policy: QwenVL) -> None:
    """A batch whose rows are shuffled but whose images are not trains on other rows' pictures."""
    freeze(policy.model, ())
    loss, expected = in_one_graph(policy, grpo(), make_batch(policy))
    report = make_updater(policy, grpo(), 150)(make_batch(policy, (2, 3, 1, 0)), lr=0.0)
    assert report["loss"] == pytest.approx(loss, abs=TOLERANCE)
    assert largest(gradients(policy), expected) < TOLERANCE
    # The mistake: images listed in another order than the rows point at them.
    batch = make_batch(policy)
    wrong = dataclasses.replace(batch, visual=torch.where(batch.visual >= 0, (batch.visual + 7) % 32, -1))
    make_updater(policy, grpo(), 150)(wrong, lr=0.0)
    assert largest(gradients(policy), expected) > 1000 * TOLERANCE


@pytest.mark.parametrize(
    "frozen", [("vision",), ("vision", "projector"), ("language",), ("projector",)], ids=str
)
def test_frozen_parts_do_not_move(frozen: tuple[Any, ...]) -> None:
    """Weight decay moves a parameter that has no gradient, if the optimiser holds it."""
    policy = make_policy(gain=1.0)
    freeze(policy.model, frozen)
    optimizer = AdamW(lr=1e-3, weight_decay=0.1).build(policy.module.parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    make_updater(policy, grpo(), 150, optimizer=optimizer, max_grad_norm=1.0)(make_batch(policy), lr=1e-3)
    for name, parameter in policy.model.named_parameters():
        is_frozen = part_of(name) in frozen
        assert (id(parameter) in held) != is_frozen, name
        assert torch.equal(parameter, before[name]) == is_frozen, name


def test_a_step_is_the_optimisers_at_the_given_rate(policy: QwenVL) -> None:
    """SGD without momentum by hand: w - lr * g * min(1, clip / |g|)."""
    freeze(policy.model, ())
    mine = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    batch = make_batch(mine)
    _, g = in_one_graph(mine, grpo(), batch)
    norm = sum(float(x.square().sum()) for x in g.values()) ** 0.5
    before = {name: p.detach().clone() for name, p in mine.model.named_parameters()}
    report = make_updater(mine, grpo(), 150, max_grad_norm=0.5 * norm)(batch, lr=0.01)
    assert (report["lr"], report["grad_norm"]) == (0.01, pytest.approx(norm))
    for name, parameter in mine.model.named_parameters():
        # accelerate divides by norm + 1e-6.
        assert torch.allclose(parameter, before[name] - 0.01 * 0.5 * g[name], atol=1e-8), name


@dataclasses.dataclass(frozen=True)
class Broken:
    """A loss, or only its gradient, that is not a number, in one micro-batch of several."""

    what: str

    def __call__(self, inputs: LossInputs, /) -> LossOutputs:
        fine = grpo()(inputs).loss
        if float(inputs.advantages[0]) > 0.9:
            if self.what == "loss":
                fine = fine * float("nan")
            elif self.what == "infinite loss":
                fine = fine + float("inf")
            else:
                zero = (inputs.logprobs - inputs.logprobs.detach()).sum()
                fine = fine + zero.abs().sqrt()  # 0, with gradient 0 * inf
        return LossOutputs(loss=fine, metrics={})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("loss", r"The loss \(nan\)"),
        ("infinite loss", r"The loss \(inf\)"),
        ("gradient", r"The gradient norm \(nan\)"),
    ],
)
def test_what_is_not_finite_stops_before_the_weights_move(what: str, message: str) -> None:
    """One NaN step ruins every weight, and the run goes on saving checkpoints of it."""
    policy = make_policy(gain=1.0)
    optimizer = AdamW(lr=1e-3).build(policy.module.parameters())
    batch = make_batch(policy)
    make_updater(policy, grpo(), 150, optimizer=optimizer, max_grad_norm=1.0)(batch, lr=1e-3)
    before = [p.detach().clone() for p in policy.module.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(NonFinite, match=message) as raised:
        make_updater(policy, Broken(what), 150, optimizer=optimizer, max_grad_norm=1.0)(batch, lr=1e-3)
    assert raised.value.batch is batch
    assert all(torch.equal(p, old) for p, old in zip(policy.module.parameters(), before, strict=True))
    for key, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(values[name], state["state"][key][name]) for name in values)


def test_a_batch_without_images_trains(policy: QwenVL) -> None:
    """Text-only batches have no features to send a gradient to."""
    freeze(policy.model, ())
    prompt = make_prompt(policy, 2, "One and one?", ())
    batch = dataclasses.replace(policy.batch([(prompt, answer(4))]), advantages=torch.ones(1))
    report = make_updater(policy, grpo(), ROW_BY_ROW)(batch, lr=0.0)
    assert report["grad_norm"] > 0
    assert all("visual" not in name for name in gradients(policy))


def test_no_rows_at_a_time_is_refused(policy: QwenVL) -> None:
    with pytest.raises(ValueError, match="micro_tokens is 0"):
        make_updater(policy, grpo(), 0)


def test_all_modules_return_to_what_decoding_needs(policy: QwenVL) -> None:
    """The tiny model has no dropout, so train mode must change no score."""
    batch = make_batch(policy)
    module: nn.Module = policy.module
    with torch.no_grad():
        scores = [
            policy.score(batch, policy.features(batch.images)) for _ in map(module.train, (True, False))
        ]
    assert torch.equal(scores[0].logprobs, scores[1].logprobs)


def test_many_images_are_encoded_in_parts(policy: QwenVL) -> None:
    """Bug: `micro_tokens` bounds the language model's memory while all images of an update go through
    the vision tower at once; or the second pass loses part of its gradient."""
    rows = [(make_prompt(policy, seed), answer(3)) for seed in range(5)]
    batch = policy.batch(rows)
    batch = dataclasses.replace(batch, advantages=torch.linspace(-1, 1, 5), old_logprobs=batch.old_logprobs)
    # 64 patches each, which count as 16 tokens.
    assert [len(part) for part in image_parts(batch.images, 40)] == [2, 2, 1]
    gradients = []
    for size in (WHOLE, 40):
        twin = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
        make_updater(twin, CrossEntropy(), size)._accumulate(batch)
        gradients.append([p.grad for p in twin.module.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= TOLERANCE * max(1.0, float(one.abs().max()))
