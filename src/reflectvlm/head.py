"""Log-probs, entropies and exact KL straight from hidden states, a tile of the vocabulary at a time.

`ops.token_scores` and `ops.token_kl` say what is computed and are the reference. Here the same numbers come
from tiles of at most some million logits: a forward sweep that keeps a running maximum and sum (the online
softmax of arXiv 1805.02867), and a backward sweep that makes each tile's gradient

    d z_kv = (g_k (1[v = target_k] - p_kv) + h_k p_kv (a_kv - E_p[a_k])) / temperature

and uses it up at once for hidden states and head. g and h are the gradients of log-prob and KL, and
a = z - y is how far the policy's logits z are from the reference's y:

    KL(p || q) = E_p[a] + log sum e^y - log sum e^z

All three sums come from one sweep. The normalisers leave the gradient, log p - log q - KL = a - E_p[a], and
equal logits give exactly 0. Logits of up to `chunk` tokens (both models' for a KL) are kept between the
sweeps; of more tokens they are computed again, so memory never grows with tokens times vocabulary.

Shapes as in `ops`: K tokens, D width, V vocabulary. Left out: a bias, and tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reflectvlm.models.products import product
from reflectvlm.ops import check_reference, check_scoring
from reflectvlm.tiles import BANNED, Piece, Side, Sweep, product_dtype, tile_size


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
    sweep = _sweep(hidden, weight, targets, banned, temperature, chunk, tile, entropy, fast_products)
    return _scored(hidden, weight, sweep)[:2]


def fused_scores_and_kl(
    hidden: Float[Tensor, "K D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " K"],
    ref_hidden: Float[Tensor, "K E"],
    ref_weight: Float[Tensor, "V E"],
    *,
    banned: Sequence[int] | Int[Tensor, " R"] = (),
    temperature: float = 1.0,
    chunk: int = 1024,
    tile: int | None = None,
    entropy: bool = True,
    fast_products: bool = True,
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"], Float[Tensor, " K"]]:
    """`fused_token_scores`, and from the same sweep what `ops.token_kl` gives: the KL of each token's
    distribution to the reference's, with its gradient. Nothing goes back to the reference."""
    check_reference(hidden, weight, ref_hidden, ref_weight)
    reference = Side(ref_hidden.detach(), ref_weight.detach(), product_dtype(ref_hidden, ref_weight))
    sweep = _sweep(
        hidden, weight, targets, banned, temperature, chunk, tile, entropy, fast_products, reference
    )
    return _scored(hidden, weight, sweep)


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


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    banned: Sequence[int] | Tensor,
    temperature: float,
    chunk: int,
    tile: int | None,
    entropy: bool,
    fast: bool,
    reference: Side | None = None,
) -> Sweep:
    check_scoring(temperature, chunk)
    columns, rows = tile_size(hidden, weight, tile)
    return Sweep(
        targets=targets,
        banned=torch.as_tensor(banned, dtype=torch.long, device=hidden.device).sort().values,
        temperature=temperature,
        rows=min(rows, chunk),
        tile=columns,
        keep=len(hidden) <= chunk,
        entropy=entropy,
        fast=fast,
        grad=torch.is_grad_enabled(),
        dtype=product_dtype(hidden, weight),
        reference=reference,
    )


def _scored(hidden: Tensor, weight: Tensor, sweep: Sweep) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropies, divergences = _Scores.apply(hidden, weight, sweep)
    return logprobs, entropies, divergences


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, sweep: Sweep) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(sweep.dtype, torch.float32)
        logprobs, entropies, totals, divergences, apart = (
            hidden.new_zeros(len(hidden), dtype=wide) for _ in range(5)
        )
        needed = sweep.grad and any(ctx.needs_input_grad[:2])
        kept: list[Tensor] | None = [] if needed and sweep.keep else None
        for tokens in sweep.chunks():
            state = _Online.start(hidden[tokens], wide)
            for piece in sweep.pieces(hidden, weight, tokens):
                state.take(piece, sweep, keep=kept is not None)
                if kept is not None:
                    kept += [piece.logits] if piece.theirs is None else [piece.logits, piece.theirs]
            totals[tokens] = total = state.largest + state.sum.log()
            logprobs[tokens] = state.target - total
            if sweep.entropy:
                entropies[tokens] = total - state.weighted / state.sum
            if sweep.reference is not None:
                apart[tokens], divergences[tokens] = state.compared()
        impossible = torch.isin(sweep.targets, sweep.banned)
        ctx.save_for_backward(hidden, weight, totals, apart, *(kept or ()))
        ctx.sweep, ctx.kept = sweep, kept is not None
        ctx.mark_non_differentiable(entropies, *([divergences] if sweep.reference is None else []))
        return logprobs.masked_fill(impossible, float("-inf")), entropies, divergences

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, totals, apart, *kept = ctx.saved_tensors
        sweep: Sweep = ctx.sweep
        grad, pull = grads[0] / sweep.temperature, grads[2] / sweep.temperature
        to_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        left = iter(kept)
        for tokens in sweep.chunks():
            part = hidden[tokens].to(sweep.dtype)
            pieces = _kept(sweep, weight, tokens, left) if ctx.kept else sweep.pieces(hidden, weight, tokens)
            for piece in pieces:
                slope = _slope(
                    piece, sweep, totals[tokens], grad[tokens], apart=apart[tokens], pull=pull[tokens]
                )
                if to_hidden is not None:
                    _add_product(to_hidden[tokens], slope, weight[piece.ids].to(sweep.dtype), sweep.fast)
                if to_weight is not None:
                    _add_product(to_weight[piece.ids], slope.T, part, sweep.fast)
        return to_hidden, to_weight, None


@dataclass(kw_only=True, eq=False)
class _Online:
    """Running maximum m, sum of e^(z - m), sum of e^(z - m) z, and the target's logit. With a reference:
    sum of e^(z - m) (z - y), and maximum and sum of its own logits y."""

    largest: Tensor
    sum: Tensor
    weighted: Tensor
    target: Tensor
    apart: Tensor
    their_largest: Tensor
    their_sum: Tensor

    @classmethod
    def start(cls, like: Tensor, dtype: torch.dtype) -> _Online:
        def full(value: float) -> Tensor:
            return like.new_full((len(like),), value, dtype=dtype)

        return cls(
            largest=full(BANNED),
            sum=full(0.0),
            weighted=full(0.0),
            target=full(0.0),
            apart=full(0.0),
            their_largest=full(BANNED),
            their_sum=full(0.0),
        )

    def take(self, piece: Piece, sweep: Sweep, *, keep: bool) -> None:
        logits = piece.logits
        row, column = sweep.hits(piece)
        self.target[row] = logits[row, column]
        largest = torch.maximum(self.largest, logits.amax(1))
        shrink = (self.largest - largest).exp()
        power = (logits - largest[:, None]).exp_()
        self.sum = self.sum * shrink + power.sum(1)
        if piece.theirs is not None:
            self._take_theirs(piece.theirs)
            apart = logits - piece.theirs if keep else torch.sub(logits, piece.theirs, out=piece.theirs)
            self.apart = self.apart * shrink + apart.mul_(power).sum(1)
        if sweep.entropy:
            product = power.mul_(logits) if keep else logits.mul_(power)
            self.weighted = self.weighted * shrink + product.sum(1)
        self.largest = largest

    def _take_theirs(self, logits: Tensor) -> None:
        largest = torch.maximum(self.their_largest, logits.amax(1))
        shrink = (self.their_largest - largest).exp()
        self.their_sum = self.their_sum * shrink + (logits - largest[:, None]).exp_().sum(1)
        self.their_largest = largest

    def compared(self) -> tuple[Tensor, Tensor]:
        """E_p[z - y], and the KL. Maxima and sums are subtracted each on their own, because a small KL would
        drown in the rounding of two large normalisers."""
        apart = self.apart / self.sum
        return apart, apart + (self.their_largest - self.largest) + (self.their_sum / self.sum).log()


def _kept(sweep: Sweep, weight: Tensor, tokens: slice, kept: Iterator[Tensor]) -> Iterator[Piece]:
    for start in range(0, len(weight), sweep.tile):
        logits = next(kept)
        theirs = None if sweep.reference is None else next(kept)
        yield Piece(tokens, slice(start, start + logits.shape[1]), logits, theirs)


def _slope(piece: Piece, sweep: Sweep, total: Tensor, grad: Tensor, *, apart: Tensor, pull: Tensor) -> Tensor:
    """The gradient of one tile's logits (see above; g, h are `grad`, `pull` by the temperature) in the dtype
    of the products. It takes the place of the logits, so a graph can be gone back through once; autograd
    says so at a second time."""
    factor = -grad[:, None]
    if piece.theirs is not None:
        factor = _farther(piece.logits, piece.theirs, apart).mul_(pull[:, None]).add_(factor)
    slope = piece.logits.sub_(total[:, None]).exp_().mul_(factor)
    row, column = sweep.hits(piece)
    if len(sweep.banned):  # a banned target has no gradient of its own
        possible = ~torch.isin(column + piece.ids.start, sweep.banned)
        row, column = row[possible], column[possible]
    slope[row, column] += grad[row]
    return slope.to(sweep.dtype)


def _farther(logits: Tensor, theirs: Tensor, apart: Tensor) -> Tensor:
    """log p - log q - KL = a - E_p[a], in place of the reference's logits."""
    return torch.sub(logits, theirs, out=theirs).sub_(apart[:, None])


def _add_product(into: Tensor, left: Tensor, right: Tensor, fast: bool) -> None:
    """into += left @ right."""
    if into.dtype == left.dtype:
        into.add_(product(left, right.T, fast=fast))
    else:
        into.add_(left @ right)
