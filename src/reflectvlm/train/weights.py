"""The weights of a run and how they take a step, on one process or on many.

    loss = weights.run(lambda: ...)      a forward pass
    weights.backward(loss)               as often as there are passes; last=True with the last one
    norm = weights.step()                the update; NaN or infinite: there was none

`Whole` is one process. `Shared` is data parallelism: everybody has the same weights, and gradients are added
once per update, because a step has many backward passes and torch's wrapper would add them at each, or miss
those of the vision tower, which come in a pass of their own. ZeRO is in `zero.py`.

Gradients are *added* over ranks: the loss of a pass is already divided by the counts of the whole update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from reflectvlm.interrupt import committed
from reflectvlm.models.adapters import load_stored, stored
from reflectvlm.train.ranks import Ranks

T = TypeVar("T")


class Weights(Protocol):
    """See the top of this file."""

    in_step: bool
    """Every process must make as many passes as the others, each through the same layers."""
    gathers: bool
    """What `state` gives was made for whoever asked; otherwise it is what is in use."""

    def run(self, function: Callable[[], T]) -> T:
        """A forward pass."""
        ...

    def backward(self, loss: Tensor, *, last: bool = False, again: bool = False) -> None:
        """`again`: the loss is made of gradients that an earlier pass gave."""
        ...

    def step(self) -> float:
        """Takes one step with the gradients so far, cut to the largest norm; returns their norm before. If it
        is no number the weights stay."""
        ...

    def clear(self) -> None:
        """Forgets gradients."""
        ...

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Within the block every process has all weights, and passes need not be in step."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """State of module and optimiser, whole, as one process would have it; on the first rank only. All
        must call it."""
        ...

    def load(self, module: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        """Puts back what `state` gave, under whichever setting it was given."""
        ...


@dataclass(kw_only=True, eq=False)
class Whole:
    """Satisfies `Weights` in one process."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    in_step = False
    gathers = False

    def run(self, function: Callable[[], T]) -> T:
        return function()

    def backward(self, loss: Tensor, *, last: bool = False, again: bool = False) -> None:  # noqa: ARG002
        loss.backward()

    def step(self) -> float:
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm))
        if norm - norm == 0:  # neither NaN nor infinite
            committed()
            self.optimizer.step()
        return norm

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def whole(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return stored(self.module), self.optimizer.state_dict()

    def load(self, module: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        load_stored(self.module, module)
        self.optimizer.load_state_dict(dict(optimizer))


@dataclass(kw_only=True, eq=False)
class Shared:
    """Satisfies `Weights` in several processes that all have the same weights."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    ranks: Ranks
    bucket: int
    """Numbers that are added at one time."""
    in_step = False
    gathers = False

    def __post_init__(self) -> None:
        self._one = Whole(module=self.module, optimizer=self.optimizer, max_grad_norm=self.max_grad_norm)
        self._start_alike()

    def run(self, function: Callable[[], T]) -> T:
        return function()

    def backward(self, loss: Tensor, *, last: bool = False, again: bool = False) -> None:  # noqa: ARG002
        loss.backward()

    def step(self) -> float:
        trained = [one for one in self.module.parameters() if one.requires_grad]
        used = self.ranks.most([float(one.grad is not None) for one in trained])
        with self.ranks.heard():
            for group in self._buckets([one for one, some in zip(trained, used, strict=True) if some]):
                self._add(group)
        return self._one.step()

    def clear(self) -> None:
        self._one.clear()

    def whole(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._one.state()

    def load(self, module: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        self._one.load(module, optimizer)

    def _start_alike(self) -> None:
        """Weights that were drawn at random, such as those of adapters, are the first rank's everywhere."""
        with torch.no_grad(), self.ranks.heard():
            for parameter in self.module.parameters():
                if parameter.requires_grad:
                    torch.distributed.broadcast(parameter, src=0)

    def _buckets(self, parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Parameters in their order, of one dtype and about `bucket` numbers each. What nobody has a gradient
        for is left out: zeros would let it decay."""
        group: list[nn.Parameter] = []
        for parameter in parameters:
            full = sum(one.numel() for one in group) + parameter.numel() > self.bucket
            if group and (full or group[0].dtype != parameter.dtype):
                yield group
                group = []
            group.append(parameter)
        if group:
            yield group

    def _add(self, group: list[nn.Parameter]) -> None:
        """Adds a bucket's gradients over ranks. Where a process has none, as when its rows show no image,
        its share is 0."""
        grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in group]
        flat = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(flat)
        for parameter, grad, added in zip(
            group, grads, flat.split([grad.numel() for grad in grads]), strict=True
        ):
            parameter.grad = grad.copy_(added.view_as(grad))
