"""Finding a piece of text in what is being sampled, without decoding every row at every step.

A tag such as `<back>` is several tokens, and the last may be merged with what follows. Only a token
that contains the text's last character can complete it; those are known once from the vocabulary,
so a row is decoded only when it has just drawn one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True, eq=False)
class TextWatch:
    """Tells which rows have just completed one of `texts`."""

    texts: tuple[str, ...]
    decode: Decode
    candidates: Bool[Tensor, " vocabulary"]
    """Ids that contain the last character of one of the texts."""

    @classmethod
    def create(cls, texts: Sequence[str], decode: Decode, vocabulary: int, device: torch.device) -> TextWatch:
        if any(not text for text in texts):
            raise ValueError(f"Cannot watch for an empty text: got {list(texts)}. Remove the empty one.")
        last = {text[-1] for text in texts}
        pieces = (decode([i]) if last else "" for i in range(vocabulary))
        # A piece that is only part of a character decodes to U+FFFD and may complete anything.
        hits = [any(c in piece for c in last) or (bool(last) and "\ufffd" in piece) for piece in pieces]
        return cls(texts=tuple(texts), decode=decode, candidates=torch.tensor(hits, device=device))

    def completed(
        self, ids: Int[Tensor, "R M"], count: Int[Tensor, " R"], last: Int[Tensor, " R"]
    ) -> Bool[Tensor, " R"]:
        """True where the last sampled token has just completed one more of the texts."""
        found = torch.zeros(len(last), dtype=torch.bool, device=last.device)
        if not self.texts:
            return found
        rows = self.candidates[last].nonzero().flatten()
        if not len(rows):
            return found
        places = count[rows, None] + torch.arange(-self._window, 0, device=count.device)
        tails = torch.where(places < 0, -1, ids[rows[:, None], places.clamp(min=0)])
        hits = [self._just_completed([i for i in tail if i >= 0]) for tail in tails.tolist()]
        found[rows] = torch.tensor(hits, dtype=torch.bool, device=last.device)
        return found

    def completes(self, ids: Sequence[int]) -> bool:
        """The same of one row's ids: whether the last has just completed one more of the texts."""
        if not self.texts or not bool(self.candidates[ids[-1]]):
            return False
        return self._just_completed(ids[-self._window :])

    def _just_completed(self, tail: Sequence[int]) -> bool:
        now, before = self.decode(tail), self.decode(tail[:-1])
        return any(now.count(text) > before.count(text) for text in self.texts)

    @property
    def _window(self) -> int:
        """Enough tokens to hold the longest text even if each is a single byte."""
        return max(len(text.encode()) for text in self.texts) + 1
