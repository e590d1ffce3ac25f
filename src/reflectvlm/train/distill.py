"""Distillation: a policy answers questions, and its good answers become gold rows for SFT.

Qwen Look Again (arXiv 2505.23558), stage 3: Qwen-Zero answers; answers judged wrong are rewritten. Here
the rubric judges instead of four models, and a wrong answer is left out or replaced by the row's own
gold answer instead of a strong model's. How rows are written and resumed is in `distill_run.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention, RolloutEngine
from reflectvlm.pulse import phase
from reflectvlm.reattention import Implicit, check_reattention
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.train.distill_run import COLUMNS, Distilled, run_distillation
from reflectvlm.train.feed import Feed, without_answer
from reflectvlm.train.prefetch import check_workers
from reflectvlm.train.ranks import Ranks
from reflectvlm.train.row_rules import RowRules
from reflectvlm.train.run import Output
from reflectvlm.train.runtime import Runtime
from reflectvlm.train.sharing import Placed, shared
from reflectvlm.types import Instruction, Prompt, Rollout, Sample, SamplingParams, ScoredGroup, Spans

LAYOUT = "format"
"""The reward whose failure counts as a broken layout rather than a wrong answer."""


@dataclass(kw_only=True, eq=False)
class Distiller:
    """A recipe is this constructor's call, written down.

    Example:
        Distiller(policy=load_policy("runs/qwen_la_brpo/model"), data=Digits(), rubric=brpo_rubric(),
                  rows=2000).run().rows
    """

    policy: QwenVL
    data: Sequence[Sample]
    rubric: Rubric
    """Judges the answers, and of several that are good picks the one with the highest reward."""
    rows: int | None = None
    """How many rows of the data are asked, each once; None for all."""
    instruction: Instruction = field(default_factory=Instruction)
    reattention: Reattention = field(default_factory=Implicit)
    engine: Callable[..., RolloutEngine] = InProcessEngine
    sampling: SamplingParams = field(default_factory=SamplingParams)
    samples_per_row: int = 1
    """Answers to each question; one of the good ones becomes its row."""
    rows_per_batch: int = 64
    """Rows asked at one time: what a kill loses at most. With sampling, another number draws others."""
    accept: Mapping[str, float] = field(default_factory=lambda: {"accuracy": 1.0, LAYOUT: 1.0})
    """Least value of each named reward of the rubric that an answer must have to be good."""
    wrong: Literal["drop", "repair"] = "drop"
    """What becomes of a question without a good answer: no row, or one with its gold answer."""
    target: str = "trace"
    """Column of the answers: of the gold ones in the data, and of all of them in the rows."""
    max_prompt_tokens: int = 2048
    """What becomes of rows with a longer prompt is in `row_rules`; an image's tokens are never cut."""
    row_rules: RowRules = field(default_factory=RowRules)
    """What becomes of rows that cannot be read or are too long."""
    workers: int = 0
    """Processes that read rows ahead; 0 reads them here. Changes no result."""
    prefetch: int | None = None
    """With workers: rows read ahead; None for those of one batch."""
    tag: str = "<REFLECTION>"
    """Whose rate is reported."""
    seed: int = 0
    name: str = "distill"
    variant: str = ""
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        check_reattention(self.reattention)
        check_workers(self.workers, self.prefetch)
        if len(self.data) == 0:
            raise ValueError("data has no rows. Check its path and its filters.")
        for name in ("samples_per_row", "rows_per_batch", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. It must be at least 1.")
        if self.rows is not None and not 1 <= self.rows <= len(self.data):
            raise ValueError(
                f"rows is {self.rows}, but the data has {len(self.data)}, and each is asked once. "
                f"Give 1 to {len(self.data)}, or null for all; samples_per_row asks one several times."
            )
        if self.wrong not in ("drop", "repair"):
            raise ValueError(f"wrong is {self.wrong!r}. It must be 'drop' or 'repair'.")
        if self.target in (*COLUMNS, "keep"):
            raise ValueError(
                f"target is {self.target!r}, which is another column of the rows. Choose none of {COLUMNS}."
            )
        if unknown := sorted(set(self.accept) - set(self.rubric.rewards)):
            raise ValueError(
                f"accept names {unknown[0]!r}, but the rubric's rewards are {sorted(self.rubric.rewards)}. "
                "Name one of them, with the least value that a good answer has."
            )

    @property
    def total(self) -> int:
        return len(self.data) if self.rows is None else self.rows

    @property
    def batches(self) -> int:
        return -(-self.total // self.rows_per_batch)

    def places(self, batch: int) -> range:
        """Places in the data of a batch, counted from 0."""
        first = batch * self.rows_per_batch
        return range(first, min(first + self.rows_per_batch, self.total))

    def run(self) -> Distilled:
        """Asks all rows, or goes on where an earlier run stopped."""
        with self.feed.reading():
            return run_distillation(self)

    # -- one batch ------------------------------------------------------------------------------

    def prompts(self, batch: int) -> list[Prompt]:
        """The prompts of a batch, without the rows that `row_rules` leave out."""
        with phase("data"):
            return [prompt for prompt, _ in self.feed.these(self.places(batch))]

    def answers(self, prompts: Sequence[Prompt], batch: int) -> list[ScoredGroup]:
        """Random numbers depend on the seed and the batch alone, so a restart draws the same ones."""
        if not prompts:
            return []
        seed = int(np.random.SeedSequence([self.seed, batch, 31]).generate_state(1)[0])
        mine = self.ranks.mine(len(prompts))
        drawn: dict[str, Any] = {"seed": seed} if self.ranks.world == 1 else {"seed": seed, "places": mine}

        if sync := getattr(self.rollout_engine, "sync", None):
            sync(0)  # the weights are those of the start, all the time

        def answered() -> list[Placed]:
            with phase("rollout"):
                groups = self.rollout_engine.generate(
                    [prompts[place] for place in mine],
                    self.samples_per_row,
                    self.sampling,
                    self.reattention,
                    **drawn,
                )
            with phase("reward"):
                return list(map(Placed, mine, self.rubric.score(groups)))

        return shared(self.ranks, answered)[0]

    def good(self, group: ScoredGroup) -> Rollout | None:
        """The best of the answers that are good, the first of equals."""
        numbers = [
            i for i in range(len(group.rollouts)) if all(self._passes(group, i, n) for n in self.accept)
        ]
        return group.rollouts[max(numbers, key=group.rewards.__getitem__)] if numbers else None

    def broken(self, group: ScoredGroup) -> bool:
        """Whether all of a question's answers have a broken layout."""
        if LAYOUT not in self.accept:
            return False
        return not any(self._passes(group, i, LAYOUT) for i in range(len(group.rollouts)))

    def gold(self, sample: Sample) -> str:
        return _gold(sample, self.target)

    def _passes(self, group: ScoredGroup, number: int, reward: str) -> bool:
        return group.parts[reward][number] >= self.accept[reward]  # never true of NaN

    # -- parts made once ------------------------------------------------------------------------

    @functools.cached_property
    def feed(self) -> Feed:
        instruction = self.instruction
        return Feed(
            data=self.data,
            policy=self.policy,
            seed=self.seed,
            rules=self.row_rules,
            limit=self.max_prompt_tokens,
            limit_name="max_prompt_tokens",
            instruction=lambda _: instruction,
            answer=functools.partial(_missed, self.target) if self.wrong == "repair" else without_answer,
            workers=self.workers,
            prefetch=self.prefetch or self.rows_per_batch,
        )

    @functools.cached_property
    def runtime(self) -> Runtime:
        return Runtime()

    @property
    def ranks(self) -> Ranks:
        """The processes that share the questions. Every one has the whole model."""
        return self.runtime.ranks

    @functools.cached_property
    def rollout_engine(self) -> RolloutEngine:
        self.policy.module.to(self.runtime.device)
        return self.engine(policy=self.policy)


def _missed(column: str, _policy: QwenVL, sample: Sample) -> Spans:
    """No answer is given yet, but one that a repair would need is missed before anything is asked."""
    _gold(sample, column)
    return ()


def _gold(sample: Sample, column: str) -> str:
    text = sample.columns.get(column)
    if isinstance(text, str) and text:
        return text
    raise ValueError(
        f"Row {sample.id!r} has no text in its column {column!r}, and wrong='repair' takes the gold "
        f"answer from there. Name its column with target=…, or give wrong='drop'; this row has "
        f"{sorted(sample.columns)}."
    )
