"""Sections D4 to D6, numbers at the edges: overflow, half precision, padding.

D1, losses and weights that are no numbers, is in test_reliability_d_nonfinite.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edges import ADVANTAGES, BRPO, OBJECTIVES, finite, places, trainer_with, unchanged, weights
from fixtures import favour, make_policy, make_prompt, score, sequences_of
from reflectvlm import ops
from reflectvlm.advantages import GroupMean
from reflectvlm.batch import LossInputs
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.tiny import random_tiny
from reflectvlm.objectives import ClippedSurrogate, CrossEntropy, grpo, gspo, wants_full_kl
from reflectvlm.protocols import Advantage, Objective, Reattention
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.rewards.lift import per_rollout
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.sampling import NonFiniteLogits
from reflectvlm.train.precision import check_trainable_dtype
from reflectvlm.train.update import NonFinite
from reflectvlm.types import Rollout, SamplingParams, ScoredGroup, Text
from training import remainder


def times(size: float) -> Any:
    """`places`, `size` times as large."""
    return lambda group: [size * place for place in places(group)]


# -- D4 overflow ----------------------------------------------------------------------------------

EXTREMES = (-1e4, -200.0, -1.0, 0.0)


@pytest.mark.parametrize("objective", [*OBJECTIVES, CrossEntropy()], ids=repr)
def test_d4_extreme_log_probs_stay_finite(objective: Objective) -> None:
    """Bug: exp(1e4) = inf; inf * 0 = NaN where the advantage is 0; a gradient of inf behind a finite loss.
    All combinations of the policy's, the behaviour's and the reference's log-prob."""
    for advantage in (1.0, -1.0, 0.0, 1e6, -1e6):
        for now, old, ref in itertools.product(EXTREMES, repeat=3):
            logprobs = torch.tensor([[now, -1.0]], requires_grad=True)
            outputs = objective(
                LossInputs(
                    logprobs=logprobs,
                    old_logprobs=torch.tensor([[old, -1.0]]),
                    ref_logprobs=torch.tensor([[ref, -1.0]]),
                    entropy=torch.zeros(1, 2),
                    advantages=torch.tensor([advantage]),
                    mask=torch.tensor([[True, True]]),
                    num_tokens=2.0,
                    num_sequences=1.0,
                    kl=logprobs.detach().abs() if wants_full_kl(objective) else None,
                )
            )
            (gradient,) = torch.autograd.grad(outputs.loss, logprobs)
            assert outputs.loss.isfinite()
            assert gradient.isfinite().all()
            assert all(value.isfinite() for value in (*outputs.metrics.values(), *outputs.peaks.values()))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("behaviour", [-1e4, 0.0])
def test_d4_a_step_on_extreme_behaviour_log_probs(
    tmp_path: Path, objective: ClippedSurrogate, behaviour: float
) -> None:
    """Bug: one token that the behaviour policy called impossible (or certain) spoils all weights."""
    trainer = trainer_with(tmp_path, places, objective=objective)
    groups = [
        dataclasses.replace(group, rollouts=tuple(said(rollout, behaviour) for rollout in group.rollouts))
        for group in trainer.sample_groups(0)
    ]
    metrics = trainer.update(groups, 0)
    assert all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm", "ratio", "ratio_gap"))
    assert finite(trainer)


def said(rollout: Rollout, logprob: float) -> Rollout:
    """The rollout with another behaviour log-prob for its first token."""
    first, *others = rollout.spans
    assert isinstance(first, Text)
    changed = dataclasses.replace(first, logprobs=(logprob, *first.logprobs[1:]))
    return dataclasses.replace(rollout, spans=(changed, *others))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_d4_a_policy_whose_own_log_probs_overflow(tmp_path: Path, objective: ClippedSurrogate) -> None:
    """Bug: logits of thousands, as after a step too large, make NaN where they need not."""
    trainer = trainer_with(tmp_path, places, objective=objective)
    groups = trainer.sample_groups(0)
    trainer.prepare()
    with torch.no_grad():
        trainer.policy.model.lm_head.weight *= 3000
    batch = trainer.batch(groups)
    scores = score(trainer.policy, [(r.prompt, r.spans) for g in groups for r in g.rollouts])
    assert scores.logprobs.min() < -1e4
    assert scores.logprobs.isfinite().all()
    assert scores.entropy.isfinite().all()
    metrics = trainer.updater(batch, 1e-3)
    assert all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm", "ratio_gap", "entropy"))
    assert finite(trainer)


@settings(deadline=None, max_examples=200)
@given(now=st.floats(-40, 0, width=32), old=st.floats(-40, 0, width=32))
def test_d4_below_the_bound_the_ratio_is_exact(now: float, old: float) -> None:
    """Bug: a bound that touches ordinary ratios changes what is learned; one that is not there is inf."""
    one, other = torch.tensor([now]), torch.tensor([old])
    plain = one - other
    bounded = ops.log_ratio(one, other)
    if plain.item() <= ops.LOG_RATIO_LIMIT:
        assert torch.equal(bounded, plain)
        assert torch.equal(ops.kl_k3(other, one), torch.expm1(plain) - plain)
    else:
        assert bounded.item() == ops.LOG_RATIO_LIMIT


def test_d4_extreme_advantages(tmp_path: Path) -> None:
    """Bug: a reward of 1e6 makes an update of 1e6; one of 4e29 makes NaN weights. The norm of the gradient
    is bounded, and where it is no number the weights stay as they were."""
    for size, harmless in ((1e6, True), (4e29, False)):
        trainer = trainer_with(tmp_path, times(size), advantage=GroupMean(scale="none"))
        before = weights(trainer)
        if harmless:
            assert trainer.step(0).metrics["grad_norm"] > 1e5
            assert finite(trainer)
            # One step of AdamW moves no weight by more than lr * 1 / sqrt(1 - beta2) * (1 - beta1) = 3.2 lr.
            moved = [float((a - b).abs().max()) for a, b in zip(before, weights(trainer), strict=True)]
            assert max(moved) < 3.3e-3
        else:
            with pytest.raises(NonFinite, match="not finite"):
                trainer.step(0)
            assert unchanged(trainer, before)


@pytest.mark.parametrize("advantage", ADVANTAGES, ids=repr)
def test_d4_rewards_beyond_the_range_of_floats_are_refused(tmp_path: Path, advantage: Advantage) -> None:
    """Bug: the deviation of (0, 1e200, 2e200) is infinite, every advantage 0, and nothing says so."""
    huge = trainer_with(tmp_path, times(1e200), advantage=advantage)
    before = weights(huge)
    assert huge.step(0).metrics["unscored"] > 0  # the rubric says so, and leaves them out
    assert unchanged(huge, before)
    (group,) = huge.rubric.score([huge.rollouts(huge.next_prompts(1), 0)[0]])
    rewards = (0.0, *(1e200 for _ in group.rewards[1:]))
    forced = dataclasses.replace(group, rewards=rewards, scored=(True,) * len(rewards))
    with pytest.raises(
        ValueError, match=r"'digits-train-\d+' has the reward 1e\+200.*scale or bound the reward"
    ):
        advantage(forced)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 100.0])
def test_d4_extreme_temperatures(tmp_path: Path, temperature: float) -> None:
    """Bug: logits divided by 1e-6 are 1e7, whose exponential is not finite."""
    trainer = trainer_with(
        tmp_path, places, sampling=SamplingParams(max_tokens=4, temperature=temperature, top_p=0.9, top_k=5)
    )
    metrics = trainer.step(0).metrics
    assert math.isfinite(metrics["loss"])
    assert finite(trainer)


@pytest.mark.parametrize(
    "cut", [{}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}], ids=repr
)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_d4_logits_that_are_no_numbers_are_named(broken: float, cut: dict[str, Any]) -> None:
    """Bug: NaN logits draw token 0 for ever, or end in an assertion of the GPU. The row, the rollout of its
    group and the token are named; rows before it in the batch are not blamed."""
    policy = random_tiny()
    prompts = [make_prompt(policy, seed) for seed in range(3)]
    inner, calls = QwenVL.logits, itertools.count()

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        made = inner(policy, hidden).index_fill(1, torch.tensor(policy.end_ids), -1e9)
        if next(calls) == 4:
            made[5] = (
                torch.full_like(made[5], broken)
                if broken < 0
                else made[5].index_fill(0, torch.tensor(9), broken)
            )
        return made

    vars(policy)["logits"] = logits
    with pytest.raises(NonFiniteLogits, match=r"Row 'sample-1', rollout 2 of its group, token 5") as caught:
        InProcessEngine(policy=policy).generate(
            prompts, 3, SamplingParams(max_tokens=9, **cut), Implicit(), seed=0
        )
    assert (caught.value.sample, caught.value.member, caught.value.token) == ("sample-1", 2, 5)
    del vars(policy)["logits"]
    assert InProcessEngine(policy=policy).generate(
        prompts, 1, SamplingParams(max_tokens=2), Implicit(), seed=0
    )


def test_d4_a_temperature_that_overflows_is_named(tmp_path: Path) -> None:
    """Bug: logits / 1e-40 are infinite, and what is drawn is garbage."""
    trainer = trainer_with(tmp_path, places, sampling=SamplingParams(max_tokens=4, temperature=1e-40))
    with pytest.raises(NonFiniteLogits, match=r"divided by sampling\.temperature=1e-40"):
        trainer.step(0)


# -- D5 half precision ----------------------------------------------------------------------------


def in_dtype(dtype: str, compute: str | None) -> QwenVL:
    policy = dataclasses.replace(random_tiny(), compute=compute)  # type: ignore[arg-type]
    policy.model.to(getattr(torch, dtype))
    return policy


@pytest.mark.parametrize(("dtype", "compute"), [("float32", "bfloat16"), ("bfloat16", None)])
@pytest.mark.parametrize("objective", [grpo(), gspo(), BRPO], ids=repr)
def test_d5_a_step_in_bfloat16(
    tmp_path: Path, dtype: str, compute: str | None, objective: ClippedSurrogate
) -> None:
    """Bug: a loss or a softmax in bfloat16, of which 1e-2 is lost; a gradient that overflows."""
    policy = in_dtype(dtype, compute)
    trainer = trainer_with(tmp_path, places, policy=policy, objective=objective)
    groups = trainer.sample_groups(0)
    batch = trainer.batch(groups)
    assert batch.old_logprobs.dtype == torch.float32
    assert batch.ref_logprobs is None or batch.ref_logprobs.dtype == torch.float32
    assert score(policy, sequences_of([g.rollouts for g in groups])).logprobs.dtype == torch.float32
    before = weights(trainer)
    for _ in range(2):
        metrics = trainer.update(groups, 0)
        assert all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm", "entropy"))
    assert finite(trainer)
    assert not unchanged(trainer, before)


@pytest.mark.parametrize(("dtype", "compute"), [("float32", "float16"), ("float16", None)])
def test_d5_float16_answers(dtype: str, compute: str | None) -> None:
    """Bug: a float16 policy that cannot even answer, or whose log-probs are float16."""
    policy = in_dtype(dtype, compute)
    (group,) = InProcessEngine(policy=policy).generate(
        [make_prompt(policy)], 3, SamplingParams(max_tokens=8), VisualCopy(trigger="a"), seed=1
    )
    made = score(policy, sequences_of([group])).logprobs
    assert made.dtype == torch.float32
    assert made.isfinite().all()
    assert all(math.isfinite(x) for r in group for s in r.spans if isinstance(s, Text) for x in s.logprobs)


def test_d5_float16_is_not_trained(tmp_path: Path) -> None:
    """Bug: the first step of AdamW in float16 is 0 / 0 and every weight NaN; gradients that vanish under
    float16 compute without loss scaling leave a run that learns nothing."""
    for policy, message in (
        (in_dtype("float16", None), r"is float16, in which an optimiser's step is 0 divided by 0"),
        (in_dtype("float32", "float16"), r"policy\.compute is float16.*Train with policy\.compute=bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            check_trainable_dtype(policy.module, policy.compute)
        with pytest.raises(ValueError, match=message):
            _ = trainer_with(tmp_path, places, policy=policy).updater
    frozen = in_dtype("float16", None)
    frozen.module.requires_grad_(False)
    check_trainable_dtype(frozen.module, frozen.compute)
    check_trainable_dtype(random_tiny().module, "bfloat16")


# -- D6 padding and company -----------------------------------------------------------------------

SPECIAL = "<|box_start|>"
REATTENTIONS: dict[str, Reattention] = {
    "implicit": Implicit(),
    "copy": VisualCopy(trigger=SPECIAL),
    "copy, plain": VisualCopy(trigger="a"),
    "route": VisualRoute(trigger=SPECIAL, m=40),
}


@functools.cache
def exact() -> QwenVL:
    return favour(make_policy(dtype=torch.float64), [SPECIAL], 4)


@pytest.mark.parametrize("name", REATTENTIONS)
def test_d6_padding_and_company_change_no_log_prob(name: str) -> None:
    """Bug: padding that is attended to, positions that count it, a neighbour's image. Each row alone,
    against batches of any order, padded on either side, with and without shared prompts."""
    policy = exact()
    prompts = [
        make_prompt(policy, 0),
        make_prompt(policy, 1, "Is <image> above <image> or not?", ((64, 48), (32, 80))),
        make_prompt(policy, 2, "One?", ()),
    ]
    groups = InProcessEngine(policy=policy).generate(
        prompts, 3, SamplingParams(max_tokens=14), REATTENTIONS[name], seed=1
    )
    rows = sequences_of(groups)
    assert name == "implicit" or any(rollout.insertions for group in groups for rollout in group)
    alone = [score(policy, [row]).logprobs for row in rows]
    own = [one[one != 0] for one in alone]
    assert len({len(one) for one in own}) > 1 or len({one.shape[1] for one in alone}) > 1
    for side, share in itertools.product(("right", "left"), (True, False)):
        other = dataclasses.replace(policy, padding_side=side, share_prefix=share)  # type: ignore[arg-type]
        for order in (list(range(9)), list(range(8, -1, -1)), [4, 0], [8, 1, 4, 7]):
            batch = other.batch([rows[i] for i in order])
            made = score(other, [rows[i] for i in order]).logprobs
            for place, i in enumerate(order):
                got = made[place][batch.trained[place]]
                assert (got - own[i]).abs().max() < 1e-5
                behaviour = batch.old_logprobs[place][batch.trained[place]]
                assert (got - behaviour).abs().max() < 1e-5


@pytest.mark.parametrize("name", REATTENTIONS)
def test_d6_company_changes_no_rollout(name: str) -> None:
    """Bug: log-probs that depend on which rows happen to be decoded together."""
    policy = exact()
    prompts = [make_prompt(policy, seed, sizes=((64, 48),) * seed) for seed in range(3)]
    wanted: list[tuple[Rollout, ...]] | None = None
    for rows in (9, 3):
        groups = InProcessEngine(policy=policy, max_rows=rows).generate(
            prompts, 3, SamplingParams(max_tokens=14), REATTENTIONS[name], seed=1
        )
        wanted = wanted or groups
        for one, other in zip(itertools.chain(*wanted), itertools.chain(*groups), strict=True):
            assert [type(span) for span in one.spans] == [type(span) for span in other.spans]
            assert one.sampled_ids == other.sampled_ids
            assert one.insertions == other.insertions
            assert logprobs_of(other) == pytest.approx(logprobs_of(one), abs=1e-5)


def logprobs_of(rollout: Rollout) -> list[float]:
    return [x for span in rollout.spans if isinstance(span, Text) for x in span.logprobs]


def test_d6_a_scored_group_is_the_same_in_any_company(tmp_path: Path) -> None:
    """Bug: a group's gradient that depends on how rows are cut into micro-batches."""
    gradients = []
    for tokens in (1, 300, 16384):
        trainer = trainer_with(tmp_path, per_rollout(remainder), policy=exact_copy(), micro_tokens=tokens)
        groups: list[ScoredGroup] = trainer.sample_groups(0)
        trainer.updater(trainer.batch(groups), 0.0)
        gradients.append([p.grad.clone() for p in trainer.policy.module.parameters() if p.grad is not None])
    for others in gradients[1:]:
        for one, other in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def exact_copy() -> QwenVL:
    return favour(make_policy(gain=1.0, dtype=torch.float64), [SPECIAL], 4)
