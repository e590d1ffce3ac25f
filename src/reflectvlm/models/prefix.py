"""Shared-prefix packing: the rollouts of one prompt as one row, the prompt once.

A group of G rows `prompt + answer` becomes one row `prompt + answer_1 + … + answer_G`. Each answer
attends to the prompt and to itself, and its positions are those it has unpacked, so log-probs and
gradients are those of the unpacked rows, at a cost of P + G A tokens instead of G (P + A). For a
vision-language model, whose prompt is mostly image, that is most of the work.

This is a way to compute hidden states and nothing else: batches, losses and trainers see plain rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reflectvlm.batch import Batch


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """N packed rows of at most S tokens."""

    ids: Int[Tensor, "N S"]
    positions: Int[Tensor, "3 N S"]
    visual: Int[Tensor, "N S"]
    mask: Bool[Tensor, "N 1 S S"]
    """[n, 0, q, k]: token q sees token k."""
    where: Int[Tensor, "B T"]
    """Place of each token of the batch in the packed rows, as n * S + s; padding points to 0."""


def worth_packing(batch: Batch) -> bool:
    """True if two rows share a prompt."""
    return len(batch) > int(batch.prompt.unique().numel())


def pack(batch: Batch, pad_id: int) -> Packed:
    """Rows of the same prompt as one packed row each, in the order of their first rows."""
    members: dict[int, list[int]] = {}
    for row, prompt in enumerate(batch.prompt.tolist()):
        members.setdefault(prompt, []).append(row)
    prefix = batch.prompt_tokens.tolist()
    lengths = batch.attention.sum(1).tolist()
    widths = [prefix[rows[0]] + sum(lengths[row] - prefix[row] for row in rows) for rows in members.values()]
    width, device = max(widths), batch.ids.device
    source = torch.full((len(members), width), -1, device=device)
    branch = torch.full((len(members), width), -1, device=device)
    where = torch.zeros_like(batch.ids)
    for n, rows in enumerate(members.values()):
        end = 0
        for number, row in enumerate(rows):
            columns = batch.attention[row].nonzero().flatten()
            shared, own = columns[: prefix[row]], columns[prefix[row] :]
            if number == 0:
                source[n, : len(shared)] = row * batch.ids.shape[1] + shared
                branch[n, : len(shared)] = 0
                end = len(shared)
            place = torch.arange(end, end + len(own), device=device)
            source[n, place] = row * batch.ids.shape[1] + own
            branch[n, place] = number + 1
            where[row, shared] = n * width + torch.arange(len(shared), device=device)
            where[row, own] = n * width + place
            end += len(own)
    return Packed(
        ids=_taken(batch.ids, source, pad_id),
        positions=torch.stack([_taken(axis, source, 0) for axis in batch.positions]),
        visual=_taken(batch.visual, source, -1),
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
