"""Log-probs and entropies straight from hidden states, a tile of the vocabulary at a time.

`ops.token_scores` says what is computed and is the reference. Here the same numbers come from tiles
of at most some million logits: a forward sweep that keeps a running maximum and sum (the online
softmax of arXiv 1805.02867), and a backward sweep that makes each tile's gradient

    d z_kv = g_k (1[v = target_k] - p_kv) / temperature

and uses it up at once for hidden states and head. Logits of up to `chunk` tokens are kept between the
sweeps; of more tokens they are computed again, so memory never grows with tokens times vocabulary.

Shapes as in `ops`: K tokens, D width, V vocabulary. Left out: a bias, and tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reflectvlm.models.products import product

CPU_TILE, CPU_ELEMENTS = 4096, 2**20
"""Columns and logits of one tile on a CPU: it stays in the cache, which is what makes the sweep fast."""
GPU_ELEMENTS = 2**28
"""Logits of one tile elsewhere: few large kernels beat many small ones."""
BANNED = -1e30
"""Logit of an id that cannot be: its probability is exactly 0, and 0 times it is 0, not NaN."""


def fused_token_scores(
    hidden: Float[Tensor, "K D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " K"],
    *,
    banned: Sequence[int] | Int[Tensor, " R"] = (),
    temperature: float = 1.0,
    chunk: int = 1024,
    tile: int | None = None,
    entropy: bool = True,
    fast_products: bool = True,
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """What `ops.token_scores` gives, up to rounding. `tile` is how many vocabulary columns are worked on at
    once (None: by device). With `entropy=False` the second result is zeros and costs nothing.

    Under autocast products are in its dtype, and their results are softmaxed in float32, as there.
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}. Log-probs need one above 0; for greedy sampling use 1."
        )
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}. It counts tokens scored at once and must be at least 1.")
    device = hidden.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    columns, rows = _tile(hidden, weight, tile)
    sweep = Sweep(
        targets=targets,
        banned=torch.as_tensor(banned, dtype=torch.long, device=device).sort().values,
        temperature=temperature,
        rows=min(rows, chunk),
        tile=columns,
        keep=len(hidden) <= chunk,
        entropy=entropy,
        fast=fast_products,
        grad=torch.is_grad_enabled(),
        dtype=dtype,
    )
    with torch.autocast(device.type, enabled=False):
        logprobs, entropies = _Scores.apply(hidden, weight, sweep)
    return logprobs, entropies


FEW_ROWS = 32
"""Up to so many rows, MKL multiplies a large head up to twice as fast in the order head times rows as in
that of a linear layer; a single row takes longer than two."""


def next_token_logits(head: nn.Module, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B V"]:
    """`head(hidden)`, for the few rows of a decode step on a CPU in the order that is fast there."""
    plain = type(head) is nn.Linear and head.bias is None
    if not plain or hidden.device.type != "cpu" or not 0 < len(hidden) <= FEW_ROWS:
        return cast(Tensor, head(hidden))
    rows = hidden if len(hidden) > 1 else hidden.expand(2, -1)
    return (cast(nn.Linear, head).weight @ rows.T).T[: len(hidden)].contiguous()


def _tile(hidden: Tensor, weight: Tensor, tile: int | None) -> tuple[int, int]:
    """Columns and rows that are worked on at once."""
    on_cpu = hidden.device.type == "cpu"
    columns = min(len(weight), (CPU_TILE if on_cpu else len(weight)) if tile is None else tile)
    return columns, max(1, (CPU_ELEMENTS if on_cpu else GPU_ELEMENTS) // columns)


class Piece(NamedTuple):
    """The logits of some tokens at some of the vocabulary."""

    tokens: slice
    ids: slice
    logits: Float[Tensor, "k t"]


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

    def pieces(self, hidden: Tensor, weight: Tensor, tokens: slice) -> Iterator[Piece]:
        """Logits in at least float32, a tile at a time. A tile may be overwritten: it is the caller's."""
        part = hidden[tokens].to(self.dtype)
        for ids, banned in self._tiles(len(weight)):
            logits = product(part, weight[ids].to(self.dtype), fast=self.fast)
            logits = logits.to(torch.promote_types(self.dtype, torch.float32))
            if self.temperature != 1:
                logits.div_(self.temperature)
            if len(banned):
                logits.index_fill_(1, banned, BANNED)
            yield Piece(tokens, ids, logits)

    def chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.targets), self.rows):
            yield slice(start, min(start + self.rows, len(self.targets)))

    def hits(self, piece: Piece) -> tuple[Int[Tensor, " h"], Int[Tensor, " h"]]:
        """Where targets lie in the tile: row and column."""
        targets = self.targets[piece.tokens] - piece.ids.start
        row = ((targets >= 0) & (targets < piece.logits.shape[1])).nonzero().flatten()
        return row, targets[row]

    def _tiles(self, vocabulary: int) -> Iterator[tuple[slice, Tensor]]:
        """Columns of each tile, with the banned ones among them, counted from its start."""
        starts = list(range(0, vocabulary, self.tile))
        edges = torch.tensor([*starts, vocabulary], device=self.banned.device)
        cuts = torch.searchsorted(self.banned, edges).tolist()
        for number, start in enumerate(starts):
            banned = self.banned[cuts[number] : cuts[number + 1]] - start
            yield slice(start, min(start + self.tile, vocabulary)), banned


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, sweep: Sweep) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(sweep.dtype, torch.float32)
        logprobs, entropies, totals = (hidden.new_zeros(len(hidden), dtype=wide) for _ in range(3))
        needed = sweep.grad and any(ctx.needs_input_grad[:2])
        kept: list[Tensor] | None = [] if needed and sweep.keep else None
        for tokens in sweep.chunks():
            state = _Online.start(hidden[tokens], wide)
            for piece in sweep.pieces(hidden, weight, tokens):
                state.take(piece, sweep, keep=kept is not None)
                if kept is not None:
                    kept.append(piece.logits)
            totals[tokens] = total = state.largest + state.sum.log()
            logprobs[tokens] = state.target - total
            if sweep.entropy:
                entropies[tokens] = total - state.weighted / state.sum
        impossible = torch.isin(sweep.targets, sweep.banned)
        ctx.save_for_backward(hidden, weight, totals, *(kept or ()))
        ctx.sweep, ctx.kept = sweep, kept is not None
        ctx.mark_non_differentiable(entropies)
        return logprobs.masked_fill(impossible, float("-inf")), entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, totals, *kept = ctx.saved_tensors
        sweep: Sweep = ctx.sweep
        grad = grads[0] / sweep.temperature
        to_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        left = iter(kept)
        for tokens in sweep.chunks():
            part = hidden[tokens].to(sweep.dtype)
            pieces = _kept(sweep, weight, tokens, left) if ctx.kept else sweep.pieces(hidden, weight, tokens)
            for piece in pieces:
                slope = _slope(piece, sweep, totals[tokens], grad[tokens])
                if to_hidden is not None:
                    _add_product(to_hidden[tokens], slope, weight[piece.ids].to(sweep.dtype), sweep.fast)
                if to_weight is not None:
                    _add_product(to_weight[piece.ids], slope.T, part, sweep.fast)
        return to_hidden, to_weight, None


@dataclass(kw_only=True, eq=False)
class _Online:
    """Running maximum m, sum of e^(z - m), sum of e^(z - m) z, and the target's logit."""

    largest: Tensor
    sum: Tensor
    weighted: Tensor
    target: Tensor

    @classmethod
    def start(cls, like: Tensor, dtype: torch.dtype) -> _Online:
        def full(value: float) -> Tensor:
            return like.new_full((len(like),), value, dtype=dtype)

        return cls(largest=full(BANNED), sum=full(0.0), weighted=full(0.0), target=full(0.0))

    def take(self, piece: Piece, sweep: Sweep, *, keep: bool) -> None:
        logits = piece.logits
        row, column = sweep.hits(piece)
        self.target[row] = logits[row, column]
        largest = torch.maximum(self.largest, logits.amax(1))
        shrink = (self.largest - largest).exp()
        power = (logits - largest[:, None]).exp_()
        self.sum = self.sum * shrink + power.sum(1)
        if sweep.entropy:
            product = power.mul_(logits) if keep else logits.mul_(power)
            self.weighted = self.weighted * shrink + product.sum(1)
        self.largest = largest


def _kept(sweep: Sweep, weight: Tensor, tokens: slice, kept: Iterator[Tensor]) -> Iterator[Piece]:
    for start in range(0, len(weight), sweep.tile):
        logits = next(kept)
        yield Piece(tokens, slice(start, start + logits.shape[1]), logits)


def _slope(piece: Piece, sweep: Sweep, total: Tensor, grad: Tensor) -> Tensor:
    """g_k (1[v = target_k] - p_kv) / temperature at one tile, in the dtype of the products. It takes the
    place of the logits, so a graph can be gone back through once; autograd says so at a second time."""
    slope = piece.logits.sub_(total[:, None]).exp_().mul_(-grad[:, None])
    row, column = sweep.hits(piece)
    if len(sweep.banned):  # a banned target has no gradient of its own
        possible = ~torch.isin(column + piece.ids.start, sweep.banned)
        row, column = row[possible], column[possible]
    slope[row, column] += grad[row]
    return slope.to(sweep.dtype)


def _add_product(into: Tensor, left: Tensor, right: Tensor, fast: bool) -> None:
    """into += left @ right."""
    if into.dtype == left.dtype:
        into.add_(product(left, right.T, fast=fast))
    else:
        into.add_(left @ right)
