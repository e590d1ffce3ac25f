"""What a checkpoint of a run holds, and whether it fits the run that takes it up.

    tensors   model (with adapters only what trains), optimizer, rng, and what the trainer adds (a reference
              that moves)
    state     the trainer's numbers, the loop's own, and `about`: what all of it belongs to

Left out: the recipe, which the run folder compares setting by setting (`changes.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from reflectvlm.data.fingerprint import fingerprint
from reflectvlm.models.adapters import about_adapters
from reflectvlm.stages import named_files
from reflectvlm.train.checkpoint import Checkpoint
from reflectvlm.train.optim import optimizer_bits
from reflectvlm.train.packing import (
    JSON,
    optimizer_from_tensors,
    optimizer_to_tensors,
    rng_state,
    set_rng_state,
)
from reflectvlm.train.ranks import Ranks
from reflectvlm.train.run import Trainable
from reflectvlm.train.update import first_broken_weight

log = logging.getLogger("reflectvlm")

_VERSIONS = ("reflectvlm", "torch", "transformers")


def snapshot(
    trainer: Trainable, about: Mapping[str, JSON], loop: Mapping[str, JSON]
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, JSON]]:
    """(tensors, state) of a run between two steps; the tensors are those in use, not copies. All processes
    must call it; only the first one's is whole."""
    module, optimizer = trainer.updater.weights.state()
    packed, generators = optimizer_to_tensors(optimizer), rng_state()
    tensors: dict[str, Mapping[str, Tensor]] = {
        "model": module,
        "optimizer": packed.tensors,
        "rng": generators.tensors,
        **trainer.tensors(),
    }
    state = {
        "trainer": _joined(trainer.state(), trainer.ranks),
        "optimizer": packed.json,
        "rng": generators.json,
        "loop": dict(loop),
        "about": dict(about),
    }
    return tensors, state


def put_back(trainer: Trainable, checkpoint: Checkpoint, about: Mapping[str, JSON]) -> dict[str, JSON]:
    """Makes the trainer what it was; returns the loop's own part of the state.

    Raises ValueError if the checkpoint belongs to another model, tokenizer or data, before anything has
    changed, and RuntimeError if its weights are no numbers.
    """
    _check_same(checkpoint, about)
    updater = trainer.updater
    packed = checkpoint.tensors["optimizer"], checkpoint.state["optimizer"]
    moments = optimizer_from_tensors(*packed)
    _check_kind(updater.optimizer, moments)
    with _own_settings(updater.optimizer):
        updater.weights.load(checkpoint.tensors["model"], moments)
    with updater.weights.whole():
        broken = first_broken_weight(trainer.policy.module)
    if broken is not None:
        raise RuntimeError(
            f"{checkpoint.path}: the weight {broken!r} holds NaN or infinity, so it trains nothing. "
            "Resume from an earlier one with resume=PATH."
        )
    set_rng_state(checkpoint.tensors["rng"], checkpoint.state["rng"])
    trainer.load_state(_part(checkpoint.state["trainer"], trainer.ranks))
    trainer.load_tensors(checkpoint.tensors)
    return dict(checkpoint.state["loop"])


def about(trainer: Trainable) -> dict[str, JSON]:
    """What a checkpoint belongs to: parameters and whether they train, tokenizer, data, versions."""
    tokenizer = getattr(trainer.policy, "tokenizer", None)
    return {
        "parameters": _parameters(trainer.policy.module),
        "adapters": about_adapters(trainer.policy.module),
        "tokenizer": None if tokenizer is None else _tokenizer(tokenizer),
        "data": fingerprint(trainer.data),
        "files": _files(trainer.output.recipe_yaml),
        "versions": {name: _version(name) for name in _VERSIONS},
    }


_OF_EACH = "pending"
"""What of a trainer's state each process has some of: groups, each with its row's position in the data, which
says whose it is."""
_RUBRIC, _RUBRICS = "rubric", "rubrics"
"""Failures are counted by the process that asked. All else is the same in all of them."""


def _joined(state: dict[str, JSON], ranks: Ranks) -> dict[str, JSON]:
    if ranks.world == 1:
        return state
    everybody = ranks.gather({name: state[name] for name in (_OF_EACH, _RUBRIC) if name in state})
    joined = dict(state)
    if _OF_EACH in state:
        groups: list[Any] = [one for part in everybody for one in part[_OF_EACH]]
        joined[_OF_EACH] = sorted(groups, key=_position)
    if _RUBRIC in state:
        joined[_RUBRICS] = [part[_RUBRIC] for part in everybody]
    return joined


def _part(state: Mapping[str, JSON], ranks: Ranks) -> dict[str, JSON]:
    """The state with this process's part of what was joined, however many there were then."""
    own = dict(state)
    if _OF_EACH in own:
        own[_OF_EACH] = [one for one in own[_OF_EACH] if _position(one) % ranks.world == ranks.rank]
    if rubrics := own.pop(_RUBRICS, None):
        worst = max(rubrics, key=lambda one: int(one["failed"]))  # nobody is given a new budget
        own[_RUBRIC] = rubrics[ranks.rank] if len(rubrics) == ranks.world else worst
    return own


def _position(group: Mapping[str, Any]) -> int:
    return int(group["position"])


@contextlib.contextmanager
def _own_settings(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Rates, betas and decay stay as the run has them now, since those may have been changed, and the
    checkpoint's would quietly win."""
    own = [{name: one for name, one in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _check_kind(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Moments in 8 bits are none for an optimiser that wants them in 32."""
    bits = 8 if any("exp_avg" not in one for one in state["state"].values()) else 32
    if state["state"] and bits != optimizer_bits(optimizer):
        raise ValueError(
            f"The checkpoint's moments have {bits} bits, and optimizer.bits is {optimizer_bits(optimizer)}. "
            f"Set optimizer.bits={bits}, or start anew with resume=never."
        )


def _check_same(checkpoint: Checkpoint, now: Mapping[str, JSON]) -> None:
    before = checkpoint.state["about"]
    if difference := _first_difference(before["parameters"], now["parameters"]):
        raise ValueError(
            f"{checkpoint.path} belongs to another model: {difference}. Give the policy that it was "
            "trained with, or start anew with resume=never."
        )
    if before.get("adapters") != now["adapters"]:
        raise ValueError(
            f"{checkpoint.path} holds adapters for another base, or scaled otherwise (then "
            f"{before.get('adapters')}, now {now['adapters']}). Give the policy.path and policy.lora that "
            "they were trained with, or start anew with resume=never."
        )
    for name, remedy in (
        ("tokenizer", "Its ids would mean other words. Give the tokenizer that it was trained with"),
        ("data", "The place in them would mean other rows. Put the earlier rows back"),
    ):
        if before[name] != now[name]:
            raise ValueError(
                f"{checkpoint.path} was made with another {name} (then {_short(before[name])}, now "
                f"{_short(now[name])}). {remedy}, or start anew with resume=never."
            )
    for name in dict.fromkeys([*before["files"], *now["files"]]):
        if before["files"].get(name) != now["files"].get(name):
            log.warning(
                "The file that the recipe names by %r is another one than when %s was written: from here on "
                "this is another run than the one that began", name, checkpoint.path,
            )  # fmt: skip
    for name, version in now["versions"].items():
        if (then := before["versions"].get(name)) != version:
            log.warning(
                "%s is %s, and was %s when %s was written: the run goes on, but perhaps not bit for bit",
                name, version, then, checkpoint.path,
            )  # fmt: skip


def _files(recipe: str | None) -> dict[str, str]:
    """Digests of files that the recipe names beside its model and rows; those are looked at themselves."""
    import yaml

    values = yaml.safe_load(recipe) if recipe else {}
    apart = ("policy", "data", "output", "evaluation", "test", "compute")
    return named_files({key: one for key, one in values.items() if key not in apart})


def _parameters(module: nn.Module) -> dict[str, list[Any]]:
    """Name -> shape, dtype, whether it trains."""
    return {
        name: [
            list(getattr(one, "ds_shape", one.shape)),
            str(one.dtype).removeprefix("torch."),
            one.requires_grad,
        ]
        for name, one in module.named_parameters()
    }


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The whole one's, also where processes share it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _first_difference(then: Mapping[str, list[Any]], now: Mapping[str, list[Any]]) -> str | None:
    for name in dict.fromkeys([*then, *now]):
        if then.get(name) != now.get(name):
            return f"{name} is {_told(now.get(name))}, and was {_told(then.get(name))}"
    return None


def _told(parameter: list[Any] | None) -> str:
    if parameter is None:
        return "not there"
    shape, dtype, trains = parameter
    return f"{dtype} {'x'.join(map(str, shape)) or 'number'}, {'trained' if trains else 'frozen'}"


def _tokenizer(tokenizer: Any) -> str:
    """A digest of what turns text into ids: vocabulary, added tokens, chat template."""
    added = {str(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    parts = [sorted(tokenizer.get_vocab().items()), added, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    return str(value)[:12]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
