"""A few steps of RL on the shipped base, against recorded numbers.

A change that is not meant to change what is learned leaves these alone. One that is records them
anew (`make golden`) and says why in its commit.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from reflectvlm.config import load_recipe

GOLDEN = Path(__file__).parent / "golden" / "tiny_rl.jsonl"
KEYS = ("reward", "accuracy", "layout_rate", "length/mean", "loss", "entropy", "grad_norm")


def steps() -> list[dict[str, float]]:
    trainer = load_recipe("grpo", "prompts_per_step=6", "sampling.temperature=1.0", "steps=100", "test=null")
    results = [trainer.step(step).metrics for step in range(4)]
    return [{key: result[key] for key in KEYS} for result in results]


def test_trajectory_is_the_recorded_one(request: Any) -> None:
    """Bug: a refactoring that silently changes sampling, rewards, loss or gradient."""
    found = steps()
    if request.config.getoption("--record-golden"):
        GOLDEN.write_text("".join(json.dumps(row) + "\n" for row in found))
    expected = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        for key in KEYS:
            assert math.isclose(one[key], other[key], rel_tol=1e-3, abs_tol=1e-5), (step, key)
