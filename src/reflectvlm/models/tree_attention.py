"""Attention over a line of packed rows (`tree.py`), behind the model library's own attention interface.

The reference is `dense` (`prefix.py`): packed rows beside each other and a mask [N, 1, S, S]. Here are the
kinds that build no such mask; each takes queries, keys and values [1, heads, L, d] of the whole line:

* `Split`: prompts attend causally; each answer's queries attend to the gathered keys of its prompt and of
  itself. Ordinary scaled-dot-product attention, any device, autograd as it is.
* `VarlenCall`: the same as one variable-length call of a flash kernel. GPU, bfloat16 or float16.
* `Flex`: FlexAttention with a block mask, compiled. GPU; without gradients also on a CPU.

The attention function stays in place after a forward: gradient checkpointing runs layers again on the way
back, and would otherwise run them with another one. Without a `prefix_tree` it is the library's `sdpa`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from reflectvlm.models.tree import Line, Owners, Piece, Pieces, Varlen, owners, pieces, varlen
from reflectvlm.models.varlen_kernels import VarlenKernel, varlen_kernel

Kind: TypeAlias = Literal["dense", "split", "varlen", "flex"]

NAME = "reflectvlm_tree"


class Tree(Protocol):
    """Attention over one line, with what it needs to know of it; made once for a forward."""

    def __call__(
        self,
        query: Float[Tensor, "1 H L d"],
        key: Float[Tensor, "1 K L d"],
        value: Float[Tensor, "1 K L d"],
        scaling: float,
    ) -> Float[Tensor, "1 L H d"]: ...


def tree(kind: Kind, line: Line, device: torch.device) -> Tree:
    """`kind` for this line. Raises ValueError where the device has none of that kind."""
    match kind:
        case "split":
            return Split(plan=pieces(line, device))
        case "varlen":
            return VarlenCall(plan=varlen(line, device), kernel=varlen_kernel(device))
        case "flex":
            return Flex.of(owners(line, device), len(line), device)
        case "dense":
            raise AssertionError("dense attention has a mask and no tree")


def prefix_tree(language_model: Any, plan: Tree | None) -> dict[str, Any]:
    """Arguments for the language model's forward, whose attention function becomes `tree_attention` and
    stays it."""
    if plan is None:
        return {}
    config = language_model.config
    if config._attn_implementation != NAME:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        assert config._attn_implementation == "sdpa", config._attn_implementation
        AttentionInterface.register(NAME, tree_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        config._attn_implementation = NAME
    return {"prefix_tree": plan}


def tree_attention(
    module: Any,
    query: Float[Tensor, "R H T d"],
    key: Float[Tensor, "R K S d"],
    value: Float[Tensor, "R K S d"],
    attention_mask: Tensor | None,
    scaling: float,
    prefix_tree: Tree | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "R T H d"], None]:
    """The library's `sdpa`, or along `prefix_tree` if there is one."""
    if prefix_tree is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    assert attention_mask is None, "a line has no mask"
    assert not others.get("dropout"), "policies train without dropout"
    # As SDPA does it under autocast, but before anything is gathered.
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (each.to(dtype) for each in (query, key, value))
    return prefix_tree(query, key, value, scaling), None


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Each piece of the plan in one call of scaled-dot-product attention."""

    plan: Pieces

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Float[Tensor, "1 L H d"]:
        by_token = [_by_token(each) for each in (query, key, value)]
        found = [self._one(piece, by_token, scaling) for piece in self.plan.pieces]
        return torch.cat(found).index_select(0, self.plan.back)[None]

    def _one(self, piece: Piece, by_token: list[Tensor], scaling: float) -> Float[Tensor, "n H d"]:
        places = (piece.queries, piece.keys, piece.keys)
        query, key, value = (_rows(each, place) for each, place in zip(by_token, places, strict=True))
        return sdpa(query, key, value, piece.mask, scaling=scaling).flatten(0, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class VarlenCall:
    plan: Varlen
    kernel: VarlenKernel

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
    ) -> Float[Tensor, "1 L H d"]:
        plan = self.plan
        keys, values = (_by_token(each).index_select(0, plan.keys) for each in (key, value))
        made = self.kernel(
            _by_token(query), keys, values, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, scaling
        )
        return made[None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Flex:
    mask: Any
    """`torch.nn.attention.flex_attention.BlockMask`."""
    attend: Callable[..., Tensor]

    @classmethod
    def of(cls, owned: Owners, length: int, device: torch.device) -> Flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = device.type != "cpu"  # there the whole [L, L] mask is built, block by block on a GPU
        make: Callable[..., Any] = _compiled_mask() if compiled else create_block_mask
        mask = make(owned.mask_mod, None, None, length, length, device=device)
        plain: Callable[..., Any] = flex_attention
        return cls(mask=mask, attend=_compiled_flex() if compiled else plain)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
    ) -> Float[Tensor, "1 L H d"]:
        if query.device.type == "cpu" and torch.is_grad_enabled():
            raise ValueError(
                "prefix_attention='flex' has no gradients on a CPU: torch's FlexAttention is forward-only "
                "there. Load the policy with prefix_attention=auto, split or dense."
            )
        grouped = query.shape[1] != key.shape[1]
        # Keys and values may be laid out token by token; the kernels want each head's in one piece.
        query, key, value = (each.contiguous() for each in (query, key, value))
        made = self.attend(query, key, value, block_mask=self.mask, scale=scaling, enable_gqa=grouped)
        return made.transpose(1, 2).contiguous()


@functools.cache
def _compiled_mask() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    compiled: Callable[..., Any] = torch.compile(create_block_mask, dynamic=True)
    return compiled


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    """Compiled once; lengths differ from pass to pass and must not each be compiled anew."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled


def sdpa(
    query: Float[Tensor, "R H T d"],
    key: Float[Tensor, "R K S d"],
    value: Float[Tensor, "R K S d"],
    mask: Tensor | None,
    **settings: Any,
) -> Float[Tensor, "R T H d"]:
    """The library's function; causal without a mask. On a CPU straight to PyTorch's, which need not copy the
    keys that several query heads share; on a GPU only some kernels take that, and the library knows which."""
    if query.device.type == "cpu":
        scale = settings.get("scaling")
        causal = mask is None and query.shape[2] > 1
        made = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=True
        )
        return made.transpose(1, 2)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer: Any = SimpleNamespace(is_causal=True, num_key_value_groups=query.shape[1] // key.shape[1])
    return sdpa_attention_forward(layer, query, key, value, mask, **settings)[0]


def _by_token(heads: Float[Tensor, "1 H L d"]) -> Float[Tensor, "L H d"]:
    return heads[0].transpose(0, 1)


def _rows(by_token: Float[Tensor, "L H d"], places: Tensor) -> Float[Tensor, "b H n d"]:
    rows, width = places.shape
    return by_token.index_select(0, places.flatten()).view(rows, width, *by_token.shape[1:]).transpose(1, 2)
