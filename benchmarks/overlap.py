"""What it saves to ask rewards while other groups are still decoded: seconds of a step's rollouts and scores.

    python benchmarks/overlap.py
    python benchmarks/overlap.py --tokens 64 --seconds 0.05

The tiny policy with random weights, whose answers use up their tokens; 8 prompts, 8 rollouts each, 16 rows at
a time; a reward that sleeps `--seconds` per rollout in a pool of processes, as a judge's client or a slow
checker would, and one in plain Python. With and without `overlap_rewards` in turns; medians and extremes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

from reflectvlm import Custom, Digits, InProcessEngine, Output, RLTrainer, Rubric, SamplingParams
from reflectvlm.models.tiny import random_tiny
from reflectvlm.rewards import per_rollout
from reflectvlm.types import Rollout

RAW = argparse.RawDescriptionHelpFormatter  # the text above as it is written


def sleeping(seconds: float) -> Custom:
    def reward(texts: list[str]) -> list[float]:
        import time

        time.sleep(seconds * len(texts))
        return [float(len(text) % 7) for text in texts]

    return Custom(function=reward, workers=4)


@per_rollout
def busy(rollout: Rollout) -> float:
    """Some milliseconds of plain Python."""
    return float(sum(ord(letter) * number for number, letter in enumerate(rollout.text * 200)) % 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for name, reward in (("sleeps in a pool", sleeping(options.seconds)), ("plain Python", busy)):
        trainer = _trainer(reward, options.tokens)
        took: dict[bool, list[float]] = {True: [], False: []}
        trainer.sample_groups(0)  # warm: processes start, the first shapes
        for repeat in range(options.repeats):
            for on in (True, False):
                trainer.overlap_rewards = on
                trainer.position = 0
                started = time.perf_counter()
                trainer.sample_groups(repeat)
                took[on].append(time.perf_counter() - started)
        for on, seconds in took.items():
            print(
                f"{name:18s} overlap {'on ' if on else 'off'} {statistics.median(seconds):6.2f} s "
                f"({min(seconds):.2f} to {max(seconds):.2f})"
            )


def _trainer(reward: Any, tokens: int) -> RLTrainer:
    return RLTrainer(
        policy=random_tiny(),
        data=Digits(size=64),
        rubric=Rubric(rewards={"reward": reward}, weights={"reward": 1.0}),
        steps=100,
        engine=lambda policy: InProcessEngine(policy=policy, max_rows=16),
        sampling=SamplingParams(max_tokens=tokens),
        output=Output(root=tempfile.mkdtemp()),
    )


if __name__ == "__main__":
    main()
