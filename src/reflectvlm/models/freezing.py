"""Which parts of a model train. Frozen parameters require no gradient and are in no optimiser.

Of the embedding and the head it may be only some rows, as in Qwen-LA's SFT: those of the new tags.
Nothing is wrapped, so the model saves as ever: a hook empties the gradient of all other rows, and
`AdamW.build` puts such a parameter into a group without weight decay. What it costs: gradient and
moments are still held for the whole matrix.

LoRA (`lora.py`) and `peft.get_peft_model` freeze everything they find, so `train_only_rows` comes after them.
DeepSpeed: give it the optimiser that `AdamW.build` made; one made from its own configuration decays
every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from reflectvlm.models.families import PROJECTORS
from reflectvlm.models.new_tags import matrices
from reflectvlm.models.quantized import count

Part = Literal["vision", "projector", "language"]
Embeddings = Literal["all", "new_tags"]

_ROWS = "_reflectvlm_trained_rows"
"""The attribute of a parameter that holds the rows that train."""


def part_of(name: str) -> Part:
    """The part a parameter belongs to. The projector is the merger between the vision tower and the
    language model, in Qwen3-VL those of DeepStack too; embedding and head are language."""
    if any(projector in name for projector in PROJECTORS):
        return "projector"
    return "vision" if "visual." in name else "language"


def freeze(model: Any, parts: Sequence[Part]) -> None:
    """Raises ValueError for an unknown part, and when nothing would be left to train."""
    known = get_args(Part)
    if isinstance(parts, str):
        raise ValueError(f"freeze_parts is {parts!r}. It is a list: [{parts}].")  # noqa: TRY004 - user's words
    if unknown := [part for part in parts if part not in known]:
        raise ValueError(f"Cannot freeze {unknown}. A model has the parts {known}.")
    if set(parts) == set(known):
        raise ValueError(f"Freezing {tuple(parts)} leaves nothing to train. Leave at least one part out.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in parts)


def check_embeddings(embeddings: Embeddings, new_tags: Sequence[str]) -> None:
    """Raises ValueError for an unknown word, and for new tags' rows without new tags."""
    if embeddings not in get_args(Embeddings):
        raise ValueError(f"embeddings is {embeddings!r}. It must be 'all' or 'new_tags'.")
    if embeddings == "new_tags" and not new_tags:
        raise ValueError(
            "embeddings='new_tags' trains the rows of new_tags, and there are none. Name them, e.g. "
            "new_tags=['<REFLECTION>', '</REFLECTION>'], or use embeddings='all'."
        )


def train_only_rows(model: Any, rows: Sequence[int]) -> None:
    """Of the input embedding and the head, tied or not, only these rows train; they do so even if
    everything around them is frozen. A second call replaces the rows of the first.

    Example, LoRA and two new tags: `train_only_rows(get_peft_model(model, lora), tag_ids)`
    """
    if not rows:
        raise ValueError("There are no rows to train. Give the ids that add_tags returned for your tags.")
    for weight in matrices(model):
        weight.requires_grad_(True)
        if trained_rows(weight) is None:
            # It runs once a gradient has arrived and before anything else reads it, so neither
            # accumulation nor clipping nor a reduction over ranks sees the other rows.
            weight.register_post_accumulate_grad_hook(_empty_other_rows)
        setattr(weight, _ROWS, tuple(sorted({*rows})))


def widen_trained_rows(model: Any) -> None:
    """Matrices of which rows train, in float32: small steps would be lost in a coarser base."""
    for weight in matrices(model):
        if trained_rows(weight) is not None and weight.dtype in (torch.bfloat16, torch.float16):
            weight.data = weight.data.float()


def trained_rows(parameter: Tensor) -> tuple[int, ...] | None:
    """The rows that train, or None if all of them do."""
    rows: tuple[int, ...] | None = getattr(parameter, _ROWS, None)
    return rows


def trainable_table(model: Any) -> list[tuple[str, int, int]]:
    """(part, parameters, parameters that train), for the start of a run."""
    counts = {part: [0, 0] for part in get_args(Part)}
    for name, parameter in model.named_parameters():
        of_part = counts[part_of(name)]
        of_part[0] += count(parameter)
        of_part[1] += numbers_that_train(parameter)
    return [(part, total, trains) for part, (total, trains) in counts.items()]


def numbers_that_train(parameter: Tensor) -> int:
    """How many of a parameter's numbers train."""
    if not parameter.requires_grad:
        return 0
    rows = trained_rows(parameter)
    return parameter.numel() if rows is None else len(rows) * parameter.shape[1]


def _empty_other_rows(parameter: Tensor) -> None:
    rows, gradient = trained_rows(parameter), parameter.grad
    assert rows is not None
    assert gradient is not None
    kept = gradient[list(rows)]
    gradient.zero_()
    gradient[list(rows)] = kept
