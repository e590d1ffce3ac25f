"""Shared-prefix packing: the rollouts of one prompt as one row, the prompt once.

A group of G rows `prompt + answer` becomes one row `prompt + answer_1 + … + answer_G`. Each answer
attends to the prompt and to itself, and its positions are those it has unpacked, so log-probs and
gradients are those of the unpacked rows, at a cost of P + G A tokens instead of G (P + A). For a
vision-language model, whose prompt is mostly image, that is most of the work.

Packed rows either lie beside each other and attend through a mask [N, 1, S, S] (`dense`: the portable
reference), or one behind the other as one line that attends along a `Tree` (`tree_attention.py`).

This is a way to compute hidden states and nothing else: batches, losses and trainers see plain rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reflectvlm.batch import Batch
from reflectvlm.models.tree import Line, beside
from reflectvlm.models.tree_attention import Kind, Tree, tree


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """N packed rows of at most S tokens, or one line of S."""

    ids: Int[Tensor, "N S"]
    positions: Int[Tensor, "3 N S"]
    visual: Int[Tensor, "N S"]
    where: Int[Tensor, "B T"]
    """Place of each token of the batch in the packed rows, as n * S + s; padding points to 0."""
    mask: Bool[Tensor, "N 1 S S"] | None = None
    """[n, 0, q, k]: token q sees token k."""
    tree: Tree | None = None
    """Who sees whom where there is no mask."""


def pack(batch: Batch, line: Line, kind: Kind, pad_id: int) -> Packed:
    """The batch's rows, which `line` has in order, as packed rows for attention of this kind."""
    if kind == "dense":
        return _beside(batch, line, pad_id)
    device = batch.ids.device
    source = torch.from_numpy(line.source).to(device)
    return Packed(
        ids=batch.ids.flatten()[source][None],
        positions=batch.positions.flatten(1)[:, None, source],
        visual=batch.visual.flatten()[source][None],
        where=torch.from_numpy(line.where).to(device),
        tree=tree(kind, line, device),
    )


def mask_elements(line: Line) -> int:
    """Elements of the dense kind's mask."""
    return line.rows * int(line.widths.max()) ** 2


def _beside(batch: Batch, line: Line, pad_id: int) -> Packed:
    rows, device = beside(line), batch.ids.device
    source = np.full_like(rows.branch, -1)
    source.reshape(-1)[rows.place] = line.source
    taken, branch, where = (
        torch.from_numpy(made).to(device) for made in (source, rows.branch, rows.place[line.where])
    )
    return Packed(
        ids=_taken(batch.ids, taken, pad_id),
        positions=torch.stack([_taken(axis, taken, 0) for axis in batch.positions]),
        visual=_taken(batch.visual, taken, -1),
        mask=branch_mask(branch),
        where=where,
    )


def branch_mask(branch: Int[Tensor, "N S"]) -> Bool[Tensor, "N 1 S S"]:
    """Causal attention within a branch and to the prompt (branch 0). Padding (-1) sees itself only,
    so that no softmax is over nothing."""
    query, key = branch[:, :, None], branch[:, None, :]
    steps = torch.arange(branch.shape[1], device=branch.device)
    causal = steps[:, None] >= steps
    visible = causal & ((key == 0) | (key == query)) & (query >= 0)
    return (visible | (steps[:, None] == steps))[:, None]


def _taken(values: Int[Tensor, "B T"], source: Int[Tensor, "N S"], fill: int) -> Int[Tensor, "N S"]:
    """values.flatten()[source], and `fill` where source is -1."""
    return torch.where(source >= 0, values.flatten()[source.clamp(min=0)], torch.full_like(source, fill))
