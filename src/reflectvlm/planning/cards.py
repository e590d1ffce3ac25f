"""GPUs by name: memory and rates as their makers state them, dense products, no sparsity. All rough.

Memory is what PyTorch sees of the card, in GiB of 2^30 bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from reflectvlm.recipe_check import nearest

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Card:
    name: str
    memory: float
    """Bytes."""
    half: float
    """bfloat16 operations a second."""
    single: float
    """float32 operations a second, without TF32."""
    bandwidth: float
    """Bytes a second between the card and its memory."""
    link: float
    """Bytes a second in each direction between two cards of a node."""
    assumed: bool = False
    """Only the memory was given; the rates are an assumption."""


def _card(name: str, gib: float, half: float, single: float, terabytes: float, link: float) -> Card:
    return Card(
        name=name,
        memory=gib * GIB,
        half=half * 1e12,
        single=single * 1e12,
        bandwidth=terabytes * 1e12,
        link=link * 1e9,
    )


CARDS = {
    card.name.lower(): card
    for card in (
        _card("A100-40GB", 39.4, 312, 19.5, 1.555, 300),
        _card("A100-80GB", 79.1, 312, 19.5, 2.039, 300),
        _card("H100", 79.1, 989, 67, 3.35, 450),
        _card("H200", 139.8, 989, 67, 4.8, 450),
        _card("L40S", 44.4, 362, 91.6, 0.864, 32),
        _card("RTX-4090", 23.5, 165, 82.6, 1.008, 32),
    )
}
SMALL = 50 * GIB
"""Below it an unnamed card is taken to be as fast as an L40S, else as an A100-80GB."""


def card(text: str) -> Card:
    """`A100-80GB`, `h100`, `RTX 4090`, or memory alone: `80GB` (10^9 bytes each), `24GiB`."""
    key = re.sub(r"[\s_]+", "-", text.strip().lower())
    if key in CARDS:
        return CARDS[key]
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)-?(gb|gib|g)", key):
        memory = float(found[1]) * (GIB if found[2] == "gib" else 1e9)
        if memory > 0:
            like = CARDS["l40s" if memory < SMALL else "a100-80gb"]
            return Card(**{**vars(like), "name": text, "memory": memory, "assumed": True})
    near = nearest(key, CARDS)
    hint = f" Did you mean {CARDS[near].name}?" if near else ""
    raise ValueError(
        f"gpu is {text!r}. Give memory, e.g. gpu=80GB, or one of "
        f"{', '.join(one.name for one in CARDS.values())}.{hint}"
    )


def like(one: Card) -> str:
    """Whose rates a card of which only the memory is known is given."""
    return "L40S" if one.memory < SMALL else "A100-80GB"
