"""Section D, numbers at the edges: equal rewards, empty and cut answers, overflow, half precision, padding.

D1, losses and weights that are no numbers, is in test_update.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import favour, make_policy, make_prompt, score, sequences_of
from reflectvlm import ops
from reflectvlm.advantages import GroupMean, LeaveOneOut
from reflectvlm.batch import LossInputs
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.tiny import random_tiny
from reflectvlm.objectives import KL, ClippedSurrogate, CrossEntropy, dapo, dr_grpo, grpo, gspo, wants_full_kl
from reflectvlm.protocols import Advantage, Objective, Reattention
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.rewards.lift import per_rollout
from reflectvlm.rewards.reflection import brpo_rubric
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.sampling import NonFiniteLogits
from reflectvlm.train.optim import AdamW
from reflectvlm.train.precision import check_trainable_dtype
from reflectvlm.train.rl import RLTrainer
from reflectvlm.train.update import NonFinite
from reflectvlm.types import Rollout, SamplingParams, ScoredGroup, Text
from training import remainder, small_rl

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


def same(_: Rollout) -> float:
    return 0.1


def places(group: Sequence[Rollout]) -> list[float]:
    """A reward that differs although all answers are equal."""
    return [float(place) for place, _ in enumerate(group)]


def times(size: float) -> Any:
    """The same, `size` times as large."""
    return lambda group: [size * place for place in places(group)]


def weights(trainer: RLTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.policy.module.parameters()]


def unchanged(trainer: RLTrainer, before: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


def finite(trainer: RLTrainer) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in trainer.policy.module.parameters())


# -- D2 all rewards equal -------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("advantage", ADVANTAGES, ids=repr)
def test_d2_equal_rewards_move_no_weight(tmp_path: Path, advantage: Advantage, keep: bool) -> None:
    """Bug: 0.1 - mean(0.1, 0.1, 0.1) is 1e-17 and not 0; divided by a deviation of 1e-17 it is an update."""
    trainer = trainer_with(tmp_path, per_rollout(same), advantage=advantage, keep_equal_groups=keep)
    before = weights(trainer)
    result = trainer.step(0)
    assert [group.rewards for group in result.groups] == [(0.1, 0.1, 0.1)] * 2
    assert all(not advantage(group).any() for group in result.groups)
    assert ("loss" in result.metrics) == keep
    assert trainer.updates == keep
    assert unchanged(trainer, before)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_d2_equal_rewards_have_no_gradient_in_any_objective(
    tmp_path: Path, objective: ClippedSurrogate
) -> None:
    """Bug: an objective in which advantage 0 is not gradient 0. At the first update policy and reference
    agree, so a KL penalty has none either."""
    trainer = trainer_with(tmp_path, per_rollout(same), objective=objective, keep_equal_groups=True)
    before = weights(trainer)
    metrics = trainer.step(0).metrics
    assert metrics["grad_norm"] == pytest.approx(0.0, abs=1e-6)
    if objective.kl is None:
        assert metrics["grad_norm"] == 0.0
        assert unchanged(trainer, before)


def test_d2_equal_rewards_decay_as_declared_and_no_more(tmp_path: Path) -> None:
    """Bug: a group that teaches nothing moves weights by more than lr * weight_decay * weight."""
    trainer = trainer_with(
        tmp_path, per_rollout(same), keep_equal_groups=True, optimizer=AdamW(lr=1e-3, weight_decay=0.5)
    )
    before = weights(trainer)
    trainer.step(0)
    wanted = [weight * (1 - 1e-3 * 0.5) for weight in before]
    assert not unchanged(trainer, before)
    assert unchanged(trainer, wanted)


def test_d2_the_penalty_alone_pulls_towards_the_reference(tmp_path: Path) -> None:
    """Bug: groups without a signal are kept for their KL term, which then is not taken."""
    trainer = trainer_with(
        tmp_path,
        per_rollout(same),
        objective=ClippedSurrogate(reduce="token_mean", kl=KL(1.0)),
        keep_equal_groups=True,
        epochs_per_step=8,
    )
    trainer.prepare()
    with torch.no_grad():
        trainer.policy.model.lm_head.weight[100:600] *= 1.5
    groups = trainer.sample_groups(0)
    distances = []
    for step in range(2):
        distances.append(trainer.update(groups, step)["kl"])
    assert 0 < distances[1] < 0.9 * distances[0]


def test_d2_equal_rewards_under_brpo(tmp_path: Path) -> None:
    """Bug: a random policy, whose answers are all wrong in the same way, is moved by BRPO."""
    given = brpo_rubric(none=0.0, clip=(0.0, 1.0))
    for keep in (False, True):
        trainer = trainer_with(
            tmp_path,
            per_rollout(same),
            rubric=given,
            objective=dataclasses.replace(BRPO, kl=None),
            keep_equal_groups=keep,
        )
        before = weights(trainer)
        groups = trainer.step(0).groups
        assert [group.rewards for group in groups] == [(0.0, 0.0, 0.0)] * 2
        assert all(all(group.scored) for group in groups)
        assert unchanged(trainer, before)


# -- D3 groups of one, empty and cut answers ------------------------------------------------------


def test_d3_a_group_of_one_is_refused(tmp_path: Path) -> None:
    """Bug: a run of days whose only advantage is 0."""
    with pytest.raises(ValueError, match=r"group_size is 1: its only advantage is 0.*Use 2 or more"):
        small_rl(tmp_path, group_size=1)


@pytest.mark.parametrize("advantage", ADVANTAGES, ids=repr)
def test_d3_a_group_with_one_scored_rollout_teaches_nothing(tmp_path: Path, advantage: Advantage) -> None:
    """Bug: the deviation of one number, 0 / 0, is NaN; n / (n - 1) is 1 / 0."""

    def first_only(group: Sequence[Rollout]) -> list[float | None]:
        return [1.0, *[None] * (len(group) - 1)]

    for keep in (False, True):
        trainer = trainer_with(tmp_path, first_only, advantage=advantage, keep_equal_groups=keep)
        before = weights(trainer)
        result = trainer.step(0)
        assert result.metrics["unscored"] == pytest.approx(2 / 3)
        assert all(advantage(group).tolist() == [0.0] * 3 for group in result.groups)
        assert unchanged(trainer, before)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_d3_answers_that_end_at_once(tmp_path: Path, objective: ClippedSurrogate) -> None:
    """Bug: an answer without text has no token to divide by. Its one token is the end of its turn."""
    policy = random_tiny()
    trainer = trainer_with(tmp_path, places, policy=policy, objective=objective, drop_truncated=True)
    ended = policy.end_ids[0]

    def at_once(prompts: Any, seed: int, *_: Any) -> Any:
        groups = RLTrainer.rollouts(trainer, prompts, seed)
        prompt_groups = []
        for group in groups:
            spans = (Text(ids=(ended,), trained=True, logprobs=(-7.0,)),)
            changed = {"spans": spans, "text": "", "stop": "eos", "offsets": ()}
            prompt_groups.append(tuple(dataclasses.replace(rollout, **changed) for rollout in group))
        return prompt_groups

    trainer.rollouts = at_once  # type: ignore[method-assign]
    result = trainer.step(0)
    assert trainer.updates == 1
    assert trainer.batch(result.groups).num_tokens == 6
    assert math.isfinite(result.metrics["loss"])
    assert math.isfinite(result.metrics["grad_norm"])
    assert finite(trainer)


def test_d3_all_truncated_moves_no_weight(tmp_path: Path) -> None:
    """Bug: overlong filtering that leaves nothing divides by it, or moves weights by decay alone."""
    for keep in (False, True):
        trainer = trainer_with(
            tmp_path,
            per_rollout(remainder),
            drop_truncated=True,
            keep_equal_groups=keep,
            sampling=SamplingParams(max_tokens=2),
            optimizer=AdamW(lr=1e-3, weight_decay=0.5),
        )
        before = weights(trainer)
        result = trainer.step(0)
        assert result.metrics["truncated"] == 1.0
        assert result.metrics["unscored"] == 1.0
        assert "loss" not in result.metrics
        assert trainer.updates == 0
        assert unchanged(trainer, before)


@pytest.mark.parametrize("objective", [*OBJECTIVES, CrossEntropy()], ids=repr)
def test_d3_rows_without_a_trained_token(tmp_path: Path, objective: Objective) -> None:
    """Bug: 0 / 0 in a row's mean; a micro-batch without a gradient path ends the backward pass. Here
    masked rows are micro-batches of their own, and all of the batch."""
    trainer = trainer_with(tmp_path, places, objective=objective, micro_tokens=1)
    batch = trainer.batch(trainer.sample_groups(0))
    ref = None if getattr(objective, "kl", None) is None else batch.old_logprobs
    batch = dataclasses.replace(batch, ref_logprobs=ref)
    mask = batch.trained.clone()
    mask[2:4] = False
    some = dataclasses.replace(batch, trained=mask, num_tokens=float(mask.sum()))
    metrics = trainer.updater(some, 1e-3)
    assert math.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0
    assert finite(trainer)

    plain = trainer_with(tmp_path, places, objective=objective)
    before = weights(plain)
    nothing = dataclasses.replace(batch, trained=torch.zeros_like(mask), num_tokens=0.0)
    metrics = plain.updater(nothing, 1e-3)
    assert (metrics["loss"], metrics["grad_norm"]) == (0.0, 0.0)
    assert unchanged(plain, before)


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
