"""Supervised fine-tuning on gold answers, with the same spans, `Batch` and update as RL."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from reflectvlm.data.rows import BadRow
from reflectvlm.models.carried import carry
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.objectives import CrossEntropy
from reflectvlm.protocols import Objective, Reattention, RolloutEngine
from reflectvlm.pulse import phase
from reflectvlm.reattention import Implicit, check_reattention
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.placing import answer_spans, place_insertions, place_recorded
from reflectvlm.train.budget import MICRO_TOKENS
from reflectvlm.train.compute import Compute
from reflectvlm.train.evaluate import Evaluation
from reflectvlm.train.feed import Feed
from reflectvlm.train.loop import run_training
from reflectvlm.train.optim import AdamW
from reflectvlm.train.prefetch import check_workers
from reflectvlm.train.ranks import Ranks
from reflectvlm.train.row_rules import Item, RowRules
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
    """Of prompt and gold answer, with its blocks. What becomes of longer rows is in `row_rules`."""
    row_rules: RowRules = field(default_factory=lambda: RowRules(on_bad="error", on_long="error"))
    """What becomes of rows that cannot be read, have no gold answer or are too long."""
    workers: int = 0
    """Processes that read rows ahead; 0 reads them here. Changes no result."""
    prefetch: int | None = None
    """With workers: rows read ahead; None for those of one step."""
    objective: Objective = field(default_factory=CrossEntropy)
    optimizer: AdamW = field(default_factory=lambda: AdamW(lr=1e-5))
    compute: Compute = field(default_factory=Compute)
    """How weights, gradients and moments are spread over processes. Changes no result."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is no number does: stop the run, or leave out the batch."""
    max_nonfinite: int = 10
    """With skip: batches that a run may leave out."""
    micro_tokens: int = MICRO_TOKENS
    """Most tokens of one pass of an update (`budget.py`); bounds memory and changes no result."""
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
        check_workers(self.workers, self.prefetch)
        for name in ("steps", "rows_per_step", "micro_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. It must be at least 1.")
        if self.max_nonfinite < 0:
            raise ValueError(f"max_nonfinite is {self.max_nonfinite}. It must be 0 or more.")
        if len(self.data) == 0:
            raise ValueError("data has no rows. Check its path and its filters.")
        if close := getattr(self.reattention, "close", None):
            raise ValueError(
                f"reattention.close is {close!r}: it forces text while generating, and a gold answer has its "
                "own. Leave it out; if vision-only is meant, leave the blocks of your traces empty."
            )

    def step(self, step: int) -> StepResult:
        started = time.perf_counter()
        sequences = self.next_sequences()
        batch = self.policy.batch(sequences)
        counts = self.runtime.sum({"tokens": batch.num_tokens, "sequences": batch.num_sequences})
        batch = dataclasses.replace(batch, num_tokens=counts["tokens"], num_sequences=counts["sequences"])
        with phase("update"):
            metrics = self.updater(batch, self.optimizer.rate(step, self.steps))
        self.updates += 1
        seconds = time.perf_counter() - started
        metrics |= {"length/mean": counts["tokens"] / counts["sequences"]}
        metrics |= {"time/step": seconds, "time/tokens_per_second": counts["tokens"] / seconds}
        return StepResult(metrics=metrics, groups=[])

    def next_sequences(self) -> list[tuple[Prompt, Spans]]:
        """The next rows, without those that `row_rules` leave out; all of them in one process, and this
        process's part of them in several."""
        shows_blocks = self.reattention.trigger is not None
        with phase("data"), self.updater.weights.whole() if shows_blocks else contextlib.nullcontext():
            share, self.position = self.feed.share(self.rows_per_step, self.position)
        self.row_ids = share.ids
        return share.items

    def sequences(self, positions: Sequence[int]) -> list[tuple[Prompt, Spans]]:
        """Rows -> prompts and gold answers, with the blocks that re-attention puts into them."""
        return self.feed.these(positions)

    def _with_blocks(self, items: Sequence[Item]) -> Sequence[Item | BadRow]:
        if self.reattention.trigger is None or not items:
            return items
        answers = [(prompt, _ids(answer)) for prompt, answer in items]
        self.policy.module.eval()
        if self.choices:
            return [self._as_recorded(*answer, self.choices) for answer in answers]
        longest = max(self.policy.prompt_length(prompt) + len(ids) for prompt, ids in answers)
        rows = max(1, self.micro_tokens // longest)
        placed = place_insertions(self.policy, answers, self.reattention, rows=rows)
        return [
            (prompt, answer_spans(ids, (), one)) for (prompt, ids), one in zip(answers, placed, strict=True)
        ]

    def _as_recorded(self, prompt: Prompt, ids: tuple[int, ...], column: str) -> Item | BadRow:
        sample = prompt.sample
        try:
            one = place_recorded(self.policy, prompt, ids, self.reattention, sample.columns.get(column))
        except ValueError as error:
            return BadRow(sample.id, column, "unusable choices", "", str(error))
        return prompt, answer_spans(ids, (), one)

    @property
    def instructions(self) -> Sequence[Instruction]:
        return (self.instruction,) if isinstance(self.instruction, Instruction) else tuple(self.instruction)

    # -- parts made once ------------------------------------------------------------------------

    @functools.cached_property
    def feed(self) -> Feed:
        instructions = self.instructions
        return Feed(
            data=self.data,
            policy=self.policy,
            seed=self.seed,
            rules=self.row_rules,
            limit=self.max_tokens,
            limit_name="max_tokens",
            instruction=lambda position: instructions[position % len(instructions)],
            answer=GoldAnswer(self.target),
            finish=self._with_blocks,
            workers=self.workers,
            prefetch=self.prefetch or self.rows_per_step,
            ranks=self.ranks,
        )

    @functools.cached_property
    def runtime(self) -> Runtime:
        return Runtime(compute=self.compute)

    @property
    def ranks(self) -> Ranks:
        return self.runtime.ranks

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
            micro_tokens=self.micro_tokens,
            max_grad_norm=self.optimizer.max_grad_norm,
            on_nonfinite=self.on_nonfinite,
        )

    # -- what the loop needs --------------------------------------------------------------------

    def prepare(self) -> None:
        carry(self.policy.model.config, self.reattention, self.instructions[0])
        self.policy.module.to(self.runtime.device)
        _ = self.updater.weights

    def canary_prompts(self) -> list[Prompt]:
        return self.feed.first(4)

    def evaluate(self, evaluation: Evaluation) -> tuple[Metrics, list[ScoredGroup]]:
        with phase("evaluation"), self.updater.weights.whole():
            return evaluation(
                self.policy,
                self.rollout_engine,
                self.rubric,
                self.instructions[0],
                self.reattention,
                ranks=self.ranks,
            )

    def state(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "updates": self.updates,
            "rows": self.feed.state(),
            "rubric": self.rubric.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.position, self.updates = state["position"], state["updates"]
        self.feed.load_state(state["rows"])
        self.rubric.load_state(state["rubric"])

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Nothing beside weights and moments."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Nothing to put back."""

    def run(self) -> RunResult:
        with self.feed.reading():
            return run_training(self)


@dataclass(frozen=True)
class GoldAnswer:
    """A row's gold answer as spans. Raises BadRow if it has none."""

    column: str

    def __call__(self, policy: QwenVL, sample: Sample) -> Spans:
        if not isinstance(text := sample.columns.get(self.column), str) or not text:
            raise BadRow(
                sample.id,
                self.column,
                "missing gold answer",
                f"SFT trains on one per row; name its column with target=…; this row has "
                f"{sorted(sample.columns)}.",
                f"Row {sample.id!r} has no text in its column {self.column!r}.",
            )
        try:
            return policy.answer(text)
        except (ValueError, TypeError) as error:  # the tokenizer's, for half of a surrogate pair
            detail = f"Row {sample.id!r}, column {self.column!r}: {error}"
            raise BadRow(sample.id, self.column, "unusable gold answer", "", detail) from error


def _ids(answer: Spans) -> tuple[int, ...]:
    """Ids of a gold answer, which is one span of text."""
    (text,) = answer
    assert isinstance(text, Text)
    return text.ids
