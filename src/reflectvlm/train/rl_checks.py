"""What `RLTrainer` refuses before it has done anything: values out of range, and settings that do not go
together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reflectvlm.models.adapters import adapter_layers
from reflectvlm.objectives import wants_full_kl
from reflectvlm.reattention import check_reattention
from reflectvlm.train.pending import PartialRollouts
from reflectvlm.train.prefetch import check_workers

if TYPE_CHECKING:
    from reflectvlm.train.rl import RLTrainer

_COUNTS = (
    "steps",
    "group_size",
    "prompts_per_step",
    "updates_per_step",
    "epochs_per_step",
    "micro_tokens",
)


def check_settings(trainer: RLTrainer) -> None:
    """Raises ValueError for what a recipe cannot mean."""
    check_reattention(trainer.reattention)
    check_workers(trainer.workers, trainer.prefetch)
    for name in _COUNTS:
        if getattr(trainer, name) < 1:
            raise ValueError(f"{name} is {getattr(trainer, name)}. It must be at least 1.")
    if trainer.group_size < 2:
        raise ValueError("group_size is 1: its only advantage is 0, and nothing is learned. Use 2 or more.")
    if len(trainer.data) == 0:
        raise ValueError("data has no rows. Check its path and its filters.")
    if trainer.max_nonfinite < 0:
        raise ValueError(f"max_nonfinite is {trainer.max_nonfinite}. It must be 0 or more.")
    if trainer.reference_sync is not None and getattr(trainer.objective, "kl", None) is None:
        raise ValueError(
            "reference_sync is set, but the objective has no KL term, so there is no reference. Give "
            "objective.kl, or leave reference_sync out."
        )
    if wants_full_kl(trainer.objective) and trainer.compute.stage == 3:
        raise ValueError(
            "objective.kl.estimator is 'full' with compute=zero3, where nobody has the reference's whole "
            "head. Take estimator k3 or k2, or compute=zero2."
        )
    if trainer.reference_sync is not None and trainer.compute.stage == 3:
        raise ValueError(
            "reference_sync is set with compute=zero3, whose weights are in shares. Take zero2, or leave "
            "reference_sync out."
        )
    if trainer.reference_sync is not None and adapter_layers(trainer.policy.module):
        raise ValueError(
            "reference_sync is set, and the policy trains adapters (policy.lora): its reference is the "
            "policy with them switched off, which cannot follow. Leave reference_sync out (null), or "
            "train the weights themselves with policy.lora=null."
        )
    if not isinstance(trainer.partial, PartialRollouts | None):
        raise ValueError(  # noqa: TRY004 - what a user wrote in a recipe
            f"partial is {trainer.partial!r}. It takes PartialRollouts, in a recipe "
            "{_target_: reflectvlm.train.pending.PartialRollouts, tokens: 256}, or null."
        )
    if trainer.partial is not None and trainer.dynamic_sampling is not None:
        raise ValueError(
            "partial and dynamic_sampling are both set. A step that leaves rollouts unfinished does not "
            "know yet which groups carry a signal: use one of them."
        )
    if trainer.prompts_per_step % trainer.updates_per_step:
        raise ValueError(
            f"updates_per_step={trainer.updates_per_step} does not divide prompts_per_step="
            f"{trainer.prompts_per_step}. Each update takes an equal share of the groups."
        )
