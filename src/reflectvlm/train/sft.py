"""Supervised fine-tuning on gold answers, with the same spans, `Batch` and update as RL."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reflectvlm.models.carried import carry
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.objectives import CrossEntropy
from reflectvlm.protocols import Objective, Reattention, RolloutEngine
from reflectvlm.reattention import Implicit, check_reattention
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.placing import answer_spans, place_insertions, place_recorded
from reflectvlm.spans import count_tokens
from reflectvlm.train.cursor import row_at
from reflectvlm.train.evaluate import Evaluation
from reflectvlm.train.loop import run_training
from reflectvlm.train.optim import AdamW
from reflectvlm.train.run import Metrics, Output, RunResult, StepResult
from reflectvlm.train.runtime import Runtime
from reflectvlm.train.update import Updater
from reflectvlm.types import Instruction, Prompt, Sample, ScoredGroup, Spans, Text


@dataclass(kw_only=True, eq=False)
class SFTTrainer:
    """A recipe is this constructor's call, written down.

    Example:
        SFTTrainer(policy=load_policy("tiny"), data=DigitTraces(data=Digits()), rubric=rubric, steps=10).run()
    """

    policy: QwenVL
    data: Sequence[Sample]
    """Rows whose gold answer, with all tags, stands in the column `target`."""
    rubric: Rubric
    """Scores the answers of evaluations; training does not use it."""
    steps: int
    target: str = "trace"
    instruction: Instruction | Sequence[Instruction] = field(default_factory=Instruction)
    """One, or several of which each row gets one in turn."""
    reattention: Reattention = field(default_factory=Implicit)
    """Its blocks are put into the gold answers before they are trained on. What ROUTE chooses there
    comes from a pass of the policy as it is at that step, without gradients."""
    choices: str | None = None
    """Column with recorded choices (`placing.recorded`), taken instead of that pass."""
    engine: Callable[..., RolloutEngine] = InProcessEngine
    rows_per_step: int = 16
    max_tokens: int = 4096
    """A row longer than this is refused, by name."""
    objective: Objective = field(default_factory=CrossEntropy)
    optimizer: AdamW = field(default_factory=lambda: AdamW(lr=1e-5))
    micro_rows: int = 16
    evaluation: Evaluation | None = None
    test: Evaluation | None = None
    seed: int = 0
    name: str = "sft"
    variant: str = ""
    output: Output = field(default_factory=Output)

    position: int = field(default=0, init=False)
    updates: int = field(default=0, init=False)
    row_ids: tuple[str, ...] = field(default=(), init=False)
    """Ids of the rows of the current step, for reports."""

    def __post_init__(self) -> None:
        check_reattention(self.reattention)
        for name in ("steps", "rows_per_step", "micro_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. It must be at least 1.")
        if len(self.data) == 0:
            raise ValueError("data has no rows. Check its path and its filters.")
        if close := getattr(self.reattention, "close", None):
            raise ValueError(
                f"reattention.close is {close!r}: it forces text while generating, and a gold answer has its "
                "own. Leave it out; if vision-only is meant, leave the blocks of your traces empty."
            )

    def step(self, step: int) -> StepResult:
        started = time.perf_counter()
        sequences = self.sequences(range(self.position, self.position + self.rows_per_step))
        self.position += len(sequences)
        self.row_ids = tuple(prompt.sample.id for prompt, _ in sequences)
        batch = self.policy.batch(sequences)
        counts = self.runtime.sum({"tokens": batch.num_tokens, "sequences": batch.num_sequences})
        batch = dataclasses.replace(batch, num_tokens=counts["tokens"], num_sequences=counts["sequences"])
        metrics = self.updater(batch, self.optimizer.rate(step, self.steps))
        self.updates += 1
        seconds = time.perf_counter() - started
        metrics |= {"length/mean": batch.num_tokens / len(batch)}
        metrics |= {"time/step": seconds, "time/tokens_per_second": counts["tokens"] / seconds}
        return StepResult(metrics=metrics, groups=[])

    def sequences(self, positions: Sequence[int]) -> list[tuple[Prompt, Spans]]:
        """Rows -> prompts and gold answers, with the blocks that re-attention puts into them."""
        rows = [self._row(position) for position in positions]
        answers = [(prompt, answer[0].ids) for prompt, answer in rows]
        if self.reattention.trigger is None:
            return list(rows)
        self.policy.module.eval()
        placed = (
            [
                place_recorded(
                    self.policy, *answer, self.reattention, answer[0].sample.columns.get(self.choices)
                )
                for answer in answers
            ]
            if self.choices
            else place_insertions(self.policy, answers, self.reattention, rows=self.micro_rows)
        )
        made = [
            (prompt, answer_spans(ids, (), one)) for (prompt, ids), one in zip(answers, placed, strict=True)
        ]
        for prompt, spans in made:
            self._check_length(prompt, spans)
        return made

    def _row(self, position: int) -> tuple[Prompt, tuple[Text]]:
        sample = row_at(self.data, position, self.seed)
        instructions = self.instructions
        prompt = self.policy.prompt(sample, instructions[position % len(instructions)])
        if not isinstance(text := sample.columns.get(self.target), str) or not text:
            raise ValueError(
                f"Row {sample.id!r} has no text in its column {self.target!r}. SFT trains on a gold answer "
                f"per row; name its column with target=…; this row has {sorted(sample.columns)}."
            )
        answer = self.policy.answer(text)
        self._check_length(prompt, answer)
        return prompt, answer

    def _check_length(self, prompt: Prompt, answer: Spans) -> None:
        if (length := count_tokens(prompt.spans + answer, prompt.grids)) > self.max_tokens:
            raise ValueError(
                f"Row {prompt.sample.id!r} has {length} tokens, more than max_tokens={self.max_tokens}. "
                "Leave it out, raise max_tokens or lower policy.max_pixels; nothing is cut."
            )

    @property
    def instructions(self) -> Sequence[Instruction]:
        return (self.instruction,) if isinstance(self.instruction, Instruction) else tuple(self.instruction)

    # -- parts made once ------------------------------------------------------------------------

    @functools.cached_property
    def runtime(self) -> Runtime:
        return Runtime()

    @functools.cached_property
    def rollout_engine(self) -> RolloutEngine:
        self.policy.module.to(self.runtime.device)
        return self.engine(policy=self.policy)

    @functools.cached_property
    def updater(self) -> Updater:
        return Updater(
            policy=self.policy,
            objective=self.objective,
            optimizer=self.optimizer.build(self.policy.module.parameters()),
            runtime=self.runtime,
            micro_rows=self.micro_rows,
            max_grad_norm=self.optimizer.max_grad_norm,
        )

    # -- what the loop needs --------------------------------------------------------------------

    def prepare(self) -> None:
        carry(self.policy.model.config, self.reattention, self.instructions[0])
        self.policy.module.to(self.runtime.device)
        _ = self.updater

    def canary_prompts(self) -> list[Prompt]:
        rows = (row_at(self.data, i, self.seed) for i in range(min(4, len(self.data))))
        return [self.policy.prompt(row, self.instructions[0]) for row in rows]

    def evaluate(self, evaluation: Evaluation) -> tuple[Metrics, list[ScoredGroup]]:
        return evaluation(
            self.policy, self.rollout_engine, self.rubric, self.instructions[0], self.reattention
        )

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "updates": self.updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.position, self.updates = state["position"], state["updates"]

    def run(self) -> RunResult:
        return run_training(self)
