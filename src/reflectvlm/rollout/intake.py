"""Tokens and chunks of spans go through the policy, each behind what its row holds already.

Nothing is padded in the cache: every row has its own length, so a row may take in a block of many
tokens while its neighbours take in one or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflectvlm.models.attention import AttentionWatch
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.rollout.cache import SlotCache
from reflectvlm.rollout.stepping import Step
from reflectvlm.spans import flatten
from reflectvlm.types import AttentionProbe, Prompt, Spans


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Spans for one row: a whole prompt, or a tag with what goes around it."""

    spans: Spans
    prompt: Prompt
    features: tuple[Float[Tensor, "_ F"], ...]
    """Of each image of the prompt, with as many rows as it has visual tokens."""
    start: int = 0
    """Position of the chunk's first token."""
    asking: range = range(0)
    """The chunk's tokens whose attention counts."""


class Taken(NamedTuple):
    """What R rows are left with."""

    hidden: Float[Tensor, "R D"]
    """Of each row's last token."""
    position: Int[Tensor, " R"]
    """Of the text token that follows."""
    attended: Float[Tensor, "R W"] | None
    """Attention to the row's first W tokens; None if nobody asks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Intake:
    """The policy's forward passes on one cache."""

    policy: QwenVL
    probe: AttentionProbe | None
    width: int
    """W: attention is watched to this many first tokens of each row; 0 if nobody asks."""
    cache: SlotCache
    step: Step | None = None
    """How one token of every row goes through the policy; None: like a chunk, by its stock forward."""

    def tokens(self, ids: Int[Tensor, " R"], position: Int[Tensor, " R"], stays: Bool[Tensor, " R"]) -> Taken:
        """One token of every row. Where it does not stay it is a draft: the cache is left as it was and
        its attention counts as nothing."""
        watch = self._watch(stays[:, None])
        if self.step is None:
            hidden = self._stock_step(ids, position, watch)
        else:
            hidden = self.step(ids, position, self.cache, watch)
        self.cache.commit(None, stays.long())
        return Taken(hidden, position + stays.long(), None if watch is None else watch.total)

    def _stock_step(
        self, ids: Int[Tensor, " R"], position: Int[Tensor, " R"], watch: AttentionWatch | None
    ) -> Float[Tensor, "R D"]:
        mask = self.cache.extend(None, torch.ones_like(ids))
        positions = position[None, :, None].expand(3, -1, 1)
        text = torch.full_like(ids, -1)[:, None]
        return self._forward(ids[:, None], positions, text, self.policy.features(()), mask, watch)[:, 0]

    def chunks(self, where: Int[Tensor, " R"], chunks: Sequence[Chunk]) -> Taken:
        """One chunk for each of the rows `where`."""
        device = where.device
        padded = _pad(chunks, self.policy)
        counts = torch.tensor(padded.lengths, device=device)
        asking = [chunk.asking for chunk in chunks]
        watch = self._watch(_marked(padded.ids.shape, asking, device)) if any(asking) else None
        mask = self.cache.extend(where, counts)
        hidden = self._forward(
            torch.from_numpy(padded.ids).to(device),
            torch.from_numpy(padded.positions).to(device),
            torch.from_numpy(padded.visual).to(device),
            torch.cat(padded.features) if padded.features else self.policy.features(()),
            mask,
            watch,
        )
        self.cache.commit(where, counts)
        last = hidden[torch.arange(len(chunks), device=device), counts - 1]
        following = torch.tensor(padded.following, device=device)
        return Taken(last, following, None if watch is None else watch.total)

    def _watch(self, queries: Bool[Tensor, "R T"]) -> AttentionWatch | None:
        if self.probe is None or not self.width:
            return None
        return AttentionWatch(probe=self.probe, queries=queries, width=self.width)

    def _forward(
        self,
        ids: Int[Tensor, "R T"],
        positions: Int[Tensor, "3 R T"],
        visual: Int[Tensor, "R T"],
        features: Float[Tensor, "V F"],
        mask: Bool[Tensor, "R 1 T S"],
        watch: AttentionWatch | None,
    ) -> Float[Tensor, "R T D"]:
        embedded = self.policy.embed(ids, visual, features)
        return self.policy.hidden(embedded, positions, mask, self.cache, watch=watch)


class _Padded(NamedTuple):
    """Chunks side by side, padded on the right."""

    ids: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    visual: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    """Row of the joined features that stands at each token, or -1."""
    positions: np.ndarray[tuple[int, int, int], np.dtype[np.int64]]
    features: list[Tensor]
    lengths: list[int]
    following: list[int]


def _pad(chunks: Sequence[Chunk], policy: QwenVL) -> _Padded:
    flat = [flatten(chunk.spans, chunk.prompt.grids, policy.vision, start=chunk.start) for chunk in chunks]
    lengths = [len(row) for row in flat]
    shape = (len(flat), max(lengths))
    ids = np.full(shape, policy.pad_id)
    visual = np.full(shape, -1)
    positions = np.zeros((3, *shape), dtype=np.int64)
    features: list[Tensor] = []
    total = 0
    for r, (row, chunk) in enumerate(zip(flat, chunks, strict=True)):
        first = np.cumsum([total, *(len(image) for image in chunk.features)])
        ids[r, : len(row)], positions[:, r, : len(row)] = row.ids, row.positions
        visual[r, : len(row)] = np.where(row.image < 0, -1, first[row.image] + row.cell)
        features += chunk.features
        total = int(first[-1])
    return _Padded(ids, visual, positions, features, lengths, [row.next_position for row in flat])


def _marked(shape: tuple[int, ...], tokens: Sequence[range], device: torch.device) -> Bool[Tensor, "R T"]:
    """True at these tokens of each row."""
    marked = torch.zeros(shape, dtype=torch.bool, device=device)
    for row, places in enumerate(tokens):
        marked[row, places.start : places.stop] = True
    return marked
