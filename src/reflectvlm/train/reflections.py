"""The curves that Qwen-LA logs (arXiv 2505.23558): how many reflections an answer has, how long they are,
where they stand, how many are empty; and what re-attention put in. For any tag, `<back>` too.

Counted are complete blocks, as the reward counts them (`rewards.reflection.closed_blocks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from reflectvlm.rewards.reflection import closed_blocks, tokens_inside
from reflectvlm.spans import count_tokens
from reflectvlm.tags import Found
from reflectvlm.types import Rollout

PREFIX = "blocks/"


def tag_curves(rollouts: Sequence[Rollout], tag: str) -> dict[str, float]:
    """Means for the blocks of a tag, e.g. `"<REFLECTION>"`.

        blocks/count        complete blocks per answer
        blocks/tokens       tokens inside all of an answer's blocks, 0 for an answer without
        blocks/tokens_each  tokens per block
        blocks/empty        share of blocks that are empty or white space
        blocks/position     tokens in front of a block over those of its answer, from 0 to 1

    The last three are means over all blocks together and left out where there are none. Those of tokens
    are left out if a rollout does not say where its tokens begin. A `tag` without brackets has none of it.
    """
    if not rollouts or not (tag.startswith("<") and tag.endswith(">")):
        return {}
    blocks = [(one, block) for one in rollouts for block in closed_blocks(one.text, tag[1:-1])]
    values = {"count": len(blocks) / len(rollouts)}
    if blocks:
        values["empty"] = float(np.mean([not block.content.strip() for _, block in blocks]))
    if all(one.offsets or not one.text for one in rollouts):
        inside = [tokens_inside(one, block) for one, block in blocks]
        values["tokens"] = sum(inside) / len(rollouts)
        if blocks:
            values["tokens_each"] = sum(inside) / len(blocks)
            values["position"] = float(np.mean([_position(one, block) for one, block in blocks]))
    return {f"{PREFIX}{name}": value for name, value in values.items()}


def insertion_curves(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What re-attention put in, per answer: image blocks, and their tokens with the two around each. Empty
    if it never did, as in a run without it."""
    blocks = [len(one.insertions) for one in rollouts]
    if not any(blocks):
        return {}
    tokens = [count_tokens(one.insertions, one.prompt.grids) for one in rollouts]
    return {"inserted/blocks": float(np.mean(blocks)), "inserted/tokens": float(np.mean(tokens))}


def for_display(values: Mapping[str, float]) -> Mapping[str, float]:
    """The metrics without those of blocks where they tell a reader no more than the rate of the tag does.

    In Look-Back an answer has one block or none. It is another matter where blocks repeat, where a reward
    balances them, and where each brings an image.
    """
    repeated = values.get(f"{PREFIX}count", 0) > 1.1
    if repeated or "reward/balance" in values or "inserted/blocks" in values:
        return values
    return {key: value for key, value in values.items() if not key.startswith(PREFIX)}


def _position(rollout: Rollout, block: Found) -> float:
    before = rollout.tokens_between(0, block.start)
    return before / rollout.tokens_between(0, len(rollout.text))
