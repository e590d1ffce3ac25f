"""ZeRO (arXiv 1910.02054) through DeepSpeed: weights, gradients and moments shared among processes.

Every pass runs inside the engine's own forward, so that DeepSpeed's hooks fetch and free weights around the
layers as if the model had been called as a whole. In stages 2 and 3 a pass sends messages layer by layer:
all processes must make the same number of passes through the same layers, which the updater sees to.

What a checkpoint holds is put together on the first rank and is what one process would write; so a run goes
on with another stage or another number of processes. Left out: NVMe offload, and a checkpoint in shares for
models whose weights and moments do not fit into the first host's memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from reflectvlm.interrupt import committed
from reflectvlm.models.adapters import adapter_layers
from reflectvlm.models.freezing import trained_rows
from reflectvlm.train.compute import Compute
from reflectvlm.train.optim import optimizer_bits
from reflectvlm.train.ranks import Ranks

T = TypeVar("T")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def sharded(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    compute: Compute,
    ranks: Ranks,
    max_grad_norm: float,
) -> Zero:
    """The model and its optimiser, in shares. The model object stays the same."""
    check_shareable(module, optimizer, compute)
    order = [[*group["params"]] for group in optimizer.param_groups]
    dtypes = {parameter.dtype for group in order for parameter in group}
    half = dtypes == {torch.bfloat16}
    settings = compute.deepspeed(max_grad_norm=max_grad_norm, half=half)
    engine = _engine(settings, model=module, optimizer=optimizer)
    made = Zero(engine=engine, order=order, ranks=ranks, stage=compute.stage, base=optimizer)
    made.make_moments()  # before the first step: DeepSpeed looks for those of all groups after that of one
    return made


def check_shareable(module: nn.Module, optimizer: torch.optim.Optimizer, compute: Compute) -> None:
    """Raises ValueError for what ZeRO cannot divide."""
    quantised = any(hasattr(one, "quant_state") or hasattr(one, "SCB") for one in module.parameters())
    if compute.stage == 3 and quantised:
        raise ValueError(
            "compute is zero3, and the policy's base is quantised (policy.quantize): its weights cannot be "
            "shared. Take compute=zero2 or ddp, where only adapters are trained anyway."
        )
    if optimizer_bits(optimizer) == 8:
        raise ValueError(
            f"compute is {compute.kind}, and optimizer.bits is 8: ZeRO divides moments of 32 bits. Set "
            "optimizer.bits=32, or take compute=ddp."
        )


def sharded_frozen(module: nn.Module, compute: Compute) -> Any:
    """A frozen model in shares, for forward passes in step with the others; an engine."""
    settings = compute.deepspeed(max_grad_norm=1.0, half=False)
    settings["zero_optimization"].pop("offload_optimizer", None)
    return _engine(settings, model=module)


@dataclass(kw_only=True, eq=False)
class Zero:
    """Satisfies `weights.Weights`."""

    engine: Any
    order: Sequence[Sequence[nn.Parameter]]
    """Parameters of each of the optimiser's groups, as one process has them."""
    ranks: Ranks
    stage: int
    base: torch.optim.Optimizer
    """The optimiser that DeepSpeed steps on its shares."""
    in_step = True
    gathers = True

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.engine.module
        return module

    def run(self, function: Callable[[], T]) -> T:
        return through(self.engine, function)

    def backward(self, loss: Tensor, *, last: bool = False, again: bool = False) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over ranks where we add. A loss that is no number makes every gradient
        # none, and then DeepSpeed takes no step.
        world = 1.0 if again else float(self.ranks.world)
        with self.ranks.heard():
            self.engine.backward(loss * torch.where(loss.detach().isfinite(), world, float("nan")))

    def step(self) -> float:
        with self.ranks.heard():
            committed()
            self.engine.step()
        if getattr(self.engine.optimizer, "overflow", False):
            return float("nan")
        return float(self.engine.get_global_grad_norm())

    def clear(self) -> None:
        """Nothing: DeepSpeed forgets gradients at every step, also at one that it does not take."""

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        with gathered(self.engine) if self.stage == 3 else contextlib.nullcontext():
            yield

    # -- checkpoints ------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        known = {id(one): one for group in self.order for one in group}
        states: dict[int, dict[str, Tensor]] = {}
        masters: dict[int, Tensor] = {}
        for number, parameter in enumerate(known.values()):
            masters[id(parameter)] = self._kept(safe_get_full_fp32_param(parameter), parameter)
            if self._stepped:
                moments = {name: safe_get_full_optimizer_state(parameter, name) for name in _MOMENTS}
                states[number] = {"step": self._steps()} | {
                    name: self._kept(value, parameter) for name, value in moments.items()
                }
        with self._all_there(frozen_only=True):
            module = {
                name: masters[id(kept)] if id(kept) in masters else kept.detach().cpu()
                for name, kept in self._named().items()
                if self.ranks.first
            }
        if not self.ranks.first:
            return {}, {"state": {}, "param_groups": []}
        if adapter_layers(self.module):
            named = self._named()
            module = {name: _of_rows(value, trained_rows(named[name])) for name, value in module.items()}
        return module, {"state": states, "param_groups": self._groups()}

    def load(self, module: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        known = {id(one): one for group in self.order for one in group}
        named = self._named()
        names = {id(kept): name for name, kept in named.items()}
        for number, parameter in enumerate(known.values()):
            value = self._completed(parameter, module[names[id(parameter)]])
            self._give(parameter, value)  # the one that is stepped; and the one that is used:
            with self._one_there(parameter), torch.no_grad():
                parameter.copy_(value)
            for name in _MOMENTS:
                kept = optimizer["state"].get(number)
                if kept is not None:
                    self._give(parameter, kept[name].to(self.engine.device), name)
        if optimizer["state"]:
            self._set_steps(next(iter(optimizer["state"].values()))["step"])
        self._load_rest(module, {name: kept for name, kept in named.items() if id(kept) not in known})

    def _give(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """The whole value of a parameter's master weight, or of a moment, to whoever has shares of it."""
        from deepspeed import utils

        which = () if moment is None else (moment,)
        if self.stage < 3:
            setter = utils.safe_set_full_fp32_param if moment is None else utils.safe_set_full_optimizer_state
            setter(parameter, value, *which)
            return
        # DeepSpeed cuts a whole value without room for the filling of the last share: not every number of
        # processes divides it.
        share: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        size = share.numel()
        filled = nn.functional.pad(value.flatten(), (0, size * self.ranks.world - value.numel()))
        setter = utils.safe_set_local_fp32_param if moment is None else utils.safe_set_local_optimizer_state
        setter(parameter, filled.narrow(0, size * self.ranks.rank, size), *which)

    def _load_rest(self, module: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> None:
        """Frozen parameters and buffers: they came from the same files, and are checked to."""
        with self._all_there(frozen_only=True), torch.no_grad():
            for name, kept in rest.items():
                if name in module and not torch.equal(module[name], kept.detach().cpu()):
                    if isinstance(kept, nn.Parameter) and self.stage == 3:
                        raise ValueError(
                            f"The checkpoint's frozen weight {name!r} is not the policy's. Start from the "
                            "model that the run began with."
                        )
                    kept.copy_(module[name])

    def _named(self) -> dict[str, Tensor]:
        """What a checkpoint holds (`adapters.stored`), by the names of a state dict: tied parameters under
        each of theirs."""
        found = self.module.state_dict(keep_vars=True)
        kept = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        if not adapter_layers(self.module):
            return kept
        return {
            name: value
            for name, value in self.module.named_parameters()
            if "lora_" in name or value.requires_grad
        }

    def _completed(self, parameter: nn.Parameter, stored: Tensor) -> Tensor:
        """The whole parameter of which a checkpoint may hold only the rows that train."""
        from deepspeed.utils import safe_get_full_fp32_param

        device = self.engine.device
        rows = trained_rows(parameter) if adapter_layers(self.module) else None
        if rows is None:
            return stored.to(device)
        whole: Tensor = safe_get_full_fp32_param(parameter).detach().clone()
        whole = whole.view(getattr(parameter, "ds_shape", parameter.shape))
        whole[list(rows)] = stored.to(device, whole.dtype)
        return whole

    def _kept(self, value: Tensor | None, parameter: nn.Parameter) -> Tensor:
        assert value is not None, "DeepSpeed has no share of a parameter that trains"
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return value.detach().cpu().view(shape) if self.ranks.first else value.new_empty(0)

    def _one_there(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        """Within the block a parameter is whole; what the first process writes is kept."""
        if self.stage < 3:
            return contextlib.nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        there: contextlib.AbstractContextManager[Any] = GatheredParameters([parameter], modifier_rank=0)
        return there

    @contextlib.contextmanager
    def _all_there(self, *, frozen_only: bool = False) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        wanted = [one for one in self.module.parameters() if not (frozen_only and one.requires_grad)]
        with GatheredParameters(wanted):
            yield

    # -- the optimiser that DeepSpeed steps on flat shares ------------------------------------------

    @property
    def _stepped(self) -> bool:
        return float(self._steps()) > 0

    def _flat(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        if self.stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    def make_moments(self) -> None:
        """A share's moments exist only after its first step; a run that is taken up has them before."""
        for flat in self._flat():
            state = self.base.state[flat]
            state.setdefault("step", torch.zeros((), dtype=torch.float32, device=flat.device))
            for name in _MOMENTS:
                state.setdefault(name, torch.zeros_like(flat))
        if link := getattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state", None):
            link()

    def _steps(self) -> Tensor:
        return self.base.state[self._flat()[0]]["step"].detach().cpu().clone()

    def _set_steps(self, steps: Tensor) -> None:
        for flat in self._flat():
            self.base.state[flat]["step"].copy_(steps)

    def _groups(self) -> list[dict[str, Any]]:
        """The groups as the optimiser of one process would write them."""
        groups, number = [], 0
        for settings, parameters in zip(self.base.param_groups, self.order, strict=True):
            kept = {name: value for name, value in settings.items() if name != "params"}
            groups.append(kept | {"params": list(range(number, number + len(parameters)))})
            number += len(parameters)
        return groups


def _of_rows(value: Tensor, rows: Sequence[int] | None) -> Tensor:
    return value if rows is None else value[list(rows)]


def through(engine: Any, function: Callable[[], T]) -> T:
    """`function()` as the forward of the engine's model."""
    engine.module.forward = function
    try:
        result: T = engine()
        return result
    finally:
        del engine.module.forward


@contextlib.contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """Within the block all weights of a zero3 model are there, fetched once, and no layer fetches or frees
    any: as many passes as one likes, of whatever shape."""
    from deepspeed.runtime.zero import GatheredParameters

    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    parameters = list(engine.module.parameters())
    with GatheredParameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.clear()
        offload._remove_module_hooks()
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        try:
            yield
        finally:
            # What the layers were called in before says nothing about the passes that come.
            coordinator = offload.param_coordinator
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()
            offload._register_deepspeed_module(engine.module)


def _engine(settings: dict[str, Any], **parts: Any) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Told by DeepSpeed of torch's names and of its own progress, and nothing that a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|deepspeed)")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if not torch.distributed.is_initialized():
        _join_itself()
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
    engine, *_ = deepspeed.initialize(config=settings, **parts)
    return engine


def _join_itself() -> None:
    """DeepSpeed wants a group also of a single process, e.g. for moments in host memory."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")  # where DeepSpeed looks for its device
