"""The adapters of a model: found, switched off for a while, stored without their base.

An adapter layer is known by what peft's layers have, a `base_layer` and a `lora_A`, so nothing here imports
peft, and a model without adapters is simply one in which none is found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reflectvlm.models.freezing import trained_rows

ADAPTER = "default"
"""peft's name for the one adapter that a policy has."""
_SAMPLE = 4096
"""Numbers of each frozen tensor that go into `base_digest`."""


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> layer, of every layer with an adapter."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
    }


def change_nothing(model: nn.Module) -> bool:
    """Whether the model is still its base: B of every adapter is 0, and so is what it adds. (DoRA's lengths
    are then those of the base, unless somebody has set them.)"""
    factors = [b.weight for layer in adapter_layers(model).values() for b in layer.lora_B.values()]
    return not any(bool(factor.any()) for factor in factors)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base does. What trains, its gradients and a graph that is alive
    are untouched."""
    layers = list(adapter_layers(model).values())
    training = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, required in training:  # peft takes all of an adapter to train
            parameter.requires_grad_(required)


# -- checkpoints ----------------------------------------------------------------------------------


def stored(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: with adapters these and what trains beside them (of a matrix of
    which only rows train, those), for all else is loaded from where the policy is; without, all of it."""
    if not adapter_layers(module):
        return module.state_dict()
    found = {}
    for name, parameter in module.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            rows = trained_rows(parameter)
            found[name] = parameter.detach() if rows is None else parameter.detach()[list(rows)]
    return found


def load_stored(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `stored` gave. The caller has compared the parameters' names, shapes and dtypes."""
    if not adapter_layers(module):
        module.load_state_dict(dict(tensors))
        return
    now = stored(module)
    if now.keys() != tensors.keys():
        wrong = sorted(now.keys() ^ tensors.keys())
        raise ValueError(
            f"The checkpoint's adapters are not this policy's: {wrong[0]!r} is in one of them only. Give the "
            "policy.lora that it was trained with, or start anew with resume=never."
        )
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            rows = trained_rows(parameters[name])
            parameters[name][list(rows) if rows is not None else slice(None)] = tensor.to(
                parameters[name].device
            )


def about_adapters(module: nn.Module) -> dict[str, Any] | None:
    """What a checkpoint without its base belongs to: how adapters are scaled, and which base they correct.
    None where there are none."""
    layers = adapter_layers(module)
    if not layers:
        return None
    scales = sorted({float(scale) for layer in layers.values() for scale in layer.scaling.values()})
    return {"scales": scales, "base": base_digest(module)}


def base_digest(module: nn.Module) -> str:
    """sha256 over a sample of every parameter that is no adapter's: another fine-tuning of a model differs in
    all of them. Before anything has trained; the same on every device."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            continue
        flat = parameter.data.reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLE)].cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
