"""Rollouts that are begun in one call of the engine and go on in another, perhaps under other weights.

What is kept of a rollout is what has been sampled and inserted, never a cache or a hidden state. To go on,
prompt and answer are taken in again, under the weights of now, and random number k of rollout m of its
prompt still decides token k. With the same weights an interrupted rollout is the uninterrupted one.

What has been decided stays: sampled ids, the log-probs of the policy that sampled them, inserted blocks.
What a re-attention may still ask for is made anew: how much the answer's tokens attend to the images is
what they attend to under the weights of now, as for gold answers (`looking.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.rollout.intake import Chunk, Intake
from reflectvlm.rollout.placing import Placed, answer_spans, end, text_ids
from reflectvlm.rollout.rows import Rows
from reflectvlm.spans import count_tokens
from reflectvlm.types import Prompt, Rollout, Spans, StopReason, Text, Visual


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A rollout so far: nothing yet, some tokens, or all of it."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """One per id, of the policy that sampled it."""
    placed: tuple[Placed, ...] = ()
    stop: StopReason | None = None
    """Why it has ended; None if it has not."""

    @property
    def spans(self) -> Spans:
        return answer_spans(self.ids, self.logprobs, self.placed)

    def rollout(self, policy: QwenVL, prompt: Prompt) -> Rollout:
        assert self.stop is not None, "a rollout that has not ended"
        spans = self.spans
        written = text_ids(spans)
        return Rollout(
            prompt=prompt,
            spans=spans,
            text=policy.decode(written[:-1] if self.stop == "eos" else written),
            stop=self.stop,
            offsets=policy.offsets(written),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class BegunGroup:
    """A prompt's rollouts so far, and where their random numbers come from."""

    prompt: Prompt
    seed: int
    """Of the call in which it was begun."""
    number: int
    """The prompt's place in that call."""
    rollouts: tuple[Begun, ...]
    last: bool = False
    """True: what has not ended after this call's tokens is cut."""

    @classmethod
    def fresh(cls, prompt: Prompt, n: int, seed: int, number: int) -> BegunGroup:
        return cls(prompt=prompt, seed=seed, number=number, rollouts=(Begun(),) * n)

    @property
    def ended(self) -> bool:
        return all(one.stop is not None for one in self.rollouts)

    def finished(self, policy: QwenVL) -> tuple[Rollout, ...]:
        """The rollouts of a group that has ended."""
        return tuple(one.rollout(policy, self.prompt) for one in self.rollouts)


class Piece(NamedTuple):
    """Spans that a row takes in at one time, and those of their tokens whose attention counts."""

    spans: Spans
    asking: range = range(0)
    remembered: bool = False
    """One token, whose attention is kept by itself: it may be part of a tag that is taken back."""


def take_up(
    rows: Rows,
    first: int,
    resumed: Sequence[tuple[Begun, Prompt, tuple[Float[Tensor, "_ D"], ...]] | None],
    intake: Intake,
    remembered: int,
) -> None:
    """Takes in again what rows hold behind their prompts; None for a new one. Row r of them is row
    `first` + r of the cache."""
    watched = intake.width > 0
    left = {
        row: (pieces(one[0], one[1], remembered if watched else None), one[1], one[2])
        for row, one in enumerate(resumed)
        if one is not None
    }
    while left:
        where = torch.tensor(list(left), device=rows.job.device)
        taken = [waiting.pop(0) for waiting, _, _ in left.values()]
        starts = rows.position[where].tolist()
        chunks = [
            Chunk(
                spans=piece.spans,
                prompt=prompt,
                features=features if any(isinstance(span, Visual) for span in piece.spans) else (),
                start=start,
                asking=piece.asking,
            )
            for piece, (_, prompt, features), start in zip(taken, left.values(), starts, strict=True)
        ]
        rows.hidden[where], rows.position[where], attended = intake.chunks(first + where, chunks)
        if attended is not None:
            _add_attention(rows, where, attended, [piece.remembered for piece in taken])
        left = {row: one for row, one in left.items() if one[0]}


def pieces(begun: Begun, prompt: Prompt, remembered: int | None) -> list[Piece]:
    """An answer so far in as few pieces as its attention needs; in one, if `remembered` is None and nobody
    asks for attention. A piece has at most one run of sampled tokens, at its end; the last `remembered`
    of those that are no part of a tag with a block already are pieces of their own."""
    if remembered is None:
        return [Piece(begun.spans)]
    found: list[Piece] = []
    given: list[Text | Visual] = []
    for span in begun.spans:
        given.append(span)
        if isinstance(span, Text) and span.logprobs:
            start = count_tokens(tuple(given[:-1]), prompt.grids)
            found.append(Piece(tuple(given), range(start, start + len(span.ids))))
            given = []
    if given:
        return [*found, Piece(tuple(given))]
    last = found.pop()
    return [*found, *_tail(last, min(remembered, len(begun.ids) - end(begun.placed)))]


def _tail(piece: Piece, count: int) -> list[Piece]:
    """The piece with its last `count` tokens, all sampled, one by one."""
    *given, text = piece.spans
    assert isinstance(text, Text)
    split = len(text.ids) - count
    head = dataclasses.replace(text, ids=text.ids[:split], logprobs=text.logprobs[:split])
    singles = [
        Piece((dataclasses.replace(text, ids=(i,), logprobs=(logprob,)),), range(1), remembered=True)
        for i, logprob in zip(text.ids[split:], text.logprobs[split:], strict=True)
    ]
    before = (*given, head) if split else tuple(given)
    start = piece.asking.start
    return [*([Piece(before, range(start, start + split))] if before else []), *singles]


def _add_attention(
    rows: Rows, where: Int[Tensor, " R"], attended: Float[Tensor, "R W"], alone: Sequence[bool]
) -> None:
    rows.attended[where] += attended
    if any(alone):
        chosen = torch.tensor(alone, device=where.device)
        row, new = where[chosen], attended[chosen]
        rows.recent[row] = torch.cat([rows.recent[row], new[:, None]], 1)[:, 1:]
