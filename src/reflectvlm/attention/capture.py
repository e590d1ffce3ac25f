"""Attention weights of chosen tokens, with any attention implementation and in bounded memory.

While a sequence goes through the model once, a function of ours stands in the place of the model's attention
function, by the model library's public interface. It is handed queries and keys as the model uses them,
after rotary positions (and norms, in Qwen3-VL), computes softmax(q k^T) for a chunk of the chosen queries at
a time, keeps what was asked of it, and lets the model's own function make the output. So the forward is
the model's, be it sdpa, eager or `tree_attention.py`'s, and [layers, heads, T, T] never exists: the most is
[heads, chunk, T], beside results of [layers, chosen, asked].

`models/attention.py` is its sibling for ROUTE: there a few sums while answers are decoded, here any weighting
of keys, layer by layer, for one sequence that is complete.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflectvlm.models.attention import attention_weights, row_mask
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.types import Prompt, Spans

NAME = "reflectvlm_captured"
ADDED = -1
"""In the place of a layer's number: the sum over layers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ask:
    """Whose attention is wanted, and what of it.

    Example: `Ask(queries=torch.tensor([40, 41]), readout=torch.eye(60))` is all weights of two tokens.
    """

    queries: Int[Tensor, " Q"]
    """Columns of the sequence whose queries count."""
    readout: Float[Tensor, "T R"]
    """What is kept of a token's weights over T keys: R weighted sums of them."""
    heads: Literal["mean", "each"] = "mean"
    pool: Float[Tensor, "P Q"] | None = None
    """Weighted sums of the queries' results, so that long answers take no more memory; None: each by
    itself."""

    def __post_init__(self) -> None:
        if self.heads not in ("mean", "each"):
            raise ValueError(f"Ask.heads is {self.heads!r}. It must be 'mean' or 'each'.")


def attended(
    policy: QwenVL,
    prompt: Prompt,
    spans: Spans,
    asks: Sequence[Ask],
    *,
    layers: Sequence[int] | None = None,
    chunk: int = 64,
    mean: bool = False,
) -> list[Tensor]:
    """Per ask [L, Q, R], or [L, H, Q, R] with `heads="each"`, in float32 or wider, on the CPU. `layers` are
    decoder layers in this order, negative ones from the end; None: all. `chunk` queries are looked at
    together.

    Raises ValueError for a layer or a column that is not there.
    """
    batch = policy.batch([(prompt, spans)])
    width = batch.ids.shape[1]
    model = policy.model.model.language_model
    wanted = chosen_layers(layers, len(model.layers))
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}. At least one query is looked at at a time.")
    for ask in asks:
        outside = [int(q) for q in ask.queries if not 0 <= int(q) < width]
        if outside or len(ask.readout) != width:
            raise ValueError(
                f"An Ask has queries {outside or 'inside'} and a readout of {len(ask.readout)} keys for a "
                f"sequence of {width} tokens. Queries are columns of it, and the readout has a row for each."
            )
    asks = [_on(ask, batch.ids.device) for ask in asks]
    capture = Capture(asks=asks, layers=frozenset(wanted), chunk=chunk, add=mean)
    with torch.no_grad(), capturing(model, capture):
        embedded = policy.embed(batch.ids, batch.visual, policy.features(batch.images))
        policy.hidden(embedded, batch.positions, None)
    if mean:
        return [found[ADDED][None] / len(set(wanted)) for found in capture.found]
    return [torch.stack([found[layer] for layer in wanted]) for found in capture.found]


def chosen_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    """Numbers of decoder layers from 0. Raises ValueError for one that the model does not have."""
    wanted = range(count) if layers is None else layers
    if not len(wanted):
        raise ValueError("layers names no layer. Name at least one, or leave it out for all.")
    if wrong := [layer for layer in wanted if not -count <= layer < count]:
        raise ValueError(
            f"layers={list(wanted)} names layer {wrong[0]}, but the model has {count}: 0 to {count - 1}, or "
            f"-1 to -{count} from the end."
        )
    return [layer % count for layer in wanted]


@dataclass(frozen=True, kw_only=True, eq=False)
class Capture:
    """What one forward of one row is asked for, and what it found."""

    asks: Sequence[Ask]
    layers: frozenset[int]
    chunk: int
    add: bool = False
    """Layers are added up, under `ADDED`."""
    found: list[dict[int, Tensor]] = field(init=False)
    """Per ask the result of each layer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "found", [{} for _ in self.asks])

    def see(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Queries [1, H, T, d] and keys [1, K, T, d] of a layer, as the model attends with them."""
        if layer not in self.layers:
            return
        assert len(query) == 1, "one sequence at a time"
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):  # which would make halves of them again
            query, key = query.to(wide), key.to(wide)
            for ask, found in zip(self.asks, self.found, strict=True):
                made = self._of(ask, query, key, mask, scaling).cpu()
                number = ADDED if self.add else layer
                found[number] = found[number] + made if self.add and number in found else made

    def _of(
        self, ask: Ask, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
    ) -> Float[Tensor, "*H n R"]:
        """One layer's answer to an ask, chunk by chunk."""
        parts = (
            self._one(ask, chosen, query, key, mask, scaling) for chosen in ask.queries.split(self.chunk)
        )
        if ask.pool is None:
            return torch.cat(list(parts), -2)
        total: Tensor = sum(
            (
                pool.to(part.dtype) @ part
                for pool, part in zip(ask.pool.split(self.chunk, 1), parts, strict=True)
            ),
            torch.zeros((), device=query.device, dtype=query.dtype),
        )
        return total

    @staticmethod
    def _one(
        ask: Ask, chosen: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
    ) -> Float[Tensor, "*H q R"]:
        bias = row_mask(mask, 0, chosen, query, key)
        weights = attention_weights(query[:, :, chosen], key, bias, scaling)[0]
        heads = weights.mean(0) if ask.heads == "mean" else weights
        return heads @ ask.readout.to(heads.dtype)


@contextlib.contextmanager
def capturing(language_model: Any, capture: Capture) -> Iterator[None]:
    """Puts a function in the place of the model's attention function, which tells `capture` and then calls
    it. Not for packed rows along a tree, whose causality no mask says."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = language_model.config
    before = config._attn_implementation

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **others: Any,
    ) -> Any:
        assert others.get("prefix_tree") is None, "packed rows are not captured"
        capture.see(module.layer_idx, query, key, attention_mask, scaling)
        plain = ALL_ATTENTION_FUNCTIONS.get_interface(before, _eager(module))
        return plain(module, query, key, value, attention_mask, scaling=scaling, **others)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[before])
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _eager(module: Any) -> Callable[..., Any]:
    """The function that a family's attention falls back on: `eager` stands in no table."""
    found: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return found


def _on(ask: Ask, device: torch.device) -> Ask:
    pool = None if ask.pool is None else ask.pool.to(device)
    return Ask(queries=ask.queries.to(device), readout=ask.readout.to(device), heads=ask.heads, pool=pool)
