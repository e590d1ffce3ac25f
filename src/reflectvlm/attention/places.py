"""Which token of a sequence is what: its columns by kind, the answer's tokens, and the parts of an answer.

Kinds, in the order of `KINDS`:

    before     in front of the first image token: the system turn, and what opens the user's
    image      visual tokens of the prompt
    query      the prompt behind its first image token: the question, the instruction, the template
    generated  the answer's text, forced text and the two tokens around an inserted block included
    inserted   visual tokens of inserted blocks

Parts of an answer, by its tags: `before` the first `<back>` or `<REFLECTION>`, `inside` of any, and `after`,
which is all behind the first that is in none. A tag that is never closed reaches to the end.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.spans import flatten
from reflectvlm.types import Rollout, Text, Visual

KINDS = ("before", "image", "query", "generated", "inserted")
BEFORE, IMAGE, QUERY, GENERATED, INSERTED = range(5)
PARTS = ("before", "inside", "after")
TAGS = ("back", "REFLECTION")


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """One entry per column of prompt + answer, T of them, and one per sampled token, Q of them."""

    kind: Int[np.ndarray, " T"]
    """Index into `KINDS`."""
    image: Int[np.ndarray, " T"]
    """Which image's visual token stands here; -1: text."""
    cell: Int[np.ndarray, " T"]
    """Raster index of the visual token within its image; -1: text."""
    block: Int[np.ndarray, " T"]
    """Which inserted block a visual token belongs to; -1: none."""
    sampled: Int[np.ndarray, " Q"]
    """Columns of the tokens that the policy has sampled."""
    predictor: Int[np.ndarray, " Q"]
    """Columns whose queries have predicted them."""
    starts: Int[np.ndarray, " Q"]
    """Character of the answer at which each of them begins."""

    def queries(self, query: str = "token") -> Int[Tensor, " Q"]:
        """token: the columns of the sampled tokens themselves. step: of those that predicted them."""
        if query not in ("token", "step"):
            raise ValueError(
                f"query is {query!r}. It must be 'token' (its own) or 'step' (what predicted it)."
            )
        return torch.from_numpy(self.sampled if query == "token" else self.predictor)

    def kinds(self) -> Float[Tensor, "T 5"]:
        """A readout: attention to each kind."""
        return torch.nn.functional.one_hot(torch.from_numpy(self.kind), len(KINDS)).float()


def places(policy: QwenVL, rollout: Rollout) -> Places:
    """Raises ValueError for a prompt without an image or an answer without a token."""
    prompt = rollout.prompt
    row = flatten(rollout.sequence, prompt.grids, policy.vision)
    given = len(flatten(prompt.spans, prompt.grids, policy.vision))
    seen = np.flatnonzero(row.image[:given] >= 0)
    if not len(seen):
        raise ValueError(
            f"The prompt of {prompt.sample.id!r} shows no image, so there is no attention to one. Give "
            f"image=…."
        )
    kind = np.full(len(row), GENERATED)
    kind[:given] = QUERY
    kind[: seen[0]] = BEFORE
    kind[seen] = IMAGE
    behind = np.arange(len(row)) >= given
    kind[behind & (row.image >= 0)] = INSERTED
    block, sampled, starts = _answer(rollout, given, len(row))
    if not len(sampled):
        raise ValueError(f"The answer to {prompt.sample.id!r} has no token. Give one, or have one generated.")
    return Places(
        kind=kind,
        image=row.image,
        cell=row.cell,
        block=np.where(row.image >= 0, block, -1),
        sampled=sampled,
        predictor=row.predictor[sampled],
        starts=starts,
    )


def _answer(rollout: Rollout, given: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of the inserted block at each column, columns of sampled tokens, and where these begin."""
    block = np.full(width, -1)
    sampled: list[int] = []
    starts: list[int] = []
    offsets = itertools.chain(rollout.offsets, itertools.repeat(len(rollout.text)))
    column, blocks = given, 0
    for span in rollout.spans:
        if isinstance(span, Visual):
            cells = rollout.prompt.grids[span.image].tokens if span.keep is None else len(span.keep)
            block[column : column + cells + 2] = blocks
            column, blocks = column + cells + 2, blocks + 1
            continue
        for _, offset in zip(span.ids, offsets, strict=False):
            if _own(span):
                sampled.append(column)
                starts.append(offset)
            column += 1
    assert column == width
    return block, np.array(sampled, dtype=np.int64), np.array(starts, dtype=np.int64)


def _own(span: Text) -> bool:
    return span.trained or bool(span.logprobs)


def marked(text: str, tags: Sequence[str] = TAGS) -> list[tuple[int, int]]:
    """Characters of the tagged regions of an answer, tags included, in their order."""
    names = "|".join(map(re.escape, tags))
    if not names:
        return []
    return [match.span() for match in re.finditer(rf"<({names})>.*?(?:</\1>|\Z)", text, re.DOTALL)]


def regions(found: Places, text: str, tags: Sequence[str] = TAGS) -> list[tuple[int, int]]:
    """The same as sampled tokens [first, last + 1), counted from 0; regions without a token are left out. A
    token is where its first letter is: " <" belongs to the tag that it opens, not to the space in front."""
    first = np.array(
        [
            start + len(piece) - len(piece.lstrip()) if piece.strip() else start
            for start, piece in zip(found.starts, token_texts(found, text), strict=True)
        ]
    )
    spans = [np.flatnonzero((first >= a) & (first < b)) for a, b in marked(text, tags)]
    return [(int(one[0]), int(one[-1]) + 1) for one in spans if len(one)]


def part_of(count: int, found: Sequence[tuple[int, int]]) -> Int[np.ndarray, " Q"]:
    """For each of `count` tokens its index into `PARTS`; without regions -1."""
    if not found:
        return np.full(count, -1)
    parts = np.where(np.arange(count) < found[0][0], 0, 2)
    for first, stop in found:
        parts[first:stop] = 1
    return parts


def token_texts(found: Places, text: str) -> list[str]:
    """What each sampled token spells; the end-of-turn token nothing."""
    ends = [*found.starts[1:], len(text)]
    return [text[a:b] for a, b in zip(found.starts, ends, strict=True)]
