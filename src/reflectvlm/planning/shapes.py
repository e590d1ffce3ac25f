"""A model as its sizes: how many parameters each part has.

D width of the language model, H d queries and K d keys of a token, I of its MLP, V of the vocabulary;
W width of the vision tower, M of its MLP. Left out: buffers, which are below a megabyte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

COLOURS = 3


@dataclass(frozen=True, kw_only=True)
class TextShape:
    width: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    """Numbers of one head."""
    mlp: int
    vocabulary: int
    tied: bool
    """Embedding and head are one matrix."""
    bias: bool = True
    """Of queries, keys and values."""
    head_norms: bool = False
    """Queries and keys are normed a head at a time (Qwen3)."""

    @property
    def queries(self) -> int:
        return self.heads * self.head

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a layer's linear maps: q, k, v, o, gate, up, down."""
        width, queries, keys, mlp = self.width, self.queries, self.keys, self.mlp
        attention = ((width, queries), (width, keys), (width, keys), (queries, width))
        return (*attention, (width, mlp), (width, mlp), (mlp, width))

    @property
    def linear(self) -> int:
        """Parameters of all layers' matrices."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.products)

    @property
    def small(self) -> int:
        """Biases and norms."""
        bias = self.queries + 2 * self.keys if self.bias else 0
        head_norms = 2 * self.head if self.head_norms else 0
        return self.layers * (bias + head_norms + 2 * self.width) + self.width

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.width

    @property
    def lm_head(self) -> int:
        """Parameters that the head has for itself."""
        return 0 if self.tied else self.embedding


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    width: int
    layers: int
    heads: int
    mlp: int
    out: int
    patch: int
    merge: int = 2
    frames: int = 2
    activation: Literal["silu", "quick_gelu", "gelu"] = "silu"
    """silu: three matrices with a gate and norms without bias (Qwen2.5-VL); else two, and layer norms."""
    positions: int = 0
    """Learned positions (Qwen3-VL)."""
    deep: int = 0
    """Further mergers, whose features enter deeper layers (Qwen3-VL's DeepStack)."""

    @property
    def gated(self) -> bool:
        return self.activation == "silu"

    @property
    def cells(self) -> int:
        """Patches that become one visual token."""
        return self.merge**2

    @property
    def patch_values(self) -> int:
        return COLOURS * self.frames * self.patch**2

    @property
    def side(self) -> int:
        """Pixels along the side of a visual token."""
        return self.patch * self.merge

    @property
    def tower(self) -> int:
        """Parameters but for the mergers."""
        width, mlp = self.width, self.mlp
        norms = 2 * width if self.gated else 4 * width
        attention = 4 * width**2 + 4 * width
        feed = 3 * width * mlp + 2 * mlp + width if self.gated else 2 * width * mlp + mlp + width
        first = self.patch_values * width + (width if self.positions else 0) + self.positions * width
        return self.layers * (norms + attention + feed) + first

    @property
    def merger(self) -> int:
        wide = self.cells * self.width
        maps = wide**2 + wide + wide * self.out + self.out
        norm = self.width if self.gated else 2 * self.width
        return maps + norm + self.deep * (maps + 2 * wide)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    text: TextShape
    vision: VisionShape

    @property
    def parameters(self) -> int:
        text, vision = self.text, self.vision
        return text.linear + text.small + text.embedding + text.lm_head + vision.tower + vision.merger
