"""Section D1: a loss, gradient, weight or checkpoint that is no number is told before it changes anything."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.tiny import random_tiny
from reflectvlm.train.checkpoint import CheckpointStore
from reflectvlm.train.optim import AdamW
from reflectvlm.train.rl import RLTrainer
from reflectvlm.train.saver import BrokenWeights, Saver
from reflectvlm.train.update import NonFinite, first_broken_weight
from training import crashed, logged, small_rl, small_sft

QUIET = {"test": None, "evaluation": None}


def weights(policy):
    return {name: value.clone() for name, value in policy.module.state_dict().items()}


def same(policy, before):
    now = policy.module.state_dict()
    return all(bool((now[name] == value).all()) for name, value in before.items())


class Loss:
    """Cross-entropy whose loss is spoilt at some calls."""

    def __init__(self, bad, value=math.nan):
        from reflectvlm.objectives import CrossEntropy

        self.real, self.bad, self.value, self.calls = CrossEntropy(), bad, value, 0

    def __call__(self, inputs):
        self.calls += 1
        out = self.real(inputs)
        return dataclasses.replace(out, loss=out.loss * self.value) if self.calls in self.bad else out


class Gradient(torch.autograd.Function):
    """The identity, with a gradient that is no number."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, grad):
        return grad * math.nan


class FiniteLoss(Loss):
    """A finite loss with a gradient that is none."""

    def __call__(self, inputs):
        self.calls += 1
        if self.calls in self.bad:
            inputs = dataclasses.replace(inputs, logprobs=Gradient.apply(inputs.logprobs))
        return self.real(inputs)


@pytest.mark.parametrize(
    ("objective", "what"),
    [
        (Loss({3}), r"The loss \(nan\)"),
        (Loss({3}, math.inf), r"The loss \(inf\)"),
        (FiniteLoss({3}), r"The gradient norm \(nan\)"),
    ],
    ids=["loss-nan", "loss-inf", "gradient-nan"],
)
def test_d1_named_before_the_update_and_dumped(objective, what, tmp_path, monkeypatch):
    """Bug: one broken batch turns all weights into NaN, hours before anybody looks."""
    trainer = small_sft(tmp_path, objective=objective, **QUIET)
    before = {}
    step = trainer.step

    def watched(number):
        before.update(weights(trainer.policy))
        return step(number)

    monkeypatch.setattr(trainer, "step", watched)
    with pytest.raises(NonFinite, match=rf"Step 3, batch saved in .*nonfinite-step-3: {what}"):
        trainer.run()
    assert same(trainer.policy, before)
    about = json.loads((tmp_path / "sft" / "nonfinite-step-3" / "batch.json").read_text())
    assert about["row_ids"] == list(trainer.row_ids)
    assert max((tmp_path / "sft" / "checkpoints").glob("step-*")).name == "step-000002"


def test_d1_skip_leaves_the_batch_out_and_goes_on(tmp_path, monkeypatch, caplog):
    """Bug: `skip` takes a part of the broken step (moments, decay), or says nothing."""
    trainer = small_sft(tmp_path, objective=Loss({2, 4}), on_nonfinite="skip", **QUIET)
    states = []
    step = trainer.step

    def watched(number):
        result = step(number)
        states.append(weights(trainer.policy))
        return result

    monkeypatch.setattr(trainer, "step", watched)
    run = trainer.run()
    assert run.finished
    unchanged = [all(bool((a[k] == b[k]).all()) for k in a) for a, b in itertools.pairwise(states)]
    assert unchanged == [True, False, True, False]
    assert [row.get("nonfinite") for row in logged(run.folder) if "lr" in row] == [None, 1.0, None, 1.0, None]
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert ["number 1, max_nonfinite=10" in told[0], "number 2, max" in told[1], len(told)] == [True, True, 2]
    assert (run.folder / "nonfinite-step-2" / "batch.json").is_file()


def test_d1_the_budget_ends_and_survives_a_resume(tmp_path):
    """Bug: a run that leaves out every batch looks busy for days; or each resume gets a budget of its own."""
    make = lambda **more: small_sft(  # noqa: E731
        tmp_path, objective=Loss({2, 3, 4, 5}), on_nonfinite="skip", max_nonfinite=2, **QUIET, **more
    )
    trainer = make()
    crashed(trainer, trainer, "step", 4)
    # one of the two is in the checkpoint of step 2; calls of the objective count anew
    with pytest.raises(NonFinite, match=r"3 batches are left out, and max_nonfinite is 2"):
        make(output={"resume": "auto"}).run()


def test_d1_rl_skips_one_of_its_updates(tmp_path):
    """Bug: a broken update of a step takes the good ones of the same step with it."""
    real = QwenVL.score
    calls = []

    def spoilt(self, batch, features, temperature=1.0, **named):
        scores = real(self, batch, features, temperature, **named)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 2:
                return dataclasses.replace(scores, logprobs=scores.logprobs * math.nan)
        return scores

    trainer = small_rl(tmp_path, steps=2, on_nonfinite="skip", **QUIET)
    try:
        QwenVL.score = spoilt
        run = trainer.run()
    finally:
        QwenVL.score = real
    assert run.finished
    assert trainer.updates == 8  # four a step; one of them was empty
    assert first_broken_weight(trainer.policy.module) is None


def test_d1_weights_that_are_broken_already_are_an_error_even_when_skipping(tmp_path, monkeypatch):
    """Bug: with skip, a run whose weights are NaN leaves out batch after batch and never says why."""
    trainer = small_sft(tmp_path, on_nonfinite="skip", **QUIET)
    step = trainer.step

    def spoil(number):
        if number == 1:
            with torch.no_grad():
                trainer.policy.model.model.language_model.norm.weight[3] = math.nan
        return step(number)

    monkeypatch.setattr(trainer, "step", spoil)
    with pytest.raises(NonFinite, match=r"Before this update the weight 'model\..*\.norm\.weight'"):
        trainer.run()


def test_d1_no_checkpoint_of_broken_weights(tmp_path):
    """Bug: an overflow writes NaN over the last good checkpoint, and then over the one before."""
    trainer = small_sft(
        tmp_path, optimizer=AdamW(lr=1e30, schedule="constant"), output={"save_every": 1}, **QUIET
    )
    with pytest.raises((NonFinite, BrokenWeights), match=r"NaN or infinite, so no checkpoint|the weight"):
        trainer.run()
    store = CheckpointStore(tmp_path / "sft" / "checkpoints")
    newest = store.latest()
    if newest is not None:
        kept = store.load(newest).tensors["model"]
        assert all(bool(value.isfinite().all()) for value in kept.values())


def test_d1_saver_names_the_tensor(tmp_path):
    """Bug: "not finite" without a name, in a model of 700 tensors."""
    saver = Saver(CheckpointStore(tmp_path))
    saver.save(3, tensors={"model": {"a": torch.ones(2), "b.c": torch.tensor([1.0, math.inf])}}, state={})
    with pytest.raises(BrokenWeights, match=r"After step 3 model 'b\.c' holds 1 values that are NaN or inf"):
        saver.wait()
    saver.wait()  # told once
    assert list(tmp_path.glob("step-*")) == []


def test_d1_a_checkpoint_with_nan_is_refused(tmp_path):
    """Bug: a checkpoint that was broken elsewhere is trained on."""
    crashed(small_rl(tmp_path), RLTrainer, "step", 4)
    store = CheckpointStore(tmp_path / "rl" / "checkpoints")
    found = store.load(store.latest())
    tensors = {part: dict(values) for part, values in found.tensors.items()}
    tensors["model"]["model.language_model.norm.weight"][0] = math.nan
    store.save(found.step, tensors=tensors, state=found.state)
    with pytest.raises(RuntimeError, match=r"the weight 'model\..*\.norm\.weight' holds NaN"):
        small_rl(tmp_path, output={"resume": "auto"}).run()


def test_d1_settings_are_checked(tmp_path):
    """Bug: `on_nonfinite=ignore` trains on NaN."""
    with pytest.raises(ValueError, match=r"on_nonfinite is 'ignore'\. It must be 'stop' or 'skip'"):
        _ = small_sft(tmp_path, on_nonfinite="ignore").updater
    with pytest.raises(ValueError, match="max_nonfinite is -1"):
        small_rl(tmp_path, max_nonfinite=-1)
    assert first_broken_weight(random_tiny().module) is None


def test_d1_minus_infinity_in_a_buffer_is_a_mask(tmp_path):
    """Bug: a model whose attention mask is a buffer counts as broken before its first step."""
    trainer = small_sft(tmp_path, steps=1, **QUIET)
    trainer.policy.module.register_buffer("mask", torch.full((2, 2), -math.inf), persistent=False)
    assert first_broken_weight(trainer.policy.module) is None
    assert trainer.run().finished
