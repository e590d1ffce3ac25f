"""The table at the start of a run: what trains, and the memory that weights, gradients and moments take.

Per process, before anything is sharded. Of a matrix of which only rows train the gradient and the moments are
those of the whole matrix. Left out: activations, logits and the cache of rollouts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from reflectvlm.models.freezing import Part, numbers_that_train, part_of
from reflectvlm.models.quantized import count, stored_bytes
from reflectvlm.train.optim import AdamW
from reflectvlm.train.table import Table


@dataclass(frozen=True, kw_only=True)
class Memory:
    """One line of the table; bytes. Example: `memory_by_part(model, AdamW())["language"].gradients`"""

    parameters: int = 0
    trained: int = 0
    dtypes: tuple[str, ...] = ()
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(
            parameters=self.parameters + other.parameters,
            trained=self.trained + other.trained,
            dtypes=tuple(sorted({*self.dtypes, *other.dtypes})),
            weights=self.weights + other.weights,
            gradients=self.gradients + other.gradients,
            optimizer=self.optimizer + other.optimizer,
        )


def what_trains(model: Any, optimizer: AdamW | None) -> Table:
    """`optimizer` is the run's, or None where nothing is trained."""
    rows = memory_by_part(model, optimizer)
    said = f", AdamW with moments in {optimizer.bits} bits" if isinstance(optimizer, AdamW) else ""
    table = Table(
        f"what trains{said} (MiB)",
        ("part", "parameters", "trained", "dtype", "weights", "gradients", "optimiser"),
    )
    for name, row in [*rows.items(), ("all", _sum(rows.values()))]:
        sizes = (f"{size / 2**20:,.1f}" for size in (row.weights, row.gradients, row.optimizer))
        dtypes = " ".join(row.dtypes) if name != "all" else ""
        table.add(name, f"{row.parameters:,}", f"{row.trained:,}", dtypes, *sizes)
    return table


def memory_by_part(model: Any, optimizer: AdamW | None = None) -> dict[str, Memory]:
    """Vision, projector, language, and what adapters each have got."""
    parts = get_args(Part)
    found: dict[str, list[Memory]] = {name: [] for name in (*parts, *(f"{part} adapters" for part in parts))}
    for name, parameter in model.named_parameters():
        suffix = " adapters" if "lora_" in name else ""
        found[f"{part_of(name)}{suffix}"].append(_memory(parameter, optimizer))
    return {name: _sum(each) for name, each in found.items() if each}


def _memory(parameter: Tensor, optimizer: AdamW | None) -> Memory:
    trained = numbers_that_train(parameter)
    own = parameter.numel() * parameter.element_size()
    return Memory(
        parameters=count(parameter),
        trained=trained,
        dtypes=(_dtype(parameter),),
        weights=stored_bytes(parameter),
        gradients=own if trained else 0,
        optimizer=optimizer.state_bytes(parameter) if trained and isinstance(optimizer, AdamW) else 0,
    )


def _dtype(parameter: Tensor) -> str:
    kind = {"Params4bit": "4-bit", "Int8Params": "int8"}.get(type(parameter).__name__)
    return kind or str(parameter.dtype).removeprefix("torch.")


def _sum(rows: Iterable[Memory]) -> Memory:
    return sum(rows, Memory())
