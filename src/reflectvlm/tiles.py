"""Logits a tile at a time: some tokens by some of the vocabulary, for `head.py`.

A `Sweep` is what both directions have to know. It multiplies hidden states with a tile of the head, divides
by the temperature and shuts out banned ids; with a reference, the same tile of its logits comes beside.
Left out: a bias, and tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflectvlm.models.products import product

CPU_TILE, CPU_ELEMENTS = 4096, 2**20
"""Columns and logits of one tile on a CPU: it stays in the cache, which is what makes the sweep fast."""
GPU_ELEMENTS = 2**28
"""Logits of one tile elsewhere: few large kernels beat many small ones."""
BANNED = -1e30
"""Logit of an id that cannot be: its probability is exactly 0, and 0 times it is 0, not NaN."""


def tile_size(hidden: Tensor, weight: Tensor, tile: int | None) -> tuple[int, int]:
    """Columns and rows that are worked on at once."""
    on_cpu = hidden.device.type == "cpu"
    columns = min(len(weight), (CPU_TILE if on_cpu else len(weight)) if tile is None else tile)
    return columns, max(1, (CPU_ELEMENTS if on_cpu else GPU_ELEMENTS) // columns)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of hidden states times head: autocast's where it is on."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


class Piece(NamedTuple):
    """The logits of some tokens at some of the vocabulary."""

    tokens: slice
    ids: slice
    logits: Float[Tensor, "k t"]
    theirs: Float[Tensor, "k t"] | None = None
    """The reference's, if there is one."""


class Side(NamedTuple):
    """One model's hidden states and head."""

    hidden: Float[Tensor, "K D"]
    weight: Float[Tensor, "V D"]
    dtype: torch.dtype
    """Of their product."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """What both directions have to know."""

    targets: Int[Tensor, " K"]
    banned: Int[Tensor, " R"]
    """Sorted."""
    temperature: float
    rows: int
    """Tokens of one tile."""
    tile: int
    """Ids of one tile."""
    keep: bool
    """Logits are kept for the way back rather than computed twice."""
    entropy: bool
    fast: bool
    """Products on a CPU go through oneDNN (`models/products.py`)."""
    grad: bool
    """There may be a way back."""
    dtype: torch.dtype
    """Of the matrix products."""
    reference: Side | None = None
    """Whom the policy is compared with; nothing goes back to it."""

    def pieces(self, hidden: Tensor, weight: Tensor, tokens: slice) -> Iterator[Piece]:
        """Logits in at least float32, a tile at a time. A tile may be overwritten: it is the caller's."""
        part = hidden[tokens].to(self.dtype)
        other = self.reference
        their_part = None if other is None else other.hidden[tokens].to(other.dtype)
        for ids, banned in self._tiles(len(weight)):
            logits, theirs = self._logits(part, weight[ids], banned), None
            if other is not None and their_part is not None:
                theirs = self._logits(their_part, other.weight[ids], banned).to(logits.dtype)
            yield Piece(tokens, ids, logits, theirs)

    def chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.targets), self.rows):
            yield slice(start, min(start + self.rows, len(self.targets)))

    def hits(self, piece: Piece) -> tuple[Int[Tensor, " h"], Int[Tensor, " h"]]:
        """Where targets lie in the tile: row and column."""
        targets = self.targets[piece.tokens] - piece.ids.start
        row = ((targets >= 0) & (targets < piece.logits.shape[1])).nonzero().flatten()
        return row, targets[row]

    def _logits(self, part: Tensor, weight: Tensor, banned: Tensor) -> Tensor:
        logits = product(part, weight.to(part.dtype), fast=self.fast)
        logits = logits.to(torch.promote_types(part.dtype, torch.float32))
        if self.temperature != 1:
            logits.div_(self.temperature)
        return logits.index_fill_(1, banned, BANNED) if len(banned) else logits

    def _tiles(self, vocabulary: int) -> Iterator[tuple[slice, Tensor]]:
        """Columns of each tile, with the banned ones among them, counted from its start."""
        starts = list(range(0, vocabulary, self.tile))
        edges = torch.tensor([*starts, vocabulary], device=self.banned.device)
        cuts = torch.searchsorted(self.banned, edges).tolist()
        for number, start in enumerate(starts):
            banned = self.banned[cuts[number] : cuts[number + 1]] - start
            yield slice(start, min(start + self.tile, vocabulary)), banned
