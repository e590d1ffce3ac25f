"""What a model's greedy answers to held-out questions come to: one line of a comparison.

Unlike `Evaluation`, whose curve belongs to one run, this looks at what differs between models: what
re-attention inserted, what was said that is not there, and the time it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention, Reward, RolloutEngine
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.spans import count_tokens
from reflectvlm.train.evaluate import Evaluation
from reflectvlm.train.ranks import Ranks
from reflectvlm.train.runtime import Runtime
from reflectvlm.train.sharing import Placed, shared
from reflectvlm.train.table import Table
from reflectvlm.types import Instruction, SamplingParams, ScoredGroup

WARM_UP = 4
"""Most tokens of an answer before the clock starts."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one row came to. Means are over the held-out answers."""

    answers: int
    accuracy: float | None
    hallucination: float | None
    """None: nothing was mentioned that could be wrong, or it is not measured."""
    layout: float | None
    length: float
    """Sampled tokens per answer."""
    inserted: float
    """Tokens that re-attention put in per answer, the two around each block counted."""
    truncated: float
    seconds: float
    """Time to generate all answers; a warm-up, prompts and scoring are not counted."""
    processes: int = 1
    """That shared the questions; of the slowest are the seconds."""


def measure(
    policy: QwenVL,
    held_out: Evaluation,
    rubric: Rubric,
    instruction: Instruction,
    reattention: Reattention,
    measures: Mapping[str, Reward],
    engine: Callable[..., RolloutEngine] = InProcessEngine,
    ranks: Ranks | None = None,
) -> Figures:
    """Asks a model the held-out questions. `measures` are rewards that only this comparison looks at;
    `engine` makes the engine from the policy; `ranks` are the processes that share the questions, of which
    the slowest gives the time."""
    ranks = ranks or Ranks()
    sampling = SamplingParams(max_tokens=held_out.max_tokens, temperature=0.0)
    judge = replace(
        rubric,
        rewards={**rubric.rewards, **measures},
        weights={**rubric.weights, **dict.fromkeys(measures, 0.0)},
    )
    seconds = 0.0

    def answered() -> list[Placed]:
        nonlocal seconds
        policy.module.to(Runtime().device)
        made = engine(policy=policy)
        places = ranks.mine(len(held_out.data))
        prompts = [policy.prompt(held_out.data[place], instruction) for place in places]
        # The first pass of a process and of a shape costs what none after it does: it is not timed.
        made.generate(prompts[:2], 1, replace(sampling, max_tokens=WARM_UP), reattention, seed=0)
        started = time.perf_counter()
        groups = made.generate(prompts, 1, sampling, reattention, seed=0)
        seconds = time.perf_counter() - started
        return list(map(Placed, places, judge.score(groups)))

    groups, _ = shared(ranks, answered)
    return replace(figures_of(groups, ranks.most([seconds])[0]), processes=ranks.world)


def figures_of(groups: Sequence[ScoredGroup], seconds: float) -> Figures:
    """One answer per question -> means over all of them."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    inserted = [count_tokens(rollout.insertions, rollout.prompt.grids) for rollout in rollouts]
    return Figures(
        answers=len(rollouts),
        accuracy=_part(groups, "accuracy"),
        hallucination=_part(groups, "hallucination"),
        layout=_part(groups, "format"),
        length=float(np.mean([len(rollout.sampled_ids) for rollout in rollouts])),
        inserted=float(np.mean(inserted)),
        truncated=float(np.mean([rollout.truncated for rollout in rollouts])),
        seconds=seconds,
    )


def comparison(title: str, figures: Mapping[str, Figures]) -> Table:
    """The paper's ablation table."""
    drawn = Table(title, ("model", "accuracy", "hallucination", "layout", "length", "inserted", "seconds"))
    for name, of in figures.items():
        shares = (share(value) for value in (of.accuracy, of.hallucination, of.layout))
        seconds = f"{of.seconds:.1f}" + (f" ({of.processes} processes)" if of.processes > 1 else "")
        drawn.add(name, *shares, f"{of.length:.1f}", f"{of.inserted:.1f}", seconds)
    return drawn


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _part(groups: Sequence[ScoredGroup], name: str) -> float | None:
    """Mean of a reward over the answers it applies to; None if it applies to none."""
    values = [value for group in groups for value in group.parts.get(name, ()) if np.isfinite(value)]
    return float(np.mean(values)) if values else None
