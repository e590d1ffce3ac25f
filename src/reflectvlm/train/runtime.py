"""Processes and devices: the only place that knows accelerate.

Everything else asks it to move, to add up over ranks, to run a backward pass, to step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class Runtime:
    """One rank's view of the run. In a single process every sum over ranks is the value itself."""

    @functools.cached_property
    def accelerator(self) -> Any:
        from accelerate import Accelerator

        made = Accelerator()
        if made.num_processes > 1:
            raise RuntimeError(
                f"{made.num_processes} processes were started, but this version trains in one. "
                "Start it with plain `reflectvlm train`."
            )
        return made

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def sum(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Each value added over ranks."""
        names = list(values)
        if not names:
            return {}
        stacked = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
        total = self.accelerator.reduce(stacked, reduction="sum")
        return dict(zip(names, total.tolist(), strict=True))

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, module: nn.Module, max_norm: float) -> float:
        """Scales gradients down to `max_norm`; returns their norm before."""
        return float(self.accelerator.clip_grad_norm_(module.parameters(), max_norm))
