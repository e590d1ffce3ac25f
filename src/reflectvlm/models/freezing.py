"""Which parts of a model train. Frozen parameters require no gradient and are in no optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

Part = Literal["vision", "projector", "language"]


def part_of(name: str) -> Part:
    """The part a parameter of Qwen2-VL or Qwen2.5-VL belongs to. The projector is the merger
    between the vision tower and the language model; embedding and head are language."""
    if "visual.merger" in name:
        return "projector"
    return "vision" if "visual." in name else "language"


def freeze(model: Any, parts: Sequence[Part]) -> None:
    """Raises ValueError for an unknown part, and when nothing would be left to train."""
    known = get_args(Part)
    if unknown := [part for part in parts if part not in known]:
        raise ValueError(f"Cannot freeze {unknown}. A model has the parts {known}.")
    if set(parts) == set(known):
        raise ValueError(f"Freezing {tuple(parts)} leaves nothing to train. Leave at least one part out.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in parts)


def trainable_table(model: Any) -> list[tuple[str, int, int]]:
    """(part, parameters, parameters that train), for the start of a run."""
    rows = {part: [0, 0] for part in get_args(Part)}
    for name, parameter in model.named_parameters():
        counts = rows[part_of(name)]
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() * parameter.requires_grad
    return [(part, total, trains) for part, (total, trains) in rows.items()]
