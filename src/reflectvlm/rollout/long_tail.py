"""Groups that do not wait for their longest rollouts.

An engine asks such a policy (`protocols.LongTail`) whenever a rollout of a group has ended. What it says
depends on counts of that group alone, so a rollout is still a function of (seed, prompt, member). Cutting
is a bias: a cut answer is scored as it stands, like one that ran into its token budget, unless
`drop_truncated` leaves both out. Left out: cutting rows by how likely they are to end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StopGroup:
    """Once `share` of a group has ended, the rest get `grace` more tokens.

    Example: of 8 rollouts six have ended, the sixth after 210 tokens: with `StopGroup(share=0.75, grace=64)`
    the last two may have 274 and are then cut (stop reason "cut").
    """

    share: float = 0.75
    grace: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(
                f"StopGroup.share is {self.share}. It is a share of a group, above 0 and at most 1."
            )
        if self.grace < 0:
            raise ValueError(f"StopGroup.grace is {self.grace}. It must be 0 tokens or more.")

    def __call__(self, ended: Sequence[int], size: int, /) -> int | None:
        enough = math.ceil(round(self.share * size, 9))  # 0.55 of 20 is 11, not 12
        return ended[enough - 1] + self.grace if len(ended) >= enough else None
