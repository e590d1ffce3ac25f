"""TRL as oracle: our losses, gradients and advantages equal those of its GRPOTrainer.

The trainer is made without its `__init__`: only `_compute_loss` runs, on scripted log-probs. These are
private parts of one release, so another one may need another set of attributes here.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reflectvlm.advantages import GroupMean
from reflectvlm.batch import LossInputs
from reflectvlm.objectives import KL, ClippedSurrogate
from reflectvlm.types import Prompt, Rollout, Sample, ScoredGroup

with warnings.catch_warnings():  # only the import: its dependencies warn as they please
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install reflectvlm[trl]")
    from trl import GRPOTrainer
    from trl.trainer.utils import nanstd

MAX_TOKENS = 6


def scripted_trainer(logprobs: torch.Tensor, entropy: torch.Tensor, **settings: Any) -> Any:
    """What `_compute_loss` of TRL 1.16 reads, and nothing else."""
    trainer = object.__new__(GRPOTrainer)
    one_process = SimpleNamespace(
        num_processes=1,
        gather=lambda value: value,
        reduce=lambda value, reduction: value,  # noqa: ARG005
    )
    defaults = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
    }
    trainer.__dict__.update(
        defaults | {name: value for name, value in settings.items() if name != "delta"},
        args=SimpleNamespace(
            delta=settings.get("delta"), use_bias_correction_kl=False, steps_per_generation=1
        ),
        model=SimpleNamespace(training=True),
        accelerator=one_process,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_TOKENS,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
    )
    return trainer


def random_inputs(seed: int) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = torch.tensor([6, 1, 3, 4, 2])
    mask = torch.arange(MAX_TOKENS)[None] < lengths[:, None]
    old = -noise(5, MAX_TOKENS).abs()
    return LossInputs(
        logprobs=(old + noise(5, MAX_TOKENS)).requires_grad_(),
        old_logprobs=old,
        ref_logprobs=old + 0.5 * noise(5, MAX_TOKENS),
        entropy=noise(5, MAX_TOKENS).abs(),
        advantages=noise(5),
        mask=mask,
        num_tokens=float(mask.sum()),
        num_sequences=5.0,
    )


def trl_loss(
    inputs: LossInputs, weight: torch.Tensor | None = None, **settings: Any
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """`weight`: of each token, as TRL has it from vLLM's log-probs."""
    trainer = scripted_trainer(inputs.logprobs, inputs.entropy, **settings)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = weight is not None
    rows = len(inputs.mask)
    batch = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(inputs.mask, dtype=torch.long),
        "completion_mask": inputs.mask.long(),
        "advantages": inputs.advantages,
        "old_per_token_logps": inputs.old_logprobs,
        "ref_per_token_logps": inputs.ref_logprobs,
        "num_items_in_batch": inputs.mask.sum(),
        "importance_sampling_ratio": weight,
    }
    return trainer._compute_loss(None, batch), trainer._metrics["train"]


REDUCTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"reduce": "sequence_mean"},
    "bnpo": {"reduce": "token_mean"},
    "dapo": {"reduce": "token_mean"},
    "dr_grpo": {"reduce": "constant", "constant": MAX_TOKENS},
}
# our clip settings, TRL's names for them
CLIPS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"clip_high": 0.28}, {"epsilon_high": 0.28}),
    ({"dual_clip": 1.5}, {"delta": 1.5}),
    ({"clip_low": 3e-4, "clip_high": 4e-4}, {"epsilon_low": 3e-4, "epsilon_high": 4e-4}),
]


@pytest.mark.parametrize("loss_type", list(REDUCTIONS))
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("clip", "their_clip"), CLIPS)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_losses_and_gradients_equal_those_of_trl(
    loss_type: str,
    level: Any,
    beta: float,
    clip: dict[str, Any],
    their_clip: dict[str, Any],
    cap: float | None,
) -> None:
    """Bug: any difference from the implementation that most published runs used. With a cap, vLLM has
    sampled: TRL's "token_truncate" clamps exp(trainer's - vLLM's) from above."""
    inputs = random_inputs(seed=3)
    weight = None
    if cap is not None:
        gap = 2 * torch.randn(inputs.mask.shape, generator=torch.Generator().manual_seed(4))
        weight = gap.exp().clamp(max=cap)
        assert (weight[inputs.mask] == cap).any()
        inputs = dataclasses.replace(inputs, engine_logprobs=inputs.old_logprobs - gap)
    kl = KL(beta) if beta else None
    ours = ClippedSurrogate(ratio=level, kl=kl, importance_cap=cap, **REDUCTIONS[loss_type], **clip)(inputs)
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta}
    theirs, metrics = trl_loss(inputs, weight, **settings, **their_clip)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss, inputs.logprobs),
        torch.autograd.grad(theirs, inputs.logprobs),
        rtol=1e-4,
        atol=1e-6,
    )
    assert ours.metrics["entropy"].item() == pytest.approx(metrics["entropy"][0], rel=1e-5)
    if beta:
        assert ours.metrics["kl"].item() == pytest.approx(metrics["kl"][0], rel=1e-5)
    if level == "token" and "delta" not in their_clip:
        assert ours.metrics["clip_fraction"].item() == pytest.approx(metrics["clip_ratio/region_mean"][0])


def test_the_oracle_sees_each_setting() -> None:
    """Bug: random numbers on which clipping, levels or reductions make no difference prove nothing."""
    inputs = random_inputs(seed=3)
    settings: list[dict[str, Any]] = [{"loss_type": name} for name in ("grpo", "dapo", "dr_grpo")]
    settings += [
        {"epsilon_high": 0.28},
        {"delta": 1.5},
        {"beta": 0.04},
        {"importance_sampling_level": "sequence"},
    ]
    losses = [round(trl_loss(inputs, **setting)[0].item(), 5) for setting in settings]
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("rewards", [[0.0, 1.0, 0.5, 1.0], [0.1, 0.1, 0.1, 0.1], [1.0, 0.0, 1.0, None]])
def test_group_mean_equals_trl(rewards: list[float | None]) -> None:
    """Bug: another degree of freedom in the deviation, or an unscored rollout that counts."""
    values = torch.tensor([float("nan") if reward is None else reward for reward in rewards])
    theirs = (values - values.nanmean()) / (nanstd(values) + 1e-4)  # trl: scale_rewards="group"
    prompt = Prompt(sample=Sample(id="s", question="?", answer="!"), spans=())
    group = ScoredGroup(
        rollouts=tuple(Rollout(prompt=prompt, spans=(), text="", stop="eos") for _ in rewards),
        rewards=tuple(reward or 0.0 for reward in rewards),
        parts={},
        scored=tuple(reward is not None for reward in rewards),
    )
    torch.testing.assert_close(GroupMean(eps=1e-4)(group), theirs.nan_to_num(0.0), rtol=1e-5, atol=1e-6)
