"""Heat maps over the image: what chosen tokens attend to, the first look against the look back (Qwen-LA,
arXiv 2505.23558).

A map has the attention to each visual token of an image, mean over heads and over the chosen tokens, at its
place in the merged grid: to the tokens in the prompt, and for every inserted block to the block's own. The
values are plain attention weights, not scaled to the map's largest: maps can be compared, and a map's sum is
the share of attention that the image had. Left out: frames of videos.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reflectvlm.attention.capture import Ask, attended, chosen_layers
from reflectvlm.attention.places import TAGS, Places, places, regions
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Look:
    """Tokens of an answer that are looked at together."""

    name: str
    tokens: tuple[int, ...]
    """Numbers of sampled tokens, from 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Heat:
    """What a look attended to at one image, once in the sequence: its place in the prompt, or a block."""

    look: str
    shown: str
    """`prompt`, or `block 1`, `block 2`, …"""
    image: int
    layers: tuple[int, ...]
    maps: Float[np.ndarray, "L rows columns"]
    """NaN where ROUTE has shown no token. A look that came before a block has no map of it at all."""

    @property
    def mean(self) -> Float[np.ndarray, "rows columns"]:
        made: np.ndarray = self.maps.mean(0)
        return made

    @property
    def share(self) -> float:
        """Of all attention, mean over layers."""
        return float(np.nansum(self.mean))


def looks(found: Places, text: str, at: Sequence[str] = (), tags: Sequence[str] = TAGS) -> list[Look]:
    """Every place where one of the texts `at` stands; without texts all tokens in front of the first tagged
    region, and each region. Raises ValueError for a text that stands nowhere."""
    inside = regions(found, text, tags)
    count = len(found.sampled)
    if not at:
        first = inside[0][0] if inside else count
        made = [Look(name="first look" if inside else "answer", tokens=tuple(range(first)))] if first else []
        return made + [
            Look(name="look back" if len(inside) == 1 else f"look back {n}", tokens=tuple(range(*one)))
            for n, one in enumerate(inside, start=1)
        ]
    return [look for words in at for look in _standing(found, text, words, inside)]


def _standing(found: Places, text: str, words: str, inside: Sequence[tuple[int, int]]) -> list[Look]:
    ends = np.append(found.starts[1:], len(text))
    made = []
    for number, match in enumerate(re.finditer(re.escape(words), text), start=1):
        touched = np.flatnonzero((ends > match.start()) & (found.starts < match.end()))
        if len(touched):
            back = any(first <= touched[0] < stop for first, stop in inside)
            name = f"{words!r} {number}{', looking back' if back else ''}"
            made.append(Look(name=name, tokens=tuple(touched.tolist())))
    if not made:
        raise ValueError(f"at={words!r} stands nowhere in the answer: {text[:200]!r}. Give a part of it.")
    return made


def heat_maps(
    policy: QwenVL,
    rollout: Rollout,
    at: Sequence[str] = (),
    *,
    layers: Sequence[int] | None = None,
    tags: Sequence[str] = TAGS,
    query: str = "token",
    chunk: int = 64,
) -> list[Heat]:
    """Per look a map for each image of the prompt and for each inserted block; see `looks`."""
    found = places(policy, rollout)
    chosen = looks(found, rollout.text, at, tags)
    tokens = sorted({token for look in chosen for token in look.tokens})
    pool = torch.tensor(
        [[(token in look.tokens) / len(look.tokens) for token in tokens] for look in chosen]
    ).reshape(len(chosen), len(tokens))
    asked = _ask(found, tokens, query, pool)
    (weights,) = attended(policy, rollout.prompt, rollout.spans, [asked], layers=layers, chunk=chunk)
    numbers = tuple(chosen_layers(layers, len(policy.model.model.language_model.layers)))
    made = []
    for number, look in enumerate(chosen):
        mean = weights[:, number].numpy()
        reached = int(found.queries(query)[list(look.tokens)].max())
        for image, block in _shown(found):
            rows, columns = rollout.prompt.grids[image][1:]
            maps = on_grid(found, mean, image, block, (rows, columns))
            if block >= 0 and int(np.flatnonzero(found.block == block)[0]) > reached:
                continue  # the look came before the block
            shown = "prompt" if block < 0 else f"block {block + 1}"
            made.append(Heat(look=look.name, shown=shown, image=image, layers=numbers, maps=maps))
    return made


def token_maps(
    policy: QwenVL, rollout: Rollout, *, layers: Sequence[int] | None = None, image: int = 0, chunk: int = 64
) -> Float[np.ndarray, "Q rows columns"]:
    """For every sampled token its attention to an image's place in the prompt and in all blocks together,
    mean over layers: what a picture shows when one points at a token."""
    found = places(policy, rollout)
    asked = _ask(found, range(len(found.sampled)))
    (weights,) = attended(
        policy, rollout.prompt, rollout.spans, [asked], layers=layers, chunk=chunk, mean=True
    )
    mean = weights[0].numpy()
    rows, columns = rollout.prompt.grids[image][1:]
    parts = [
        np.nan_to_num(on_grid(found, mean, image, block, (rows, columns)))
        for shown, block in _shown(found)
        if shown == image
    ]
    total: np.ndarray = np.sum(parts, axis=0)
    return total


def _ask(
    found: Places, tokens: Sequence[int], query: str = "token", pool: Float[Tensor, "P Q"] | None = None
) -> Ask:
    """Attention of sampled tokens to every visual token of the sequence, in the order of its columns."""
    visual = torch.from_numpy(np.flatnonzero(found.image >= 0))
    readout = torch.zeros(len(found.image), len(visual))
    readout[visual, torch.arange(len(visual))] = 1
    return Ask(queries=found.queries(query)[list(tokens)], readout=readout, pool=pool)


def on_grid(
    found: Places, weights: Float[np.ndarray, "N V"], image: int, block: int, size: tuple[int, int]
) -> Float[np.ndarray, "N rows columns"]:
    """Those of one image's place (block -1: in the prompt) as maps; NaN where no token is shown."""
    visual = np.flatnonzero(found.image >= 0)
    here = (found.image[visual] == image) & (found.block[visual] == block)
    maps = np.full((len(weights), size[0] * size[1]), np.nan)
    maps[:, found.cell[visual][here]] = weights[:, here]
    return maps.reshape(-1, *size)


def _shown(found: Places) -> list[tuple[int, int]]:
    """(image, block) of every time that an image is shown, in the order of the sequence; block -1: the
    prompt."""
    pairs = zip(found.image, found.block, strict=True)
    return list(dict.fromkeys((int(image), int(block)) for image, block in pairs if image >= 0))
