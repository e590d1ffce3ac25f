"""Our side: RLTrainer's own rollout and update on the common work. Started by `compare.py`.

Rollout is `sample_groups`: rows, images, generation, rewards. Update is `update`: log-probs of policy and
reference, backward pass, optimiser. Nothing is logged or saved, as on TRL's side.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from measure import arguments, begin, memory, now, peak_memory, report, trained_parameters
from workload import QUESTION, SYSTEM, Work, noise, pages

from reflectvlm import (
    KL,
    AdamW,
    ClippedSurrogate,
    GroupMean,
    InProcessEngine,
    Instruction,
    RLTrainer,
    Rubric,
    SamplingParams,
    load_policy,
)
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.types import Rollout, Sample


def rewards(group: Sequence[Rollout]) -> list[float]:
    return [noise(rollout.sampled_ids) for rollout in group]


def never_ends(policy: QwenVL) -> QwenVL:
    """Every answer gets its full length: the ids that end one are among those that are never drawn."""
    vars(policy)["end_ids"] = policy.reserved_ids[:1]
    return policy


def trainer(policy: QwenVL, work: Work, steps: int, **settings: Any) -> RLTrainer:
    """What TRL's side is configured to do, as a constructor's call."""
    images = pages(work.prompts * steps, work.pixels)
    common: dict[str, Any] = {
        "policy": never_ends(policy),
        "data": [
            Sample(id=str(number), question=QUESTION, answer="3", images=(image,))
            for number, image in enumerate(images)
        ],
        "instruction": Instruction(system=SYSTEM),
        "rubric": Rubric(rewards={"noise": rewards}, weights={"noise": 1.0}),
        "steps": steps,
        "sampling": SamplingParams(max_tokens=work.tokens),
        "group_size": work.group,
        "prompts_per_step": work.prompts,
        "max_prompt_tokens": 8192,
        "engine": lambda policy: InProcessEngine(policy=policy, max_rows=max(64, work.group)),
        "advantage": GroupMean(),
        "objective": ClippedSurrogate(kl=KL(coefficient=work.kl) if work.kl else None, reduce="token_mean"),
        "optimizer": AdamW(lr=1e-6),
    }
    return RLTrainer(**common | settings)


def measured(made: RLTrainer, repeats: int, seconds: float) -> dict[str, Any]:
    """Seconds of each repeat; the first step only warms up."""
    rollout: list[float] = []
    update: list[float] = []
    tokens, prompt = 0, 0
    for step in range(repeats + 1):
        start = now()
        groups = made.sample_groups(step)
        between = now()
        made.update(groups, step)
        end = now()
        sampled = [one for group in groups for one in group.rollouts]
        tokens = sum(len(one.sampled_ids) for one in sampled)
        prompt = made.policy.prompt_length(sampled[0].prompt)
        if step:
            rollout.append(between - start)
            update.append(end - between)
        if sum(rollout) + sum(update) > seconds:
            break
    return {"rollout": rollout, "update": update, "tokens": tokens, "prompt": prompt}


def main(args: argparse.Namespace) -> None:
    begin(args)
    settings = dict(args.settings)
    policy = load_policy(str(args.model), **settings.pop("policy", {}))
    made = trainer(policy, args.work, args.repeats + 1, **settings)
    made.prepare()
    idle = memory()
    found = measured(made, args.repeats, args.seconds)
    trained = trained_parameters(policy.module)
    report(side="ours", **found, trained=trained, idle=idle, peak=peak_memory(), settings=args.settings)


if __name__ == "__main__":
    main(arguments(__doc__).parse_args())
