"""The exact KL in an update: equal to plain autograd through all logits, however the update is computed."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import make_policy, make_prompt, score_batch
from reflectvlm import ops
from reflectvlm.batch import Batch
from reflectvlm.models import qwen_vl
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.objectives import KL, ClippedSurrogate, grpo
from reflectvlm.train.budget import passes
from reflectvlm.train.reference_sync import ReferenceSync
from reflectvlm.train.rl import RLTrainer
from reflectvlm.train.runtime import Runtime
from reflectvlm.train.update import Updater, score_without_grad
from reflectvlm.types import Prompt, Spans, Text, Visual
from training import crashed, logged, same_runs, small_brpo_copy, small_rl

TEMPERATURE, COEFFICIENT, CLIP = 0.8, 0.5, 0.2
FULL = grpo(clip=CLIP, kl=KL(COEFFICIENT, "full"))
BUDGETS = (4096, 150, 1)


def text(first: int, count: int) -> Text:
    return Text(ids=tuple(range(first, first + count)), trained=True)


def make_batch(policy: QwenVL) -> Batch:
    """A group with a COPY and a ROUTE block in two of its answers, a prompt with two images and a block of
    forced tokens, one without any image. Behaviour log-probs are near the policy's, so some ratios clip."""
    one, two = make_prompt(policy, 0), make_prompt(policy, 1, "<image> or <image>?", ((64, 48), (32, 32)))
    rows: list[tuple[Prompt, Spans]] = [
        (one, (text(100, 5),)),
        (one, (text(120, 2), Visual(image=0, before_sampled=True), text(140, 4))),
        (two, (text(160, 1), Visual(image=1), Text(ids=(300, 301), trained=False), text(180, 5))),
        (one, (text(200, 3), Visual(image=0, keep=(1, 7)), text(220, 6))),
        (make_prompt(policy, 2, "One and one?", ()), (text(240, 8),)),
    ]
    batch = policy.batch(rows)
    own = score_batch(policy, batch, TEMPERATURE).logprobs
    near = torch.where(batch.trained, own + 0.25 * torch.cos(batch.ids.to(own.dtype)), 0.0)
    return dataclasses.replace(
        batch, advantages=torch.tensor([1.0, -0.5, 0.7, -1.2, 0.4]), old_logprobs=near.float()
    )


def apart(policy: QwenVL, scale: float) -> QwenVL:
    """A copy whose weights have moved, those of the vision tower too."""
    model = copy.deepcopy(policy.model).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (
                scale
                * parameter.std()
                * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            )
    return dataclasses.replace(policy, model=model)


def all_logprobs(policy: QwenVL, batch: Batch) -> Tensor:
    """[B, T, V]: the distribution of every token of plain rows from the stock head."""
    features = policy.features(batch.images)
    hidden = policy.hidden(policy.embed(batch.ids, batch.visual, features), batch.positions, None)
    logits = policy.model.lm_head(hidden) / TEMPERATURE
    logits = logits.index_fill(-1, policy.banned, -1e9)
    places = batch.predictor[..., None].expand(-1, -1, logits.shape[-1])
    return logits.gather(1, places).log_softmax(-1)


def plainly(policy: QwenVL, reference: QwenVL, batch: Batch) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, mean KL and gradients of GRPO with the exact KL, written out."""
    policy.model.zero_grad(set_to_none=True)
    ours = all_logprobs(policy, batch)
    with torch.no_grad():
        theirs = all_logprobs(reference, batch)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    logprobs = ours.gather(-1, batch.ids[..., None]).squeeze(-1)
    ratio = (torch.where(batch.trained, logprobs - batch.old_logprobs, 0.0)).exp()
    advantage = batch.advantages[:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    token_loss = torch.where(batch.trained, COEFFICIENT * kl - gain, 0.0)
    loss = (token_loss.sum(1) / batch.trained.sum(1)).sum() / batch.num_sequences
    loss.backward()
    mean = torch.where(batch.trained, kl, 0.0).sum() / batch.num_tokens
    return float(loss.detach()), float(mean.detach()), gradients(policy)


def gradients(policy: QwenVL) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def farthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference, relative to what is above 1."""
    assert found.keys() == wanted.keys()
    return max(
        float((found[name] - wanted[name]).abs().max()) / max(1.0, float(wanted[name].abs().max()))
        for name in wanted
    )


def updated(
    policy: QwenVL, reference: Any, batch: Batch, micro_tokens: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    updater = Updater(
        policy=policy,
        objective=FULL,
        optimizer=torch.optim.SGD(policy.module.parameters(), lr=0.0),
        runtime=Runtime(),
        max_grad_norm=1e9,
        micro_tokens=micro_tokens,
        temperature=TEMPERATURE,
        reference=reference,
    )
    report = updater(batch, lr=0.0)
    policy.module.eval()
    return report, gradients(policy)


@pytest.fixture(scope="module")
def models() -> tuple[QwenVL, QwenVL]:
    """Policy and reference in float32; nobody moves their weights."""
    policy = make_policy(gain=1.0)
    return policy, apart(policy, 0.3)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_an_update_equals_plain_autograd(models: tuple[QwenVL, QwenVL], fused: bool, share: bool) -> None:
    """Bug: another order of tokens for reference and policy, features of the wrong tower, a micro-batch's
    mean, a KL that moves nothing or that moves the reference."""
    policy, reference = models
    batch = make_batch(policy)
    loss, kl, wanted = plainly(policy, reference, batch)
    assert kl > 0.01
    # Eight tokens' logits at a time in one of three: they are computed again on the way back.
    for micro_tokens, chunk in zip(BUDGETS, (256, 8, 256), strict=True):
        ours, theirs = (
            dataclasses.replace(one, fused_head=fused, share_prefix=share, chunk=chunk) for one in models
        )
        assert (len(passes(batch.layout, micro_tokens, share_prefix=share)) > 1) == (micro_tokens < 4096)
        report, found = updated(ours, theirs, batch, micro_tokens)
        assert report["loss"] == pytest.approx(loss, abs=1e-5)
        assert report["kl"] == pytest.approx(kl, abs=1e-5)
        assert farthest(found, wanted) < 1e-5
    assert all(parameter.grad is None for parameter in reference.model.parameters())


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A reference with one mistake."""

    inner: QwenVL
    how: str
    policy: QwenVL

    def features(self, images: Any) -> Tensor:
        return (self.policy if self.how == "tower" else self.inner).features(images)

    def states(self, batch: Batch, features: Tensor) -> Any:
        found = self.inner.states(batch, features)
        if self.how == "order":
            return dataclasses.replace(found, hidden=found.hidden.flip(0))
        if self.how == "predictor":
            moved = dataclasses.replace(batch, predictor=(batch.predictor - 1).clamp(min=0))
            return self.inner.states(moved, features)
        return dataclasses.replace(found, weight=self.policy.model.lm_head.weight.detach())


@pytest.mark.parametrize("how", ["tower", "order", "predictor", "head"])
def test_the_comparison_sees_a_wrong_reference(models: tuple[QwenVL, QwenVL], how: str) -> None:
    """Bug: a tolerance that lets a reference pass which saw other features, other tokens or another head."""
    policy, reference = models
    batch = make_batch(policy)
    _, _, wanted = plainly(policy, reference, batch)
    _, found = updated(policy, Wrong(reference, how, policy), batch, 150)
    assert farthest(found, wanted) > 1e-3


def test_the_references_tower_runs_once_an_update(models: tuple[QwenVL, QwenVL]) -> None:
    """Bug: a tower that runs once a micro-batch, which costs most of an update."""
    policy, reference = models
    calls: list[int] = []
    hook = reference.model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    batch = make_batch(policy)
    assert len(passes(batch.layout, 150, share_prefix=True)) > 1
    updated(policy, reference, batch, 150)
    hook.remove()
    assert calls == [1]


def test_bfloat16_compares_with_the_plain_head() -> None:
    """Bug: the reference's states multiplied in float32 where the policy's are in bfloat16: a KL between two
    precisions rather than two models."""
    policy = dataclasses.replace(make_policy(gain=1.0), compute="bfloat16")
    moved = apart(policy, 0.3)
    moved = dataclasses.replace(moved, model=moved.model.to(torch.bfloat16), compute=None)
    batch = make_batch(policy)
    values = []
    for fused in (True, False):
        ours = dataclasses.replace(policy, fused_head=fused)
        with torch.no_grad():
            states = moved.states(batch, moved.features(batch.images))
            scores = ours.score(batch, ours.features(batch.images), TEMPERATURE, reference=states)
        assert scores.kl is not None
        assert scores.kl.dtype == torch.float32
        values.append(scores.kl)
    assert states.hidden.dtype == states.weight.dtype == torch.bfloat16
    assert values[1][batch.trained].min() > 0
    assert (values[0] - values[1]).abs().max() < 1e-5


def trainer_of(make: Any, root: Path, **changes: Any) -> RLTrainer:
    objective = ClippedSurrogate(clip_low=CLIP, clip_high=CLIP, kl=KL(COEFFICIENT, "full"))
    once = {"updates_per_step": 1, "epochs_per_step": 1}
    trainer: RLTrainer = make(root, **{"objective": objective, "micro_tokens": 300, **once, **changes})
    return trainer


@pytest.mark.parametrize("make", [small_rl, small_brpo_copy])
def test_a_training_step_equals_plain_autograd(tmp_path: Path, make: Any) -> None:
    """Bug: a trainer that forgets to hand the reference on, or scores it before the updates as for k3."""
    trainer = trainer_of(make, tmp_path)
    trainer.sampling = dataclasses.replace(trainer.sampling, temperature=TEMPERATURE)
    trainer.prepare()
    assert trainer.reference is not None
    with torch.no_grad():
        trainer.policy.model.model.language_model.norm.weight *= 1.3  # surer of everything
        trainer.policy.model.model.visual.merger.mlp[0].weight *= 1.2
    groups = trainer.sample_groups(0)
    if make is small_brpo_copy:
        assert any(
            isinstance(span, Visual) for group in groups for one in group.rollouts for span in one.spans
        )
    batch = trainer.batch(groups)
    assert batch.ref_logprobs is None
    loss, kl, wanted = plainly(trainer.policy, trainer.reference, batch)
    trainer.policy.model.zero_grad(set_to_none=True)
    trainer.updater._accumulate(batch)
    assert farthest(gradients(trainer.policy), wanted) < 1e-5
    metrics = trainer.update(groups, 0)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["kl"] == pytest.approx(kl, abs=1e-5)
    assert kl > 1e-3


def test_the_sampled_estimates_ask_for_no_states(tmp_path: Path) -> None:
    """Bug: the old way paying for the new one, or its reference pass for an entropy that nobody reads."""
    trainer = small_rl(tmp_path)
    assert trainer.updater.reference is None
    batch = trainer.batch(trainer.sample_groups(0))
    assert batch.ref_logprobs is not None
    without = small_rl(tmp_path, objective=ClippedSurrogate())
    assert without.updater.reference is None
    assert without.reference is None


@pytest.mark.parametrize("fused", [True, False])
def test_scores_without_a_gradient_compute_no_entropy(
    models: tuple[QwenVL, QwenVL], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the reference's pass before the updates spending a sweep of the vocabulary on an entropy."""
    policy = dataclasses.replace(models[0], fused_head=fused)
    batch, asked = make_batch(policy), []
    owner, name = (qwen_vl, "fused_token_scores") if fused else (ops, "token_scores")
    scored = getattr(owner, name)

    def seen(*arguments: Any, **settings: Any) -> Any:
        asked.append(settings["entropy"])
        result = scored(*arguments, **settings)
        assert result[1].any() == settings["entropy"]
        return result

    monkeypatch.setattr(owner, name, seen)
    found = score_without_grad(policy, batch, 150, TEMPERATURE)
    assert set(asked) == {False}
    expected = score_batch(policy, batch, TEMPERATURE).logprobs
    assert asked[-1] is True
    assert (found - expected)[batch.trained].abs().max() < 1e-5


def test_a_reference_that_follows(tmp_path: Path) -> None:
    """Bug: the updater keeping the reference of the start. After a sync with mix=1 the exact KL of the next
    step's first update is 0 again."""
    rows = {}
    for name, sync in (("fixed", None), ("follows", ReferenceSync(every=1, mix=1.0))):
        run = trainer_of(small_rl, tmp_path / name, reference_sync=sync).run()
        rows[name] = [row["kl"] for row in logged(run.folder) if "kl" in row]
    assert rows["fixed"][0] == rows["follows"][0] == pytest.approx(0, abs=1e-6)
    assert min(rows["fixed"][1:]) > 1e-6
    assert max(rows["follows"]) < 1e-6


@pytest.mark.parametrize("sync", [None, ReferenceSync(every=2, mix=0.5)], ids=["stays", "follows"])
def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path, sync: ReferenceSync | None) -> None:
    """Bug: after a resume the KL is taken to another reference than before."""
    changes: dict[str, Any] = {"reference_sync": sync, "updates_per_step": 2, "epochs_per_step": 2}
    whole = trainer_of(small_rl, tmp_path / "whole", **changes).run()
    cut = trainer_of(small_rl, tmp_path / "cut", **changes)
    crashed(cut, cut, "step", 4)
    resumed = trainer_of(small_rl, tmp_path / "cut", output={"resume": "auto"}, **changes).run()
    same_runs(resumed.folder, whole.folder)
    assert max(row.get("kl", 0.0) for row in logged(whole.folder)) > 1e-4
