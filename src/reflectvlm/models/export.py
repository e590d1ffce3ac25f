"""A trained model as folders that others load: the merged model, and the adapter as peft keeps one.

    folder/            stock `from_pretrained`: W + (alpha / rank) B A where an adapter was, and the new rows
    folder/adapter/    `peft.PeftModel.from_pretrained(base, …)`: A and B, and the rows of new tags

Merging happens beside the model: for the time of saving other layers stand in its adapters' places, so that
training can go on with the very bits. A quantised base is dequantised, and its whole export is bfloat16: it
is the model that was trained, up to that rounding, and no longer small.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reflectvlm.models.adapters import ADAPTER, adapter_layers
from reflectvlm.models.freezing import trained_rows
from reflectvlm.models.quantized import dequantized, quantized_layers

log = logging.getLogger("reflectvlm")

_OF_LOADING = ("hf_quantizer", "hf_device_map")
"""What transformers remembers of a quantised loading, and would save by."""


@contextmanager
def merged(model: Any) -> Iterator[Any]:
    """Inside, the model has plain linear layers that compute what its adapters and quantised ones did, on the
    CPU. Nothing but saving may happen there."""
    adapted, quantized = adapter_layers(model), dict(quantized_layers(model))
    if not adapted and not quantized:
        yield model
        return
    with ExitStack() as stack:
        base = _base_dtype(model, adapted)
        dtype = torch.bfloat16 if quantized else None
        if quantized:
            log.info("the base is quantised: the exported model is dequantised, in bfloat16")
        inside = tuple(f"{name}." for name in adapted)
        alone = {name: layer for name, layer in quantized.items() if not name.startswith(inside)}
        for name, layer in (adapted | alone).items():
            stack.enter_context(_in_place(model, name, stand_in(layer, dtype)))
        stack.enter_context(_in_dtype(model, dtype or base))
        stack.enter_context(_not_quantized(model))
        yield model


@torch.no_grad()
def stand_in(layer: Any, dtype: torch.dtype | None = None) -> nn.Linear:
    """A plain linear layer, on the CPU, that computes what `layer` with its adapter does. `dtype`: None is
    that of its weight."""
    base = getattr(layer, "base_layer", layer)
    weight = dequantized(base)
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if base is not layer:
        exact = _corrected(layer, exact)
    made = nn.Linear(exact.shape[1], exact.shape[0], bias=base.bias is not None, device="meta")
    dtype = weight.dtype if dtype is None else dtype
    made.weight = nn.Parameter(exact.to(dtype).cpu(), requires_grad=False)
    if base.bias is not None:
        made.bias = nn.Parameter(base.bias.detach().to(dtype).cpu(), requires_grad=False)
    return made


def _corrected(layer: Any, weight: Tensor) -> Tensor:
    """W + s B A; with DoRA each row at its own length m: m (W + s B A) / |W + s B A|."""
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    corrected = weight + layer.scaling[ADAPTER] * (b.to(weight.dtype) @ a.to(weight.dtype))
    if ADAPTER not in layer.lora_magnitude_vector:
        return corrected
    lengths = layer.lora_magnitude_vector[ADAPTER].weight.to(weight.dtype)
    return corrected * (lengths / corrected.norm(dim=1))[:, None]


def save_adapter(model: Any, folder: Path, source: str) -> None:
    """The adapter as peft keeps it; nothing if the model has none. `source` is where its base lies."""
    if not adapter_layers(model):
        return
    from safetensors.torch import save_file

    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}', '')}": parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    rows = {}
    for name, parameter in model.named_parameters():
        if (trained := trained_rows(parameter)) is not None:
            module = name.removesuffix(".weight")
            rows[module.rpartition(".")[2]] = list(trained)
            key = f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
            tensors[key] = parameter.detach()[list(trained)].cpu().contiguous()
    settings = copy.deepcopy(model.peft_config[ADAPTER])
    settings.inference_mode = True
    settings.base_model_name_or_path = source
    settings.trainable_token_indices = rows or None
    folder.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# -- for the time of saving -----------------------------------------------------------------------


@contextmanager
def _in_place(model: nn.Module, name: str, other: nn.Module) -> Iterator[None]:
    real = model.get_submodule(name)
    model.set_submodule(name, other)
    try:
        yield
    finally:
        model.set_submodule(name, real)


@contextmanager
def _in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Floating-point weights in one dtype: matrices whose rows train are float32 beside a coarser base."""
    real = [(p, p.data) for p in model.parameters() if p.is_floating_point() and p.dtype != dtype]
    try:
        for parameter, values in real:
            parameter.data = values.to(dtype)
        yield
    finally:
        for parameter, values in real:
            parameter.data = values


@contextmanager
def _not_quantized(model: Any) -> Iterator[None]:
    held = {name: vars(model).pop(name) for name in _OF_LOADING if name in vars(model)}
    settings = vars(model.config).pop("quantization_config", None)
    try:
        yield
    finally:
        vars(model).update(held)
        if settings is not None:
            model.config.quantization_config = settings


def _base_dtype(model: nn.Module, adapted: dict[str, Any]) -> torch.dtype:
    """That of the weights which were loaded."""
    for layer in adapted.values():
        if layer.base_layer.weight.is_floating_point():
            dtype: torch.dtype = layer.base_layer.weight.dtype
            return dtype
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
