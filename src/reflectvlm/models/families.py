"""What the model families differ in, as far as this library has to know; the rest of it knows no family.

    Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923), Qwen3-VL (arXiv 2511.21631)

Qwen3-VL's vision tower gives, beside its last features, those of L of its layers, each through a merger of
its own (DeepStack, arXiv 2406.04334). The language model adds them to its hidden states at visual tokens,
after its first L layers. Here all of this is one feature row for each visual token,

    [ last D | layer 1 D | ... | layer L D ],

so that caches, gradient leaves, and the choice of the rows that a COPY or ROUTE block shows need not know of
it. `Embedded` takes a row apart again, just in front of the language model.

The other differences are the stock classes' own: M-RoPE in sections or interleaved, norms of queries and
keys, patches of 14 or 16, towers. Left out: videos, which Qwen3-VL cuts into frames with a time stamp each
(an image is the same in all three), and mixtures of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PROJECTORS = ("visual.merger", "visual.deepstack_merger_list")
"""Where parameters between vision tower and language model live."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family, by the `model_type` of its configuration."""

    model_type: str
    name: str
    deepstack: bool = False
    """The tower gives features of some of its layers as well."""

    def layers(self, config: Any) -> int:
        """L: how many layers' features follow the last ones in a feature row."""
        return len(config.vision_config.deepstack_visual_indexes) if self.deepstack else 0

    def width(self, config: Any) -> int:
        """Numbers in a feature row."""
        return int(config.get_text_config().hidden_size) * (1 + self.layers(config))

    def rows(self, made: Any) -> Float[Tensor, "V F"]:
        """What `get_image_features` gives, as feature rows."""
        last = _whole(made.pooler_output)
        if not self.deepstack:
            return last
        return torch.cat([last, *map(_whole, made.deepstack_features)], dim=-1)


def _whole(features: Any) -> Tensor:
    """Of all images. They come image by image or together, which differs between versions of transformers."""
    return features if isinstance(features, Tensor) else torch.cat(list(features))


FAMILIES = (
    Family(model_type="qwen2_vl", name="Qwen2-VL"),
    Family(model_type="qwen2_5_vl", name="Qwen2.5-VL"),
    Family(model_type="qwen3_vl", name="Qwen3-VL", deepstack=True),
)


def family_of(model_type: str, path: str = "the model") -> Family:
    """Raises ValueError, naming the families that work, for any other."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(f"{family.name} ({family.model_type!r})" for family in FAMILIES)
    raise ValueError(
        f"{path!r} is a {model_type!r} model. This policy works for {known}. Take a model of one of these; "
        "what another family needs is in docs/design.md, 'Policies'."
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedded:
    """What goes into the language model: B rows of T tokens."""

    tokens: Float[Tensor, "B T D"]
    """Input embeddings, with features at visual tokens."""
    visual: Bool[Tensor, "B T"] | None = None
    """Where visual tokens are; None if no layer adds anything to them."""
    layers: tuple[Float[Tensor, "_ D"], ...] = ()
    """What each of the first layers adds to the visual tokens, in their order row by row."""

    @property
    def deepstack(self) -> dict[str, Any]:
        """Arguments for the language model's forward."""
        if not self.layers:
            return {}
        return {"visual_pos_masks": self.visual, "deepstack_visual_embeds": list(self.layers)}


def with_features(
    tokens: Float[Tensor, "B T D"], visual: Int[Tensor, "B T"], features: Float[Tensor, "V F"]
) -> Embedded:
    """Puts feature row `visual[b, t]` at token t of row b; -1: text, whose embedding stays."""
    if len(features) == 0:
        return Embedded(tokens=tokens)
    places = (visual.flatten() >= 0).nonzero().flatten()
    # Not features[…], whose backward adds what is shown twice in no fixed order.
    shown = features.index_select(0, visual.flatten()[places]).to(tokens.dtype)
    first, *layers = shown.split(tokens.shape[-1], dim=-1)
    return Embedded(
        tokens=tokens.flatten(0, 1).index_copy(0, places, first).view_as(tokens),
        visual=visual >= 0 if layers else None,
        layers=tuple(layers),
    )
