"""Length terms over the number of sampled tokens; what re-attention inserted never counts.

All lie in [-1, 0]: they take away from an answer that is too long, they never pay for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reflectvlm.types import Rollout


@dataclass(frozen=True, kw_only=True)
class SoftOverlong:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), n = number of sampled tokens:

            0                                  n <= max_tokens - buffer
    r =     (max_tokens - buffer - n)/buffer   up to max_tokens
            -1                                 above
    """

    max_tokens: int
    buffer: int
    rowwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.max_tokens:
            raise ValueError(
                f"SoftOverlong has buffer={self.buffer} and max_tokens={self.max_tokens}. "
                "It needs 0 < buffer <= max_tokens: the buffer is the last stretch before the limit."
            )

    def __call__(self, group: Sequence[Rollout], /) -> list[float]:
        free = self.max_tokens - self.buffer
        return [min(0.0, max(-1.0, (free - len(r.sampled_ids)) / self.buffer)) for r in group]


@dataclass(frozen=True, kw_only=True)
class LengthPenalty:
    """Distance from a wished length: r = -max(0, |n - target| - tolerance) / target, at least -1.

    Our own simple term, not a paper's. Too short costs as much as too long.
    """

    target: int
    tolerance: int = 0
    rowwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.target < 1 or self.tolerance < 0:
            raise ValueError(
                f"LengthPenalty has target={self.target} and tolerance={self.tolerance} tokens. "
                "It needs target >= 1 and tolerance >= 0."
            )

    def __call__(self, group: Sequence[Rollout], /) -> list[float]:
        distances = (max(0, abs(len(r.sampled_ids) - self.target) - self.tolerance) for r in group)
        return [-min(1.0, distance / self.target) if distance else 0.0 for distance in distances]
