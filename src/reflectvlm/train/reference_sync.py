"""`ReferenceSync`: a reference of the KL term that follows the policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class ReferenceSync:
    """Every so many steps the reference takes a step towards the policy (TR-DPO, arXiv 2404.09656, soft
    update): reference <- mix * policy + (1 - mix) * reference."""

    every: int = 500
    mix: float = 1.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"ReferenceSync.every is {self.every}. It must be at least 1 step.")
        if not 0 < self.mix <= 1:
            raise ValueError(f"ReferenceSync.mix is {self.mix}. It must be above 0 and at most 1.")

    def __call__(self, policy: nn.Module, reference: nn.Module, step: int) -> None:
        """What the reference does after `step`, counted from 0."""
        if (step + 1) % self.every:
            return
        theirs = dict(policy.named_parameters())
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter.lerp_(theirs[name].to(parameter.dtype), self.mix)
