"""Truncated importance weights: where an engine with arithmetic of its own has sampled, and nowhere else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import make_policy, make_prompt, score_batch
from reflectvlm import ops
from reflectvlm.batch import LossInputs
from reflectvlm.integrations.vllm_engine import VLLMEngine
from reflectvlm.integrations.vllm_requests import Completion, Request
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.objectives import KL, ClippedSurrogate, CrossEntropy, dapo, grpo
from reflectvlm.reattention import VisualCopy
from reflectvlm.train.rl import RLTrainer
from reflectvlm.types import SamplingParams, Text
from training import reflecting_tiny, small_rl
from vllm_doubles import PolicyBackend


def by_hand(**changes: Any) -> LossInputs:
    """Two rows; the policy has not moved since it sampled, so every ratio is 1 and a token's loss is -A w.
    Ratios of the trainer's probability to the engine's:

    row 0, A = +1:  4.0   0.5   1.0
    row 1, A = -1:  1.0   2.5   (not trained)
    """
    ratios = torch.tensor([[4.0, 0.5, 1.0], [1.0, 2.5, 100.0]], dtype=torch.float64)
    own = torch.full_like(ratios, -2.0)
    inputs = LossInputs(
        logprobs=own.clone().requires_grad_(),
        old_logprobs=own,
        ref_logprobs=None,
        entropy=torch.zeros_like(ratios),
        advantages=torch.tensor([1.0, -1.0], dtype=torch.float64),
        mask=torch.tensor([[True, True, True], [True, True, False]]),
        num_tokens=5.0,
        num_sequences=2.0,
        engine_logprobs=own - ratios.log(),
    )
    return dataclasses.replace(inputs, **changes)


def values(metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


# -- the weights ----------------------------------------------------------------------------------


def test_truncated_importance_by_hand() -> None:
    """Bug: the inverse ratio, a floor instead of a cap, or a weight that is differentiated."""
    trainer = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    engine = torch.tensor([-1.0, -1.0 - math.log(3), -1.0 + math.log(2)])
    ratio, weight = ops.truncated_importance(trainer, engine, 2.0)
    assert ratio.tolist() == pytest.approx([1.0, 3.0, 0.5])
    assert weight.tolist() == pytest.approx([1.0, 2.0, 0.5])
    assert not ratio.requires_grad
    assert not weight.requires_grad


def test_equal_logprobs_weigh_exactly_one() -> None:
    """Bug: a correction that moves the numbers of a run that needs none."""
    logprobs = -torch.rand(4, 5)
    assert (ops.truncated_importance(logprobs, logprobs.clone(), 2.0)[1] == 1).all()


def test_the_surrogate_is_weighted_and_the_penalty_is_not() -> None:
    """Bug: the cap is ignored, KL is weighted as well, or rows' counts change with the weights."""
    # weights capped at 2: row 0: 2, 0.5, 1; row 1: 1, 2
    assert dapo()(by_hand()).loss.item() == pytest.approx(-(3.5 - 3) / 5)
    assert grpo()(by_hand()).loss.item() == pytest.approx(-(3.5 / 3 - 3 / 2) / 2)
    uncapped = ClippedSurrogate(reduce="token_mean", importance_cap=100.0)(by_hand())
    assert uncapped.loss.item() == pytest.approx(-(5.5 - 3.5) / 5)
    inputs = by_hand()
    away = dataclasses.replace(inputs, ref_logprobs=inputs.old_logprobs + math.log(2))
    # k3 = 2 - 1 - log 2 per token, the same with and without weights
    penalty = dapo(kl=KL(0.1))(away).loss.item() - dapo()(away).loss.item()
    assert penalty == pytest.approx(0.1 * (1 - math.log(2)))


def test_gradients_are_weighted() -> None:
    """Bug: a weight on the value of the loss that its gradient does not have."""
    inputs = by_hand()
    dapo()(inputs).loss.backward()
    # d loss / d log p = -A w / 5
    expected = torch.tensor([[-2.0, -0.5, -1.0], [1.0, 2.0, 0.0]], dtype=torch.float64) / 5
    torch.testing.assert_close(inputs.logprobs.grad, expected)


def test_without_an_engine_of_its_own_there_is_no_weight() -> None:
    """Bug: the in-process engine's runs change by a rounding, and with them the golden trajectory."""
    plain = dataclasses.replace(by_hand(), engine_logprobs=None)
    for cap in (None, 1.0, 2.0):
        made = ClippedSurrogate(importance_cap=cap)(plain)
        assert made.loss.item() == ClippedSurrogate()(plain).loss.item()
        assert not any(name.startswith("mismatch") for name in {**made.metrics, **made.peaks})


def test_an_uncorrected_mismatch_is_measured() -> None:
    """Bug: `importance_cap=None` hides that the engine has drifted away."""
    made = ClippedSurrogate(reduce="token_mean", importance_cap=None)(by_hand())
    assert made.loss.item() == pytest.approx(-(3 - 2) / 5)
    assert values(made.metrics)["mismatch"] == pytest.approx(9 / 5)
    assert values(made.metrics)["mismatch_cut"] == 0
    assert values(made.peaks)["mismatch_max"] == pytest.approx(4.0)


def test_metrics_by_hand() -> None:
    """Bug: means over padding, or a largest ratio that is the padding's."""
    made = dapo()(by_hand())
    assert values(made.metrics)["mismatch"] == pytest.approx((4 + 0.5 + 1 + 1 + 2.5) / 5)
    assert values(made.metrics)["mismatch_cut"] == pytest.approx(2 / 5)
    assert values(made.peaks)["mismatch_max"] == pytest.approx(4.0)
    small = by_hand(engine_logprobs=by_hand().old_logprobs + math.log(2))
    assert values(dapo()(small).peaks)["mismatch_max"] == pytest.approx(0.5)
    assert not any(value.requires_grad for value in (*made.metrics.values(), *made.peaks.values()))


def test_garbage_where_nothing_is_trained_is_not_looked_at() -> None:
    """Bug: 0 * inf in the gradient of a padded token."""
    inputs = by_hand()
    assert inputs.engine_logprobs is not None
    bad = inputs.engine_logprobs.masked_fill(~inputs.mask, math.nan)
    loss = dapo()(dataclasses.replace(inputs, engine_logprobs=bad)).loss
    loss.backward()
    assert loss.item() == dapo()(by_hand()).loss.item()
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.isfinite().all()


def test_losses_of_parts_add_up() -> None:
    """Bug: a weight normalised within its micro-batch."""
    inputs = by_hand()

    def part(row: int) -> LossInputs:
        cut = {
            field.name: value[row : row + 1]
            for field in dataclasses.fields(inputs)
            if isinstance(value := getattr(inputs, field.name), Tensor)
        }
        return dataclasses.replace(inputs, **cut)  # type: ignore[arg-type]

    whole, parts = grpo()(inputs), [grpo()(part(row)) for row in (0, 1)]
    assert sum(one.loss.item() for one in parts) == pytest.approx(whole.loss.item())
    for name in ("mismatch", "mismatch_cut"):
        assert sum(one.metrics[name].item() for one in parts) == pytest.approx(whole.metrics[name].item())


@pytest.mark.parametrize("cap", [0.5, 0.0, math.inf, math.nan])
def test_a_cap_that_makes_no_sense_is_refused(cap: float) -> None:
    """Bug: a cap below 1 shrinks every token's loss where engine and trainer agree."""
    with pytest.raises(ValueError, match=r"importance_cap is .* finite value of at least 1"):
        ClippedSurrogate(importance_cap=cap)


def test_supervised_learning_looks_at_no_engine() -> None:
    """Bug: SFT on rows that an engine once sampled is weighted."""
    assert CrossEntropy()(by_hand()).loss.item() == pytest.approx(2.0)


def test_rows_of_a_batch_keep_their_engines_logprobs() -> None:
    """Bug: a micro-batch weighs its tokens by another row's."""
    policy = make_policy()
    answers = [(Text(ids=(40, 41, 42)[:n], trained=True),) for n in (3, 1, 2)]
    batch = policy.batch([(make_prompt(policy, seed), answer) for seed, answer in enumerate(answers)])
    own = torch.rand(batch.ids.shape)
    marked = dataclasses.replace(batch, engine_logprobs=own)
    piece = marked.rows(torch.tensor([2, 1]))
    assert piece.engine_logprobs is not None
    assert torch.equal(piece.engine_logprobs, own[[2, 1], : piece.ids.shape[1]])
    assert batch.rows(torch.tensor([0])).engine_logprobs is None


# -- in the trainer -------------------------------------------------------------------------------


def vllm_rl(
    root: Path, off_by: float = 0.0, make: type[PolicyBackend] = PolicyBackend, **changes: Any
) -> tuple[RLTrainer, PolicyBackend]:
    """A small trainer with COPY whose engine's log-probs are off."""
    policy: QwenVL = reflecting_tiny()
    backend = make(policy=policy, off_by=off_by)

    def engine(policy: QwenVL) -> VLLMEngine:
        return VLLMEngine(policy=policy, backend=backend)

    settings = {"updates_per_step": 1, "epochs_per_step": 1, "reattention": VisualCopy(limit=1), "steps": 3}
    return small_rl(root, policy=policy, engine=engine, **settings | changes), backend


def test_the_trainer_computes_its_own_logprobs_and_keeps_the_engines(tmp_path: Path) -> None:
    """Bug: the ratio of the first update is against another arithmetic than its own, and clips."""
    trainer, _ = vllm_rl(tmp_path, off_by=-0.5)
    trainer.prepare()
    groups = trainer.sample_groups(0)
    batch = trainer.batch(groups)
    assert any(one.insertions for group in groups for one in group.rollouts)
    assert batch.engine_logprobs is not None
    own = score_batch(trainer.policy, batch).logprobs
    assert torch.allclose(batch.old_logprobs[batch.trained], own[batch.trained], atol=1e-5)
    assert torch.allclose(batch.engine_logprobs[batch.trained], own[batch.trained] - 0.5, atol=1e-4)
    assert not batch.old_logprobs[~batch.trained].any()
    metrics = trainer.update(groups, 0)
    assert metrics["mismatch"] == pytest.approx(math.exp(0.5), rel=1e-3)  # e^0.5 = 1.65, below the cap
    assert metrics["ratio_gap"] < 1e-3
    assert metrics["mismatch_cut"] == 0


def test_an_engine_that_agrees_changes_nothing(tmp_path: Path) -> None:
    """Bug: the detour by the trainer's own log-probs gives another update than the engine's direct ones."""
    through, _ = vllm_rl(tmp_path)
    through.prepare()
    groups = through.sample_groups(0)
    metrics = through.update(groups, 0)
    plain = small_rl(tmp_path, policy=reflecting_tiny(), updates_per_step=1, epochs_per_step=1, steps=2)
    plain.prepare()
    assert plain.batch(groups).engine_logprobs is None
    expected = plain.update(groups, 0)
    assert {*metrics} - {*expected} == {"mismatch", "mismatch_cut", "mismatch_max"}
    assert metrics["mismatch"] == pytest.approx(1.0, abs=1e-4)
    for name in ("loss", "grad_norm"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name


@dataclass(kw_only=True, eq=False)
class Remembering(PolicyBackend):
    """Knows which weights it was sent."""

    sent: Tensor | None = None

    def load_weights(self) -> None:
        super().load_weights()
        self.sent = self._now()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        assert self.sent is not None
        assert torch.equal(self.sent, self._now()), "these are not the weights that were sent"
        return super().generate(requests)

    def _now(self) -> Tensor:
        return self.policy.model.get_output_embeddings().weight.detach().clone()


def test_weights_go_to_the_engine_once_a_version(tmp_path: Path) -> None:
    """Bug: rollouts or evaluations of a step before; or weights sent again although nothing has changed."""
    trainer, backend = vllm_rl(tmp_path, make=Remembering)
    trainer.prepare()
    assert trainer.evaluation is not None
    loads = []
    for work in (0, None, None, 1, 2, None):  # steps, and evaluations after them
        if work is None:
            trainer.evaluate(trainer.evaluation)
        else:
            trainer.step(work)
            assert trainer.updates == work + 1
        loads.append(backend.calls.count("load"))
    assert loads == [1, 2, 2, 2, 3, 4]
    assert backend.calls[:4] == ["load", "wake", "reset all", "generate"]


def test_a_whole_run_by_the_engine(tmp_path: Path) -> None:
    """Bug: checks, evaluations or the table at the end ask for something that this engine has not."""
    trainer, backend = vllm_rl(tmp_path, sampling=SamplingParams(max_tokens=8))
    result = trainer.run()
    assert (Path(result.folder) / "metrics.jsonl").is_file()
    assert backend.calls[-1] == "sleep"
