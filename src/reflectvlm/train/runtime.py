"""One process's view of the machine: its device, the other processes, and how weights are spread over them.

The only place, with `ranks.py` and `zero.py`, that knows accelerate, DeepSpeed and torch.distributed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reflectvlm.train.compute import Compute
from reflectvlm.train.ranks import Ranks
from reflectvlm.train.weights import Shared, Weights, Whole


@dataclass(frozen=True, kw_only=True, eq=False)
class Runtime:
    """Example: `Runtime(compute=Compute(kind="zero2")).weights(module, optimizer, max_grad_norm=1.0)`"""

    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        if not isinstance(self.compute, Compute):
            raise ValueError(  # noqa: TRY004 - what a user wrote in a recipe
                f"compute is {self.compute!r}. It takes Compute, in a recipe compute=ddp or another file of "
                "recipes/compute/, or {_target_: reflectvlm.train.compute.Compute, kind: zero2}."
            )

    @functools.cached_property
    def ranks(self) -> Ranks:
        ranks = Ranks.joined()
        self.compute.check(ranks.world)
        return ranks

    @functools.cached_property
    def device(self) -> torch.device:
        from accelerate import PartialState

        _ = self.ranks  # joins first, which says which device is whose
        device: torch.device = PartialState().device
        # A CPU has no number: weights "moved" to cpu:0 are copied, out of the memory that DeepSpeed shares.
        return torch.device("cpu") if device.type == "cpu" else device

    def sum(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Each value added over ranks."""
        return self.ranks.sum(values)

    def weights(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float
    ) -> Weights:
        """The weights of `module`, spread as the settings say and trained by `optimizer`."""
        ranks = self.ranks
        if self.compute.stage:
            from reflectvlm.train.zero import sharded

            return sharded(module, optimizer, self.compute, ranks, max_grad_norm)
        if ranks.world > 1:
            return Shared(
                module=module,
                optimizer=optimizer,
                max_grad_norm=max_grad_norm,
                ranks=ranks,
                bucket=self.compute.bucket,
            )
        return Whole(module=module, optimizer=optimizer, max_grad_norm=max_grad_norm)
