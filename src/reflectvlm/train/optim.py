"""The optimiser and its learning rate, as settings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from reflectvlm.models.freezing import trained_rows


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv 1711.05101) with warm-up and a schedule. Frozen parameters never enter it."""

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: float = 0.0
    """Share of all steps over which the rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final: float = 0.0
    """Where linear and cosine end, as a share of `lr`."""
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"AdamW.schedule is {self.schedule!r}. It must be constant, linear or cosine.")
        for name in ("lr", "eps", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"AdamW.{name} is {getattr(self, name)}. It must be positive.")
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"AdamW.{name} is {getattr(self, name)}. It is a share, from 0 to 1.")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """One group; and a second one without weight decay for parameters of which only some rows
        train (`models.freezing`), because decay would move the others too."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        whole = [parameter for parameter in trained if trained_rows(parameter) is None]
        by_rows = [parameter for parameter in trained if trained_rows(parameter) is not None]
        groups: list[dict[str, Any]] = [{"params": whole}, {"params": by_rows, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,  # one sweep over memory instead of a dozen
        )

    def rate(self, step: int, total: int) -> float:
        """Learning rate of step `step` of `total`, counted from 0; a later step has that of the end."""
        warm = math.ceil(self.warmup * total)
        if step < warm:
            return self.lr * (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, total - warm))
        match self.schedule:
            case "constant":
                return self.lr
            case "linear":
                return self.lr * (1 - (1 - self.final) * done)
            case _:
                return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))
