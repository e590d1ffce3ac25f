"""The reference of the KL term: the policy as it is when the run begins.

With LoRA it is the policy itself with its adapters switched off, so that no second model is held. Beside
adapters only rows of new tags train (`freezing.py`); for the time of a reference pass they hold what they
held at the start. Everything else is frozen and so is the start already.

Otherwise, and where adapters change something already, it is a frozen copy.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reflectvlm.batch import Batch, ReferenceStates, TokenScores
from reflectvlm.models.adapters import adapter_layers, change_nothing, switched_off
from reflectvlm.models.freezing import trained_rows
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.types import Patches

log = logging.getLogger("reflectvlm")


def make_reference(policy: QwenVL) -> QwenVL | AdaptersOff:
    """Call it before anything trains. It takes the policy's features and scores, without gradients."""
    if adapter_layers(policy.module):
        if change_nothing(policy.module):
            return AdaptersOff(policy=policy)
        log.info(
            "The adapters have been trained before this run, so switching them off would not give its start: "
            "the reference is a copy of the whole model"
        )
    frozen = copy.deepcopy(policy.model).requires_grad_(False).eval()
    if policy.compute is None or adapter_layers(policy.module):
        return dataclasses.replace(policy, model=frozen)
    # It takes no small steps, so it needs no float32 weights.
    frozen = frozen.to(getattr(torch, policy.compute))
    return dataclasses.replace(policy, model=frozen, compute=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class AdaptersOff:
    """The policy as it began, on its own weights. `with reference.as_it_began() as policy:` gives it whole;
    `features`, `score` and `states` are what a KL term asks."""

    policy: QwenVL
    _rows: tuple[_Rows, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        held = []
        for parameter in self.policy.module.parameters():
            rows = trained_rows(parameter)
            if rows is not None:
                held.append(_Rows(parameter, list(rows), parameter.detach()[list(rows)].clone()))
        object.__setattr__(self, "_rows", tuple(held))

    @property
    def module(self) -> nn.Module:
        """The policy's own: what is written to it is written to the policy."""
        return self.policy.module

    @property
    def share_prefix(self) -> bool:
        return self.policy.share_prefix

    def features(self, images: Sequence[Patches]) -> Float[Tensor, "V F"]:
        with self.as_it_began() as policy:
            return policy.features(images)

    def score(
        self,
        batch: Batch,
        features: Float[Tensor, "V F"],
        temperature: float = 1.0,
        *,
        entropy: bool = True,
    ) -> TokenScores:
        with self.as_it_began() as policy:
            return policy.score(batch, features, temperature, entropy=entropy)

    def states(self, batch: Batch, features: Float[Tensor, "V F"]) -> ReferenceStates:
        """Satisfies `protocols.Reference`."""
        with self.as_it_began() as policy:
            states = policy.states(batch, features)
            if not self._rows:
                return states
            # The head, of which rows train, is what it was only in here.
            return dataclasses.replace(states, weight=states.weight.clone())

    @contextmanager
    def as_it_began(self) -> Iterator[QwenVL]:
        """Inside, the policy is the reference. No gradients; what trains is afterwards what it was, bit for
        bit, even for a graph that was made before."""
        with torch.no_grad(), switched_off(self.policy.module), _exchanged(self._rows):
            yield self.policy


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of a matrix, as they were at the start."""

    matrix: Tensor
    places: list[int]
    start: Tensor

    def put(self, values: Tensor) -> None:
        # Past autograd's count of writes: the rows come back before anything goes back through them.
        self.matrix.data[self.places] = values.to(self.matrix.device, self.matrix.dtype)


@contextmanager
def _exchanged(held: Sequence[_Rows]) -> Iterator[None]:
    now: list[Any] = [(rows, rows.matrix.detach()[rows.places].clone()) for rows in held]
    try:
        for rows in held:
            rows.put(rows.start)
        yield
    finally:
        for rows, values in now:
            rows.put(values)
