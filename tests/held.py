"""A rubric for the small recipe of test_launch.py. A process that loads it can be made to wait amid its work:

    HELD=PHASE:RANK:CALL     in which phase, which process, and at which call of that work (from 1)
    HELD_AT=PATH             it writes PATH/here, with its number, and waits until PATH/go is there

Importing this does it, so that nothing of the run's own code knows. What is held is the first thing of the
phase that a process does by itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reflectvlm.rewards.lift import per_rollout
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.rollout.decoding import Decoding
from reflectvlm.train.checkpoint import CheckpointStore
from reflectvlm.train.feed import Feed
from reflectvlm.train.rl import RLTrainer
from reflectvlm.types import Rollout

WORK: dict[str, list[tuple[type, str]]] = {
    "data": [(Feed, "_at")],
    "rollout": [(Decoding, "_prefill")],
    "reward": [(Rubric, "score")],
    "update": [(RLTrainer, "batch")],
    "save": [(RLTrainer, "tensors")],
    "disk": [(CheckpointStore, "save")],
}
"""By phase, what is held: before it begins. `disk` is the thread of the first process that writes."""


def remainder(rollout: Rollout) -> float:
    """Differs between rollouts of a random policy."""
    if os.environ.get("FAILS_IN") == os.environ.get("RANK", "0"):
        raise OSError("no reward today")
    return (sum(rollout.sampled_ids) % 7) / 7


def rubric() -> Rubric:
    return Rubric(rewards={"remainder": per_rollout(remainder)}, weights={"remainder": 1.0}, on_error="raise")


def _wait(folder: Path) -> None:
    (folder / "here.new").write_text(str(os.getpid()))
    (folder / "here.new").rename(folder / "here")
    while not (folder / "go").exists():
        time.sleep(0.02)


def _hold(owner: Any, name: str, call: int, act: Callable[[], None]) -> None:
    real, calls = getattr(owner, name), []

    def held(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            act()
        return real(*arguments, **named)

    setattr(owner, name, held)


if "HELD" in os.environ:
    what, rank, call = os.environ["HELD"].split(":")
    if rank == os.environ.get("RANK", "0"):
        for owner, name in WORK[what]:
            _hold(owner, name, int(call), lambda: _wait(Path(os.environ["HELD_AT"])))
