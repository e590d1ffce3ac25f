"""A reward function written for TRL, here as one term of a `Rubric` beside one of our own.

Run it with `python examples/trl_reward_here.py`.
"""

from __future__ import annotations

from typing import Any

from reflectvlm.integrations.trl import from_trl
from reflectvlm.rewards import Rubric, per_rollout
from reflectvlm.types import Prompt, Rollout, Sample


def boxed_solution(completions: list[Any], solution: list[str], **_: Any) -> list[float | None]:
    """TRL's form: lists in, a list out, messages with a content, None for "does not apply"."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(f"\\boxed{{{gold}}}" in text) for text, gold in zip(texts, solution, strict=True)]


@per_rollout
def says_back(rollout: Rollout) -> float:
    """One of our rewards: a number for a rollout."""
    return float(rollout.count("<back>") > 0)


def rollouts_of(prompt: Prompt, *texts: str) -> tuple[Rollout, ...]:
    return tuple(Rollout(prompt=prompt, spans=(), text=text, stop="eos") for text in texts)


if __name__ == "__main__":
    rubric = Rubric(
        rewards={"accuracy": from_trl(boxed_solution, conversational=True), "back": says_back},
        weights={"accuracy": 0.9, "back": 0.1},
    )
    prompt = Prompt(sample=Sample(id="sum-1", question="What is 3 + 5?", answer="8"), spans=())
    scored = rubric(
        rollouts_of(prompt, "\\boxed{8}", "<back>3 and 5</back> \\boxed{8}", "<back>?</back> \\boxed{9}")
    )
    for rollout, reward in zip(scored.rollouts, scored.rewards, strict=True):
        print(f"{reward:.1f}  {rollout.text}")
