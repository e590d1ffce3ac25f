"""Watching attention: how much chosen queries attend to the first tokens of their rows.

The model library gives attention weights only with `eager` attention, which builds the whole
[H, T, T] matrix of every layer. ROUTE needs few rows of it: those of the tokens an answer has sampled.
`watched_attention` is an attention function like the library's own, put in by its public interface for
the time of one forward. A single new token's weights [R, H, 1, S] are computed anyway and used for its
output too; of a longer chunk only the chosen queries' weights are computed, a row at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reflectvlm.types import AttentionProbe

NAME = "reflectvlm_watched"


@dataclass(kw_only=True, eq=False)
class AttentionWatch:
    """What one forward is asked for, and what it found.

    Example: `watch = AttentionWatch(probe=probe, queries=queries, width=24)`, then
    `policy.hidden(..., watch=watch)`, then `watch.total / watch.queries.sum(1, keepdim=True)`.
    """

    probe: AttentionProbe
    queries: Bool[Tensor, "R T"]
    """The new tokens whose attention counts."""
    width: int
    """Keys of interest: the first so many of each row."""
    _sum: Float[Tensor, "R W"] = field(init=False)
    """Attention to each key, summed over layers and queries and, for the mean, over heads."""
    _layers: frozenset[int] = field(init=False, default=frozenset())
    _bias: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._sum = torch.zeros(len(self.queries), self.width, device=self.queries.device)

    @property
    def total(self) -> Float[Tensor, "R W"]:
        """Attention to each key: mean over layers, mean or max over heads, *sum* over queries."""
        mean = self._sum / max(len(self._layers), 1)
        return mean * self.queries if self.queries.shape[1] == 1 else mean

    def begin(self, layers: int) -> None:
        """Settles which of the model's layers count."""
        wanted = range(layers) if self.probe.layers is None else self.probe.layers
        if wrong := [layer for layer in wanted if not -layers <= layer < layers]:
            raise ValueError(
                f"layers={list(wanted)} names layer {wrong[0]}, but the model has {layers}: "
                f"0 to {layers - 1}, or -1 to -{layers} from the end."
            )
        self._layers = frozenset(layer % layers for layer in wanted)

    def counts(self, layer: int) -> bool:
        return layer in self._layers

    def add(self, rows: int | slice, weights: Float[Tensor, "... H W"]) -> None:
        """Weights of one query for each of `rows`, or of several queries of one row."""
        heads = weights.amax(-2) if self.probe.heads == "max" else weights.mean(-2)
        found = heads if isinstance(rows, slice) else heads.sum(0)
        self._sum[rows, : found.shape[-1]] += found

    def bias(self, mask: Tensor | None, like: Tensor) -> Tensor | None:
        """The mask as something to add to scores; the same for all layers of the forward."""
        if self._bias is None and mask is not None:
            self._bias = mask if mask.dtype != torch.bool else additive(mask, like.dtype)
        return self._bias


@contextlib.contextmanager
def watching(language_model: Any, watch: AttentionWatch | None) -> Iterator[dict[str, Any]]:
    """Arguments for the language model's forward, with its attention function exchanged meanwhile."""
    if watch is None:
        yield {}
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, watched_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config = language_model.config
    before = config._attn_implementation
    watch.begin(len(language_model.layers))
    config._attn_implementation = NAME
    try:
        yield {"attention_watch": watch}
    finally:
        config._attn_implementation = before


def watched_attention(
    module: Any,
    query: Float[Tensor, "R H T d"],
    key: Float[Tensor, "R K S d"],
    value: Float[Tensor, "R K S d"],
    attention_mask: Tensor | None,
    scaling: float,
    attention_watch: AttentionWatch,
    **others: Any,
) -> tuple[Float[Tensor, "R T H d"], None]:
    """Plain scaled-dot-product attention that tells the watch what its queries attended to."""
    watch, layer = attention_watch, module.layer_idx
    if watch.counts(layer) and query.shape[2] == 1:
        weights = attention_weights(query, key, watch.bias(attention_mask, query), scaling)
        watch.add(slice(None), weights[:, :, 0, : watch.width])
        rows, groups, size = len(query), key.shape[1], value.shape[-1]
        grouped = weights.view(rows * groups, -1, key.shape[2]).to(value.dtype)
        out = grouped @ value.reshape(rows * groups, -1, size)
        return out.view(rows, 1, -1, size), None
    if watch.counts(layer):
        for row in watch.queries.any(1).nonzero().flatten().tolist():
            chosen = watch.queries[row].nonzero().flatten()
            mask = row_mask(attention_mask, row, chosen, query, key)
            weights = attention_weights(query[row : row + 1, :, chosen], key[row : row + 1], mask, scaling)
            watch.add(row, weights[0, ..., : watch.width].transpose(0, 1))
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    return out, None


def attention_weights(
    query: Float[Tensor, "R H T d"],
    key: Float[Tensor, "R K S d"],
    bias: Float[Tensor, "#R 1 T S"] | None,
    scaling: float,
) -> Float[Tensor, "R H T S"]:
    """softmax(q k^T * scaling + bias), each of the K key heads shared by H / K query heads."""
    rows, heads, steps, size = query.shape
    groups, keys = key.shape[1], key.shape[2]
    grouped = (query * scaling).reshape(rows * groups, -1, size)
    scores = grouped @ key.reshape(rows * groups, keys, size).transpose(1, 2)
    scores = scores.view(rows, heads, steps, keys).to(torch.promote_types(scores.dtype, torch.float32))
    return (scores if bias is None else scores + bias[..., :keys]).softmax(-1)


def additive(mask: Bool[Tensor, "R 1 T S"], dtype: torch.dtype) -> Float[Tensor, "R 1 T S"]:
    """0 where a key is seen, minus infinity where it is not."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def row_mask(mask: Tensor | None, row: int, chosen: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """[1, 1, chosen, S] of one row, to be added to scores; without a mask, attention is causal over new
    tokens alone."""
    if mask is None:
        keys = torch.arange(key.shape[2], device=key.device)
        return additive((keys <= chosen[:, None])[None, None], query.dtype)
    one = mask.expand(len(query), -1, -1, -1)[row : row + 1, :, chosen]
    return additive(one, query.dtype) if one.dtype == torch.bool else one
