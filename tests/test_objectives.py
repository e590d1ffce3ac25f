"""Objectives: numbers by hand, the same total however a batch is split, and finite at the extremes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reflectvlm.batch import LossInputs
from reflectvlm.objectives import KL, ClippedSurrogate, CrossEntropy, dapo, dr_grpo, grpo, gspo, wants_full_kl
from reflectvlm.protocols import Objective


def by_hand(**changes: Any) -> LossInputs:
    """Two rows of three tokens, the last one not trained. Ratios and advantages:

    row 0, A = +1:  1.5   0.5   1.0
    row 1, A = -1:  4.0   0.5   (none)
    """
    ratios = torch.tensor([[1.5, 0.5, 1.0], [4.0, 0.5, 1.0]], dtype=torch.float64)
    old = torch.full_like(ratios, -2.0)
    inputs = LossInputs(
        logprobs=old + ratios.log(),
        old_logprobs=old,
        ref_logprobs=None,
        entropy=torch.full_like(ratios, 0.5),
        advantages=torch.tensor([1.0, -1.0], dtype=torch.float64),
        mask=torch.tensor([[True, True, True], [True, True, False]]),
        num_tokens=5.0,
        num_sequences=2.0,
    )
    return dataclasses.replace(inputs, **changes)


def with_reference(inputs: LossInputs) -> LossInputs:
    """The reference gives every token twice the policy's probability: k3 = 2 - 1 - log 2 = 0.306853,
    k2 = (log 2)^2 / 2 = 0.240227."""
    return dataclasses.replace(inputs, ref_logprobs=inputs.logprobs.detach() + math.log(2))


# Gains at clip 0.2 / 0.2, min(w A, clip(w) A):
#   row 0: min(1.5, 1.2) = 1.2,  min(0.5, 0.8) = 0.5,  1.0          sum  2.7
#   row 1: min(-4, -1.2) = -4,   min(-0.5, -0.8) = -0.8             sum -4.8
HAND = [
    # mean of the rows' means: -(2.7 / 3 - 4.8 / 2) / 2
    (grpo(), 0.75),
    # -(2.7 - 4.8) / (2 rows * 10)
    (dr_grpo(max_tokens=10), 0.105),
    # upper clip 0.28: row 0 sums to 1.28 + 0.5 + 1 = 2.78;  -(2.78 - 4.8) / 5
    (dapo(), 0.404),
    (ClippedSurrogate(reduce="token_mean"), 0.42),
    # clip 0.1 / 0.4: row 0 is 1.4 + 0.5 + 1 = 2.9, row 1 is -4 - 0.9 = -4.9;  -(2.9 / 3 - 4.9 / 2) / 2
    (ClippedSurrogate(clip_low=0.1, clip_high=0.4), 0.741667),
    # dual clip 3: the -4 becomes -3;  -(2.7 - 3.8) / 5
    (ClippedSurrogate(reduce="token_mean", dual_clip=3.0), 0.22),
    # row ratios (1.5 * 0.5 * 1)^(1/3) = 0.908560 and (4 * 0.5)^(1/2) = 1.414214:
    # min(0.908560, 0.9997) = 0.908560, min(-1.414214, -1.0004) = -1.414214;  -(0.908560 - 1.414214) / 2
    (gspo(), 0.252827),
]


@pytest.mark.parametrize(("objective", "expected"), HAND)
def test_losses_by_hand(objective: ClippedSurrogate, expected: float) -> None:
    """Bug: a wrong clip side, a wrong denominator, a masked token that counts."""
    assert objective(by_hand()).loss.item() == pytest.approx(expected, abs=1e-6)


def test_sequence_clip_by_hand() -> None:
    """Bug: GSPO's clip on token ratios, or not at all."""
    # advantages turned round: min(-0.908560, -0.9997) = -0.9997, min(1.414214, 1.0004) = 1.0004
    turned = by_hand(advantages=torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert gspo()(turned).loss.item() == pytest.approx(-(1.0004 - 0.9997) / 2, abs=1e-9)


@pytest.mark.parametrize(
    ("objective", "without"),
    [(grpo(kl=KL(0.1)), 0.75), (dapo(kl=KL(0.1)), 0.404), (gspo(kl=KL(0.1)), 0.252827)],
)
def test_the_penalty_is_added_per_token_and_reduced_like_the_loss(
    objective: ClippedSurrogate, without: float
) -> None:
    """Bug: a penalty with a denominator of its own."""
    # every trained token pays 0.1 * 0.306853, so every kind of mean pays it too
    assert objective(with_reference(by_hand())).loss.item() == pytest.approx(without + 0.0306853, abs=1e-6)


def test_the_penalty_under_a_constant_denominator_and_with_k2() -> None:
    """Bug: "k2" that is ignored, a constant that forgets the penalty."""
    inputs = with_reference(by_hand())
    # 5 tokens * 0.1 * 0.306853 / (2 * 10)
    assert dr_grpo(max_tokens=10, kl=KL(0.1))(inputs).loss.item() == pytest.approx(0.105 + 0.00767132)
    assert dapo(kl=KL(0.1, "k2"))(inputs).loss.item() == pytest.approx(0.404 + 0.0240227, abs=1e-6)


def test_the_exact_penalty_by_hand() -> None:
    """Bug: "full" that estimates from log-probs all the same, or reports its estimate instead."""
    exact = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.7, 9.0]], dtype=torch.float64, requires_grad=True)
    inputs = with_reference(by_hand(kl=exact))
    # trained: 0.1 + 0.2 + 0.3 + 0.5 + 0.7 = 1.8 over 5 tokens
    outputs = dapo(kl=KL(0.1, "full"))(inputs)
    assert outputs.loss.item() == pytest.approx(0.404 + 0.1 * 1.8 / 5)
    assert outputs.metrics["kl"].item() == pytest.approx(1.8 / 5)
    assert not outputs.metrics["kl"].requires_grad
    outputs.loss.backward()
    assert exact.grad is not None
    assert exact.grad.flatten().tolist() == pytest.approx([0.02] * 5 + [0.0])
    # rows' means: (0.2 + 0.6) / 2
    assert grpo(kl=KL(0.1, "full"))(inputs).loss.item() == pytest.approx(0.75 + 0.1 * 0.4)


def test_the_metric_is_exact_where_that_is_known() -> None:
    """Bug: the estimate in place of the exact KL, or one of them only if the loss penalises it."""
    assert dapo()(with_reference(by_hand())).metrics["kl"].item() == pytest.approx(1 - math.log(2))
    exact = torch.full((2, 3), 0.4, dtype=torch.float64)
    assert dapo()(with_reference(by_hand(kl=exact))).metrics["kl"].item() == pytest.approx(0.4)
    assert "kl" not in dapo()(by_hand()).metrics


def test_which_objectives_need_the_exact_kl() -> None:
    """Bug: a trainer that computes reference log-probs nobody reads, or none where they are needed."""
    wanted = [wants_full_kl(one) for one in (grpo(kl=KL(0.1, "full")), grpo(kl=KL()), grpo(), CrossEntropy())]
    assert wanted == [True, False, False, False]


def test_cross_entropy_by_hand() -> None:
    """Bug: a mean over the micro-batch's tokens, so that short rows weigh more."""
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -math.inf]])
    # (1 + 2 + 3 + 4 + 5) / 30 tokens of the whole update
    outputs = CrossEntropy()(by_hand(logprobs=logprobs, num_tokens=30.0))
    assert outputs.loss.item() == pytest.approx(0.5)
    # 5 tokens here with entropy 0.5: 2.5 / 30
    assert outputs.metrics["entropy"].item() == pytest.approx(2.5 / 30)


def test_metrics_by_hand() -> None:
    """Bug: a metric that averages over padding, or carries a gradient and keeps the graph alive."""
    inputs = with_reference(by_hand())
    inputs = dataclasses.replace(inputs, logprobs=inputs.logprobs.requires_grad_())
    outputs = ClippedSurrogate(dual_clip=3.0, kl=KL(0.1, "k2"))(inputs)
    values = {name: value.item() for name, value in outputs.metrics.items()}
    assert values == pytest.approx(
        {
            "kl": 1 - math.log(2),  # always the k3 value
            "entropy": 0.5,
            "ratio": 7.5 / 5,
            "clip_fraction": 3 / 5,  # 1.5 with A > 0, 0.5 with A < 0, 4.0 beyond the dual clip
        }
    )
    assert {name: peak.item() for name, peak in outputs.peaks.items()} == pytest.approx({"ratio_gap": 3.0})
    assert not any(v.requires_grad for v in (*outputs.metrics.values(), *outputs.peaks.values()))
    plain = ClippedSurrogate()(by_hand()).metrics
    assert "kl" not in plain
    assert plain["clip_fraction"].item() == pytest.approx(2 / 5)  # without a dual clip 4.0 passes


def test_clipped_tokens_have_no_gradient() -> None:
    """Bug: a clip that changes the loss but not the update, or a dual clip on the wrong sign."""
    inputs = by_hand()
    inputs = dataclasses.replace(inputs, logprobs=inputs.logprobs.requires_grad_())
    ClippedSurrogate(reduce="token_mean", dual_clip=3.0)(inputs).loss.backward()
    # d loss / d log p = -A w / 5 where no bound holds: row 0 at 0.5 and 1.0, nowhere in row 1
    expected = torch.tensor([[0.0, -0.1, -0.2], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(inputs.logprobs.grad, expected)


OBJECTIVES: list[Objective] = [
    grpo(kl=KL(0.1)),
    dr_grpo(max_tokens=7),
    dapo(kl=KL(0.1, "k2")),
    gspo(kl=KL(0.1, "full")),
    ClippedSurrogate(dual_clip=2.0, ratio="sequence", reduce="token_mean"),
    CrossEntropy(),
]


def random_inputs(rows: int, columns: int, seed: int, full: bool = False) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -noise(rows, columns).abs()
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    return LossInputs(
        logprobs=(old + 0.3 * noise(rows, columns)).requires_grad_(),
        old_logprobs=old,
        ref_logprobs=old + 0.3 * noise(rows, columns),
        entropy=noise(rows, columns).abs(),
        advantages=noise(rows),
        mask=mask,
        num_tokens=float(mask.sum()),
        num_sequences=float(rows),
        kl=noise(rows, columns).abs() if full else None,
    )


def part(inputs: LossInputs, rows: list[int]) -> LossInputs:
    cut = {
        field.name: value[rows]
        for field in dataclasses.fields(inputs)
        if isinstance(value := getattr(inputs, field.name), Tensor)
    }
    return dataclasses.replace(inputs, **cut)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@settings(deadline=None, max_examples=25)
@given(places=st.lists(st.integers(0, 3), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_losses_gradients_and_metrics_of_any_split_add_up(
    objective: Objective, places: list[int], seed: int
) -> None:
    """Bug: any mean over a micro-batch: accumulation and data parallelism then change the update."""
    inputs = random_inputs(len(places), 4, seed, wants_full_kl(objective))
    whole = objective(inputs)
    (whole_gradient,) = torch.autograd.grad(whole.loss, inputs.logprobs)
    parts = [
        objective(part(inputs, [row for row, place in enumerate(places) if place == wanted]))
        for wanted in sorted(set(places))
    ]
    (gradient,) = torch.autograd.grad(sum(p.loss for p in parts), inputs.logprobs)  # type: ignore[arg-type]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    torch.testing.assert_close(gradient, whole_gradient)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(p.metrics[name] for p in parts), value)
    for name, value in whole.peaks.items():
        torch.testing.assert_close(max(p.peaks[name] for p in parts), value)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_an_empty_mask_gives_zero_with_a_gradient_path(objective: Objective) -> None:
    """Bug: a rank or an update without trained tokens makes NaN, or skips its collectives."""
    inputs = random_inputs(2, 3, seed=0, full=wants_full_kl(objective))
    nothing = torch.zeros_like(inputs.mask)
    outputs = objective(dataclasses.replace(inputs, mask=nothing, num_tokens=0.0, num_sequences=0.0))
    (gradient,) = torch.autograd.grad(outputs.loss, inputs.logprobs)
    assert outputs.loss.item() == 0.0
    assert gradient.abs().sum() == 0
    assert all(value.item() == 0.0 for value in (*outputs.metrics.values(), *outputs.peaks.values()))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_not_trained_reaches_neither_loss_nor_gradient(objective: Objective, garbage: float) -> None:
    """Bug: 0 * inf in the backward pass at a padded token."""
    clean = random_inputs(3, 4, seed=1, full=wants_full_kl(objective))

    def spoiled(tensor: Tensor) -> Tensor:
        return tensor.detach().masked_fill(~clean.mask, garbage)

    assert clean.ref_logprobs is not None
    dirty = dataclasses.replace(
        clean,
        logprobs=spoiled(clean.logprobs).requires_grad_(),
        old_logprobs=spoiled(clean.old_logprobs),
        ref_logprobs=spoiled(clean.ref_logprobs),
        entropy=spoiled(clean.entropy),
        kl=None if clean.kl is None else spoiled(clean.kl),
    )
    first, second = objective(clean), objective(dirty)
    torch.testing.assert_close(second.loss, first.loss)
    torch.testing.assert_close(
        torch.autograd.grad(second.loss, dirty.logprobs), torch.autograd.grad(first.loss, clean.logprobs)
    )
    torch.testing.assert_close(dict(second.metrics), dict(first.metrics))


def test_first_update_has_the_policy_gradient() -> None:
    """Bug: a surrogate whose first step is not the policy gradient -A / num_tokens."""
    inputs = random_inputs(2, 3, seed=2)
    inputs = dataclasses.replace(inputs, old_logprobs=inputs.logprobs.detach())
    (gradient,) = torch.autograd.grad(dapo()(inputs).loss, inputs.logprobs)
    expected = -inputs.advantages[:, None] * inputs.mask / inputs.num_tokens
    torch.testing.assert_close(gradient, expected)


def test_a_penalty_without_a_reference_is_refused() -> None:
    """Bug: a penalty silently left out because nobody computed reference log-probs."""
    with pytest.raises(
        ValueError, match=r"ref_logprobs is None, but the objective has a KL penalty.*kl=None"
    ):
        grpo(kl=KL(0.1))(by_hand())
    with pytest.raises(ValueError, match=r"kl is None, but .*KL\(estimator='full'\).*estimator='k3'"):
        grpo(kl=KL(0.1, "full"))(with_reference(by_hand()))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked, as in a user's run: the library's own message must come through."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"clip_low": 0.0}, r"clip_low is 0\.0\. .* value in \(0, 1\]"),
        ({"clip_low": 1.5}, r"clip_low is 1\.5\."),
        ({"clip_high": -0.1}, r"clip_high is -0\.1\. .* above 0"),
        ({"clip_high": math.inf}, "clip_high is inf"),
        ({"dual_clip": 1.1}, r"dual_clip is 1\.1\. .* above 1 \+ clip_high = 1\.2"),
        ({"ratio": "row"}, r"ratio is 'row'\. It must be 'token' or 'sequence'"),
        ({"reduce": "mean"}, r"reduce is 'mean'\. It must be 'sequence_mean', 'token_mean' or 'constant'"),
        ({"reduce": "constant"}, "constant is None with reduce='constant'.*SamplingParams.max_tokens"),
        ({"reduce": "constant", "constant": 0}, "constant is 0 with reduce='constant'"),
        ({"constant": 5}, "constant is 5 with reduce='sequence_mean', which does not use it"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_surrogate_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    """Bug: a recipe's typo that trains something else."""
    with pytest.raises(ValueError, match=message):
        ClippedSurrogate(**setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"coefficient": 0.0}, r"KL.coefficient is 0\.0\. .* use kl=None"),
        ({"coefficient": math.nan}, "KL.coefficient is nan"),
        ({"estimator": "k1"}, "KL.estimator is 'k1'. It must be 'k2' .* expected gradient 0"),
        ({"estimator": "k4"}, "KL.estimator is 'k4'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_penalties_are_refused(setting: dict[str, Any], message: str) -> None:
    """Bug: k1 as a loss, which pulls nowhere and only adds noise."""
    with pytest.raises(ValueError, match=message):
        KL(**setting)
