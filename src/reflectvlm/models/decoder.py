"""One new token of every row through the language model, without the model library's machinery.

The stock forward of one token is mostly Python: masks, cache objects, keyword arguments, three products
where one would do. Here is the same arithmetic on the same weights, written out for the decode step:

    n = norm(x);  q, k, v = n W_qkv;  q, k = norm(q), norm(k) in Qwen3-VL
    x += attention(rotated q, cache + rotated k, cache + v) W_o
    n = norm(x);  x += (silu(n W_gate) * n W_up) W_down

It serves Qwen2-VL, Qwen2.5-VL and Qwen3-VL. A new token is text: its position is the same on all three
axes, so M-RoPE, in sections or interleaved, is plain RoPE here, and no layer adds visual features
(DeepStack). The stock forward stays the reference (`InProcessEngine(decode="stock")`), and everything longer
than one token goes through it.

Left out: sliding-window attention, and hooks, which a step does not call. Products whose modules are not
plain linear layers (LoRA) are called as modules; a graph goes on as it was recorded when an adapter is
switched off or merged, so make a new engine then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from reflectvlm.models.attention import AttentionWatch, attention_weights
from reflectvlm.models.products import fast_linear

if TYPE_CHECKING:
    from reflectvlm.models.qwen_vl import QwenVL
    from reflectvlm.rollout.cache import Siblings, SlotCache

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Queries [R, H, d], keys and values [R, K, S, d], the layer's number -> what they attend to, [R, H d]."""
SHARED_FROM = 16
"""Common columns from which on reading them once pays."""
Product: TypeAlias = Callable[[Tensor], Tensor]
"""x -> x W^T + b, in the dtype of the products."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One layer's parts, gathered from the stock module."""

    attend: Callable[[Tensor], Tensor]
    qkv: Product
    even: Callable[[Tensor], Tensor]
    """Norms of queries and keys [R, H + K, d], head by head; where there are none, what comes in."""
    out: Product
    reflect: Callable[[Tensor], Tensor]
    gate_up: Product
    down: Product


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoder:
    """`decoder(ids, positions, cache, mask)` gives what the stock forward of these tokens gives."""

    embedding: nn.Module
    rotary: nn.Module
    layers: tuple[Layer, ...]
    norm: Callable[[Tensor], Tensor]
    heads: int
    kv_heads: int
    size: int
    """Of a head."""
    dtype: torch.dtype
    """Of the products."""
    copies: tuple[Copy, ...]
    """Weights that are not the policy's own tensors."""

    @classmethod
    def of(cls, policy: QwenVL) -> Decoder:
        """The policy's language model with its weights of now; `refresh` after they have changed.

        Weights are shared with the policy, unless products have another dtype (`compute`) or run on a CPU:
        then they are copied, cast once instead of at every token, and joined.
        """
        model = policy.model.model.language_model
        config = model.config
        dtype = getattr(torch, policy.compute) if policy.compute else policy.model.dtype
        cast_ = policy.compute is not None
        weights = _Weights(
            dtype=dtype,
            joined=policy.device.type == "cpu" or cast_,
            cast=cast_,
            linear=fast_linear if policy.fast_products else F.linear,
        )
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        layers = tuple(_layer(layer, weights, heads) for layer in model.layers)
        return cls(
            embedding=model.embed_tokens,
            rotary=model.rotary_emb,
            layers=layers,
            norm=_norm(model.norm),
            heads=heads,
            kv_heads=kv_heads,
            size=model.layers[0].self_attn.head_dim,
            dtype=dtype,
            copies=tuple(weights.copies),
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the policy's weights into the tensors that are there."""
        for copy in self.copies:
            copy.take()

    @staticmethod
    def fits(policy: QwenVL) -> bool:
        """False for what is left out here: the stock forward then decodes."""
        model = policy.model.model.language_model
        kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        known = all(hasattr(layer.mlp, "gate_proj") for layer in model.layers)
        return known and kinds == {"full_attention"} and model.config.hidden_act == "silu"

    @torch.no_grad()
    def __call__(
        self,
        ids: Int[Tensor, " R"],
        positions: Int[Tensor, " R"],
        cache: SlotCache,
        mask: Bool[Tensor, "R 1 1 S"],
        watch: AttentionWatch | None = None,
        siblings: Siblings | None = None,
    ) -> Float[Tensor, "R D"]:
        """Last hidden states of one token a row, whose keys and values the cache takes in. `siblings` tells
        which rows have their first columns in common, so that those are read once for all of them."""
        x = cast(Tensor, self.embedding(ids))
        cos, sin = self._rotation(x, positions)
        bias = torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, float("-inf"))
        attended = self._attention(bias, siblings)
        if watch is not None:
            watch.begin(len(self.layers))
        for number, layer in enumerate(self.layers):
            query, key, value = self._heads(layer.qkv(layer.attend(x).to(self.dtype)), cos, sin, layer.even)
            keys, values = cache.append(key, value, number)
            if watch is not None and watch.counts(number):
                seen = self._watched(query, keys, values, bias, watch)
            else:
                seen = attended(query, keys, values, number)
            x = x + layer.out(seen)
            gate, up = layer.gate_up(layer.reflect(x).to(self.dtype)).chunk(2, -1)
            x = x + layer.down(F.silu(gate).mul_(up))
        return self.norm(x)

    def _rotation(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [R, 1, size]: rotated = v cos + (halves of v exchanged) sin."""
        cos, sin = self.rotary(x[:, None], positions[None, :, None].expand(3, -1, 1))
        half = self.size // 2
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)

    def _heads(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, even: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [R, H, d] and keys, and values, [R, K, d]."""
        parts = qkv.view(len(qkv), -1, self.size)
        turning = even(parts[:, : self.heads + self.kv_heads])
        turned = turning * cos + turning.roll(self.size // 2, -1) * sin
        query, key = turned.to(self.dtype).split([self.heads, self.kv_heads], 1)
        return query, key, parts[:, self.heads + self.kv_heads :]

    def _attention(self, bias: Tensor, siblings: Siblings | None) -> Attend:
        exact = self.dtype in (torch.float32, torch.float64)
        if siblings is None or siblings.cut < SHARED_FROM or not exact:
            return lambda query, keys, values, _: grouped_attention(query, keys, values, bias)
        own = bias[:, 0, :, siblings.cut :].repeat_interleave(self.kv_heads, 0)
        return lambda query, keys, values, layer: shared_attention(query, keys, values, own, siblings, layer)

    def _watched(
        self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, watch: AttentionWatch
    ) -> Tensor:
        rows = len(query)
        weights = attention_weights(query[:, :, None], keys, bias, self.size**-0.5)
        watch.add(slice(None), weights[:, :, 0, : watch.width])
        grouped = weights.view(rows, self.kv_heads, -1, keys.shape[2]).to(values.dtype)
        return (grouped @ values).reshape(rows, -1)


def grouped_attention(
    query: Float[Tensor, "R H d"],
    keys: Float[Tensor, "R K S d"],
    values: Float[Tensor, "R K S d"],
    bias: Float[Tensor, "R 1 1 S"],
) -> Float[Tensor, "R D"]:
    """Attention of one token a row. The H / K query heads that share a key head are given as so many queries,
    so that no kernel has to copy the keys for them."""
    rows, kv_heads, size = len(query), keys.shape[1], query.shape[-1]
    grouped = query.view(rows, kv_heads, -1, size)
    return F.scaled_dot_product_attention(grouped, keys, values, bias).reshape(rows, -1)


def shared_attention(
    query: Float[Tensor, "R H d"],
    keys: Float[Tensor, "R K S d"],
    values: Float[Tensor, "R K S d"],
    own: Float[Tensor, "RK 1 A"],
    siblings: Siblings,
    layer: int,
) -> Float[Tensor, "R D"]:
    """Attention of one token a row, in which the P = S - A first columns, the same for all siblings, are read
    from one of them: one softmax over the scores of both parts. A step of many short rows is bound by reading
    keys and values, and most of them are the prompt's. `own` is the bias of the columns behind."""
    rows, heads, size = query.shape
    kv_heads, cut, groups = keys.shape[1], siblings.cut, len(siblings.first)
    shape = (groups, -1, kv_heads, heads // kv_heads)

    def to_groups(x: Tensor) -> Tensor:  # [R, K, H / K, e] -> [N K, G H / K, e]
        chosen = x if siblings.in_order else x.index_select(0, siblings.members)
        return chosen.view(*shape, x.shape[-1]).transpose(1, 2).reshape(groups * kv_heads, -1, x.shape[-1])

    def to_rows(x: Tensor) -> Tensor:  # and back, as [R K, H / K, e]
        turned = x.view(groups, kv_heads, -1, shape[3], x.shape[-1]).transpose(1, 2)
        made = turned.reshape(-1, kv_heads, shape[3], x.shape[-1])
        return (made if siblings.in_order else made.index_select(0, siblings.place)).flatten(0, 1)

    shared_keys, shared_values = siblings.prompts(layer, keys, values)
    scaled = (query * size**-0.5).view(rows, kv_heads, -1, size)
    front = to_rows(torch.bmm(to_groups(scaled), shared_keys.transpose(1, 2)))
    behind = torch.baddbmm(own, scaled.flatten(0, 1), keys.flatten(0, 1)[:, cut:].transpose(1, 2))
    weights = torch.cat([front, behind], -1).softmax(-1)
    seen = to_rows(torch.bmm(to_groups(weights[..., :cut].view(rows, kv_heads, -1, cut)), shared_values))
    return seen.baddbmm_(weights[..., cut:], values.flatten(0, 1)[:, cut:]).view(rows, -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Copy:
    """A tensor made of parameters, one below the other."""

    tensor: Tensor
    sources: tuple[Tensor, ...]

    def take(self) -> None:
        for part, source in zip(self.tensor.split([len(s) for s in self.sources]), self.sources, strict=True):
            part.copy_(source)


@dataclass(kw_only=True, eq=False)
class _Weights:
    """Gathers weights in the dtype of the products, and remembers what had to be copied."""

    dtype: torch.dtype
    joined: bool
    cast: bool
    """Products have another dtype than weights."""
    linear: Callable[..., Tensor]
    copies: list[Copy] = field(default_factory=list)

    def product(self, modules: Sequence[nn.Module]) -> Product:
        """Products of the same input, one result behind the other."""
        plain = [module for module in modules if type(module) is nn.Linear]
        if len(modules) > 1 and (not self.joined or len(plain) < len(modules)):
            products = [self.product([module]) for module in modules]
            return lambda x: torch.cat([product(x) for product in products], -1)
        if not plain:
            return self._called(modules[0])
        weight = self._tensor([module.weight for module in plain])
        biases = [module.bias for module in plain if module.bias is not None]
        bias = self._tensor(biases) if biases else None
        linear = self.linear
        return lambda x: linear(x, weight, bias)

    def _called(self, module: nn.Module) -> Product:
        """A module that is more than a product, under the autocast of the stock forward. Its casts are not
        cached: a recorded graph would keep those of the weights of its time."""
        if not self.cast:
            return module

        def call(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype=self.dtype, cache_enabled=False):
                return cast(Tensor, module(x))

        return call

    @torch.no_grad()
    def _tensor(self, sources: Sequence[Tensor]) -> Tensor:
        if len(sources) == 1 and sources[0].dtype == self.dtype:
            return sources[0]
        made = torch.cat(tuple(sources)).to(self.dtype)
        self.copies.append(Copy(tensor=made, sources=tuple(sources)))
        return made


def _layer(layer: Any, weights: _Weights, heads: int) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        attend=_norm(layer.input_layernorm),
        qkv=weights.product([attention.q_proj, attention.k_proj, attention.v_proj]),
        even=_evened(attention, heads),
        out=weights.product([attention.o_proj]),
        reflect=_norm(layer.post_attention_layernorm),
        gate_up=weights.product([mlp.gate_proj, mlp.up_proj]),
        down=weights.product([mlp.down_proj]),
    )


def _evened(attention: Any, heads: int) -> Callable[[Tensor], Tensor]:
    """The norms of the first `heads` heads, which are queries, and of the others, which are keys."""
    if not hasattr(attention, "q_norm"):
        return lambda x: x
    query, key = _norm(attention.q_norm), _norm(attention.k_norm)
    return lambda x: torch.cat([query(x[:, :heads]), key(x[:, heads:])], 1)


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """RMS norm (arXiv 1910.07467) in float32, scaled in the dtype that comes in."""
    weight, eps, width = module.weight, module.variance_epsilon, (len(module.weight),)

    def norm(x: Tensor) -> Tensor:
        if x.dtype == weight.dtype == torch.float32:
            return F.rms_norm(x, width, weight, eps)
        return weight * F.rms_norm(x.float(), width, None, eps).to(x.dtype)

    return norm
