"""Attention along an answer: Look-Back's trend figure (arXiv 2507.03019), and the same without its
normalisation.

As published, for each generated token and each layer: weights are averaged over heads; the mass on tokens in
front of the first image token (the system prompt) is left out and the rest brought to 1; shares of image,
question and generated tokens; mean over layers. Where an image was inserted, its visual tokens are a fourth
share. The paper does not say whether a token's share is that of its own query or of the query that
predicted it: here its own, as ROUTE counts, and `query="step"` gives the other.

`absolute` are the plain shares, whose sum with what stands before the image is 1. The first tokens of a
sequence take in much attention that goes nowhere, so the two forms can differ by a factor of several, and a
share that rises in one may be flat in the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from reflectvlm.attention.capture import Ask, attended, chosen_layers
from reflectvlm.attention.places import IMAGE, KINDS, TAGS, places, regions, token_texts
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.types import Rollout


@dataclass(frozen=True, kw_only=True, eq=False)
class Trend:
    """Attention of an answer's Q sampled tokens in L layers."""

    attention: Float[np.ndarray, "L Q 5"]
    """To each of `places.KINDS`, mean over heads; sums to 1."""
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    """Their numbers in the model."""
    regions: tuple[tuple[int, int], ...] = ()
    """Tokens [first, last + 1) of the tagged regions."""
    query: str = "token"

    @property
    def shares(self) -> Float[np.ndarray, "Q 4"]:
        """As published: image, query, generated, inserted."""
        return published(self.attention)

    @property
    def absolute(self) -> Float[np.ndarray, "Q 5"]:
        """Plain shares of all of `KINDS`."""
        mean: np.ndarray = self.attention.mean(0)
        return mean

    def per_layer(self, kind: str = "image") -> Float[np.ndarray, "L Q"]:
        """The plain share of one kind; `visual` is image and inserted together."""
        if kind == "visual":
            return self.per_layer("image") + self.per_layer("inserted")
        layers: np.ndarray = self.attention[..., KINDS.index(kind)]
        return layers


def trend(
    policy: QwenVL,
    rollout: Rollout,
    *,
    layers: Sequence[int] | None = None,
    tags: Sequence[str] = TAGS,
    query: str = "token",
    chunk: int = 64,
) -> Trend:
    """One forward over prompt and answer. Raises ValueError for a prompt without an image."""
    found = places(policy, rollout)
    ask = Ask(queries=found.queries(query), readout=found.kinds())
    (attention,) = attended(policy, rollout.prompt, rollout.spans, [ask], layers=layers, chunk=chunk)
    return Trend(
        attention=attention.numpy(),
        tokens=tuple(token_texts(found, rollout.text)),
        layers=tuple(chosen_layers(layers, len(policy.model.model.language_model.layers))),
        regions=tuple(regions(found, rollout.text, tags)),
        query=query,
    )


def published(attention: Float[np.ndarray, "L Q 5"]) -> Float[np.ndarray, "Q 4"]:
    """Shares of what is attended to from the first image token on, layer by layer, then the mean of
    layers."""
    behind = attention[..., IMAGE:]
    mean: np.ndarray = (behind / behind.sum(-1, keepdims=True)).mean(0)
    return mean
