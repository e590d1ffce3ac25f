"""Any nested state as tensors + JSON, so that a checkpoint needs no pickle: optimisers, random generators.

Left out: objects of other classes, which `pack` refuses by name.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

JSON: TypeAlias = Any
"""What `json` can write: None, bool, int, float, str, and lists and string-keyed dicts of them."""

logger = logging.getLogger(__name__)


class Packed(NamedTuple):
    """A nested Python value taken apart: its tensors by path, and JSON with the rest."""

    tensors: dict[str, Tensor]
    json: JSON


def pack(value: Any) -> Packed:
    """Take a nest of dicts, lists, tuples, numbers, strings and tensors apart. `unpack` undoes it
    exactly: tuples stay tuples, int keys stay ints, dtypes stay."""
    tensors: dict[str, Tensor] = {}
    return Packed(tensors, _encode(value, "", tensors))


def unpack(tensors: Mapping[str, Tensor], packed: JSON) -> Any:
    """The value that `pack` took apart."""
    if not isinstance(packed, dict):
        return packed
    ((kind, body),) = packed.items()
    if kind == "tensor":
        return tensors[body]
    if kind == "dict":
        return {unpack(tensors, key): unpack(tensors, item) for key, item in body}
    items = [unpack(tensors, item) for item in body]
    return tuple(items) if kind == "tuple" else items


def optimizer_to_tensors(state_dict: Mapping[str, Any]) -> Packed:
    """An optimiser's (or schedule's) `state_dict()` without pickle; exact for AdamW."""
    return pack(dict(state_dict))


def optimizer_from_tensors(tensors: Mapping[str, Tensor], packed: JSON) -> dict[str, Any]:
    """What to give to `optimizer.load_state_dict`."""
    state: dict[str, Any] = unpack(tensors, packed)
    return state


def rng_state() -> Packed:
    """The global random states of python, numpy, torch and every CUDA device."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return pack(
        {
            "python": random.getstate(),
            "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
    )


def set_rng_state(tensors: Mapping[str, Tensor], packed: JSON) -> None:
    """Put the states of `rng_state` back."""
    state = unpack(tensors, packed)
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices != len(state["cuda"]):
        logger.warning(
            "The checkpoint holds random states of %d CUDA devices, this machine has %d: what is drawn "
            "on a GPU will differ from the interrupted run.",
            len(state["cuda"]),
            devices,
        )
    for device, one in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(one.cpu(), device)


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> JSON:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = path or "value"
        while name in tensors:  # the keys 1 and "1" read the same
            name += "'"
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {
            "dict": [
                [_encode(key, f"{path}/{key}?", tensors), _encode(item, f"{path}/{key}".lstrip("/"), tensors)]
                for key, item in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        items = [_encode(item, f"{path}/{i}".lstrip("/"), tensors) for i, item in enumerate(value)]
        return {kind: items}
    raise ValueError(
        f"{path or 'The value'} is a {type(value).__name__}, which a checkpoint cannot hold. "
        "Convert it to numbers, strings, lists, dicts or tensors."
    )
