"""Steps in which no rollout got a reward: a run that learns nothing must not end well in silence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from reflectvlm.types import ScoredGroup

log = logging.getLogger("reflectvlm")

PATIENCE = 3
"""Steps in a row without any scored rollout, for a failure, after which a run stops."""
IDLE_STEPS = 10
"""Steps in a row in which simply no reward applied, after which a run says so."""


@dataclass(kw_only=True)
class Unscored:
    """A reward that always fails stops the run. One that seldom applies (None) has not failed: a long row of
    such steps is told, once."""

    steps: int = 0
    """Since the last with a scored rollout, in which a reward failed or all answers were cut. Kept in
    checkpoints."""
    idle: int = 0
    """Steps since then in which nothing failed."""
    lost: int = 0
    """`rubric.lost` after the step before."""
    told: bool = False

    def see(self, groups: Sequence[ScoredGroup], *, failed: bool, lost: int, cut: bool, steps: int) -> None:
        """`failed`: a reward has, in one of the processes; `cut`: all answers were left out; `steps`: of the
        whole run. Raises RuntimeError when patience is over."""
        self.lost = lost
        if any(any(group.scored) for group in groups):
            self.steps = self.idle = 0
            return
        self.steps += failed or cut
        self.idle += not (failed or cut)
        if self.steps >= min(PATIENCE, steps):
            raise RuntimeError(
                f"All rollouts of {self.steps} step{'s' * (self.steps > 1)} in a row are "
                "unscored, so nothing trains. In each of them a reward failed (the warnings above say how), "
                "or drop_truncated left all answers out. Repair the reward, or raise sampling.max_tokens; "
                "resume=auto goes on from the last checkpoint, if there is one."
            )
        if self.idle >= IDLE_STEPS and not self.told:
            self.told = True
            log.warning(
                "No reward applied to any rollout of %d steps in a row (each gave None), so nothing trained "
                "in them. If that is not meant, give the rubric a reward that always applies, or raise "
                "prompts_per_step.",
                self.idle,
            )
