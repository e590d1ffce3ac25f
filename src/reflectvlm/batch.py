"""The tensors: a `Batch` of packed rows, what a policy says about it, and what a loss takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflectvlm.types import Patches


class Layout(NamedTuple):
    """Where each row's tokens are: contiguous, with all of its padding on one side."""

    start: Int[np.ndarray, " B"]
    """Column of a row's first token."""
    length: Int[np.ndarray, " B"]
    prompt: Int[np.ndarray, " B"]
    prompt_tokens: Int[np.ndarray, " B"]

    @property
    def columns(self) -> slice:
        """The columns that some row uses."""
        used = self.length > 0
        if not used.any():
            return slice(0, 0)
        return slice(int(self.start[used].min()), int((self.start + self.length)[used].max()))

    def rows(self, which: Int[np.ndarray, " R"]) -> Layout:
        return Layout(*(fact[which] for fact in self))


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """B rows of at most T tokens, right-padded.

    Example, one row "[image] 3 + 5 = 8" with the answer trained: `ids` is
    `[start, pad, pad, pad, pad, end, 3, +, 5, =, 8, eos]`, `visual` is
    `[-1, 0, 1, 2, 3, -1, -1, …]` (rows of the features), and `trained` is True for `8, eos`.
    """

    ids: Int[Tensor, "B T"]
    positions: Int[Tensor, "3 B T"]
    """M-RoPE positions (frame, row, column), always explicit."""
    attention: Bool[Tensor, "B T"]
    """False: padding."""
    visual: Int[Tensor, "B T"]
    """Row of the concatenated features of `images` that stands here; -1: text."""
    trained: Bool[Tensor, "B T"]
    predictor: Int[Tensor, "B T"]
    """Column whose hidden state predicts this token: the one to the left, or the last one before
    an inserted block when the token had been sampled before the block was."""
    prompt: Int[Tensor, " B"]
    """Rows with the same number have the same prompt."""
    prompt_tokens: Int[Tensor, " B"]
    """How many of the row's first tokens are its prompt."""
    images: tuple[Patches, ...]
    """Distinct images of all rows, each once."""
    old_logprobs: Float[Tensor, "B T"]
    """Behaviour log-probs; 0 where not trained."""
    advantages: Float[Tensor, " B"]
    num_tokens: float
    """Trained tokens of the *whole* update, over all micro-batches and ranks."""
    num_sequences: float
    """Sequences of the whole update."""
    ref_logprobs: Float[Tensor, "B T"] | None = None
    engine_logprobs: Float[Tensor, "B T"] | None = None
    """What a rollout engine with arithmetic of its own said its tokens' log-probs were; `old_logprobs` are
    then the trainer's at that time. None: engine and trainer are the same, which needs no correction."""
    row_ids: tuple[str, ...] = ()
    """Ids of the rows' samples, for reports."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @functools.cached_property
    def layout(self) -> Layout:
        """Where the rows' tokens are, on the host. Costs one copy from the device, so that whoever cuts or
        packs the batch need not ask it row by row; parts of the batch know theirs from the whole."""
        start = self.attention.int().argmax(1) if self.attention.shape[1] else torch.zeros_like(self.prompt)
        facts = (start, self.attention.sum(1), self.prompt, self.prompt_tokens)
        return Layout(*torch.stack([fact.long() for fact in facts]).cpu().numpy())

    def rows(self, which: Int[Tensor, " R"]) -> Batch:
        """The rows `which`, in that order, without the columns in which all of them are padding. Images and
        global counts stay those of the whole, so losses of parts add up to the loss of the whole."""
        layout = self.layout.rows(which.cpu().numpy())
        rows, columns = which.to(self.ids.device), layout.columns
        part = dataclasses.replace(
            self,
            ids=self.ids[rows, columns],
            positions=self.positions[:, rows, columns],
            attention=self.attention[rows, columns],
            visual=self.visual[rows, columns],
            trained=self.trained[rows, columns],
            predictor=(self.predictor[rows, columns] - columns.start).clamp(min=0),
            prompt=self.prompt[rows],
            prompt_tokens=self.prompt_tokens[rows],
            old_logprobs=self.old_logprobs[rows, columns],
            advantages=self.advantages[rows],
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[rows, columns],
            engine_logprobs=None if self.engine_logprobs is None else self.engine_logprobs[rows, columns],
            row_ids=tuple(self.row_ids[row] for row in which.tolist()) if self.row_ids else (),
        )
        part.__dict__["layout"] = layout._replace(start=np.maximum(layout.start - columns.start, 0))
        return part

    def split(self, parts: Iterable[Tensor]) -> Iterator[Batch]:
        """Micro-batches, each of the rows that one of `parts` names by number."""
        yield from map(self.rows, parts)

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        there = dataclasses.replace(self, **moved)
        if self.ids.device.type == "cpu":  # where asking costs nothing
            there.__dict__["layout"] = self.layout
        return there


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenScores:
    """What a policy says about each trained token; 0 elsewhere."""

    logprobs: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    """Entropy in nats of the distribution the token was drawn from; carries no gradient. Zeros where nobody
    asked for it."""
    kl: Float[Tensor, "B T"] | None = None
    """KL(policy || reference) of that distribution, exactly, with its gradient; None without a reference."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceStates:
    """What the exact KL to a reference needs of it. Carries no gradient."""

    hidden: Float[Tensor, "K E"]
    """Hidden states from which the batch's trained tokens are predicted, row after row."""
    weight: Float[Tensor, "V E"]
    """The head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """All an objective may see. Time index: entry [b, t] is about *predicting* token t of row b."""

    logprobs: Float[Tensor, "B T"]
    old_logprobs: Float[Tensor, "B T"]
    ref_logprobs: Float[Tensor, "B T"] | None
    entropy: Float[Tensor, "B T"]
    advantages: Float[Tensor, " B"]
    mask: Bool[Tensor, "B T"]
    num_tokens: float
    """Trained tokens of the whole update: the denominator of a token mean."""
    num_sequences: float
    """Sequences of the whole update: the denominator of a sequence mean."""
    kl: Float[Tensor, "B T"] | None = None
    """`TokenScores.kl`."""
    engine_logprobs: Float[Tensor, "B T"] | None = None
    """See `Batch`; None asks for no correction."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossOutputs:
    loss: Float[Tensor, ""]
    metrics: Mapping[str, Float[Tensor, ""]]
    """Detached and already divided by the global counts like the loss, so that the values of
    micro-batches and ranks *add up* to the batch's value."""
    peaks: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Detached values of which micro-batches and ranks take the *maximum*."""
