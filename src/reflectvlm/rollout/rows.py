"""What the engine remembers of the rows it is decoding: one entry per live row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

NEVER = 2**62
"""A count that no row reaches."""


@dataclass(kw_only=True)
class Rows:
    """R live rows; row r uses row r of the cache. M is the token budget."""

    job: Int[Tensor, " R"]
    """Which rollout this is: prompt number * group size + rollout number."""
    hidden: Float[Tensor, "R D"]
    """Hidden state that predicts the row's next token."""
    position: Int[Tensor, " R"]
    """Position of the row's next text token."""
    count: Int[Tensor, " R"]
    """Tokens sampled so far."""
    until: Int[Tensor, " R"]
    """At this count a row is ended."""
    pause: Int[Tensor, " R"]
    """At this count it leaves without having ended."""
    uniform: Float[Tensor, "R M"]
    ids: Int[Tensor, "R M"]
    logprobs: Float[Tensor, "R M"]
    attended: Float[Tensor, "R W"]
    """Attention of the sampled tokens to the first W tokens of the row, summed; W is 0 if nobody asks."""
    recent: Float[Tensor, "R L W"]
    """The last L summands of it, newest last: those of a tag are taken back if the tag is."""

    def __len__(self) -> int:
        return len(self.job)

    def only(self, rows: Int[Tensor, " N"]) -> Rows:
        return Rows(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})

    def close(self, holes: Int[Tensor, " N"], movers: Int[Tensor, " N"], left: int) -> None:
        """Rows `movers` go to `holes`, in place, and what is behind the first `left` is dropped."""
        for name in (f.name for f in dataclasses.fields(self)):
            values = getattr(self, name)
            if len(holes):
                values[holes] = values[movers]
            setattr(self, name, values[:left])

    def __add__(self, other: Rows) -> Rows:
        names = [f.name for f in dataclasses.fields(self)]
        return Rows(**{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names})

    def record(self, ids: Int[Tensor, " R"], logprobs: Float[Tensor, " R"]) -> None:
        """Appends one sampled token to every row."""
        where = self.count[:, None]
        self.ids.scatter_(1, where, ids[:, None])
        self.logprobs.scatter_(1, where, logprobs[:, None])
        self.count += 1
