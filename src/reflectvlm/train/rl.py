"""Reinforcement learning with a group baseline. One step, top to bottom:

Sample -> Prompt -> Rollout x G -> ScoredGroup -> Batch -> loss -> one or several updates
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from reflectvlm.advantages import GroupMean
from reflectvlm.batch import Batch
from reflectvlm.models.carried import carry
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.reference import AdaptersOff, make_reference
from reflectvlm.objectives import ClippedSurrogate, wants_full_kl
from reflectvlm.protocols import Advantage, Objective, Reattention, RolloutEngine
from reflectvlm.pulse import phase
from reflectvlm.reattention import Implicit
from reflectvlm.rewards.early import Early
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.train.budget import MICRO_TOKENS
from reflectvlm.train.compute import Compute
from reflectvlm.train.evaluate import DEFAULT_TAG, Evaluation, summarize
from reflectvlm.train.feed import Feed, Share
from reflectvlm.train.loop import run_training
from reflectvlm.train.optim import AdamW
from reflectvlm.train.pending import PartialRollouts, Pending, partial_metrics
from reflectvlm.train.ranks import Ranks
from reflectvlm.train.reference_sync import ReferenceSync
from reflectvlm.train.rl_checks import check_settings
from reflectvlm.train.row_rules import RowRules
from reflectvlm.train.run import Metrics, Output, RunResult, StepResult
from reflectvlm.train.runtime import Runtime
from reflectvlm.train.sharing import Placed, shared
from reflectvlm.train.unscored import Unscored
from reflectvlm.train.update import Updater, score_without_grad
from reflectvlm.train.zero import sharded_frozen, through
from reflectvlm.types import Instruction, Prompt, Rollout, Sample, SamplingParams, ScoredGroup

log = logging.getLogger("reflectvlm")


@dataclass(frozen=True, kw_only=True)
class DynamicSampling:
    """DAPO's dynamic sampling (arXiv 2503.14476, sec. 3.2): groups whose rewards are all equal teach
    nothing, so further prompts are sampled in their place, up to `max_rounds` rounds a step."""

    max_rounds: int = 3

    def __post_init__(self) -> None:
        if self.max_rounds < 1:
            raise ValueError(f"DynamicSampling.max_rounds is {self.max_rounds}. It must be at least 1.")


@dataclass(kw_only=True, eq=False)
class RLTrainer:
    """A recipe is this constructor's call, written down.

    Example:
        RLTrainer(policy=load_policy("tiny"), data=Digits(), rubric=rubric, steps=10).run()
    """

    policy: QwenVL
    data: Sequence[Sample]
    rubric: Rubric
    steps: int
    instruction: Instruction = field(default_factory=Instruction)
    reattention: Reattention = field(default_factory=Implicit)
    engine: Callable[..., RolloutEngine] = InProcessEngine
    """Makes the engine from the policy."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    group_size: int = 8
    """G, rollouts per prompt."""
    prompts_per_step: int = 8
    max_prompt_tokens: int = 2048
    """What becomes of rows with a longer prompt is in `row_rules`; an image's tokens are never cut."""
    row_rules: RowRules = field(default_factory=RowRules)
    """What becomes of rows that cannot be read or are too long."""
    workers: int = 0
    """Processes that read rows ahead; 0 reads them here. Changes no result."""
    prefetch: int | None = None
    """With workers: rows read ahead; None for those of one step."""
    advantage: Advantage = field(default_factory=GroupMean)
    objective: Objective = field(default_factory=ClippedSurrogate)
    updates_per_step: int = 1
    """Optimiser steps on one set of rollouts, each on an equal share of its groups."""
    epochs_per_step: int = 1
    """How often those rollouts are gone through."""
    keep_equal_groups: bool = False
    """True: groups whose rewards are all equal are trained on, as GRPO's formula has it: no advantage,
    but their tokens count in the mean and carry the KL term. False: they are left out, which saves
    their passes."""
    dynamic_sampling: DynamicSampling | None = None
    partial: PartialRollouts | None = None
    """Lets a rollout that takes too long go on in the next step; None: a step waits for all."""
    overlap_rewards: bool = True
    """Asks rewards that wait for processes or servers about each group as soon as it is complete. False:
    when all are. Changes no result."""
    drop_truncated: bool = False
    """DAPO's overlong filtering: rollouts cut by the token budget teach nothing."""
    reference_sync: ReferenceSync | None = None
    """Lets the reference of the KL term follow the policy; None keeps it where the run began."""
    optimizer: AdamW = field(default_factory=AdamW)
    compute: Compute = field(default_factory=Compute)
    """How weights, gradients and moments are spread over processes. Changes no result."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is no number does: stop the run, or leave out the batch."""
    max_nonfinite: int = 10
    """With skip: batches that a run may leave out."""
    micro_tokens: int = MICRO_TOKENS
    """Most tokens of one pass of an update (`budget.py`); bounds memory and changes no result."""
    evaluation: Evaluation | None = None
    """Validation rows, for the curve."""
    test: Evaluation | None = None
    """Test rows, for the table before and after."""
    tag: str = DEFAULT_TAG
    """Whose rate and curves the training rollouts are reported with."""
    seed: int = 0
    name: str = "rl"
    variant: str = ""
    """Which variant of the method this is; part of the run's name."""
    output: Output = field(default_factory=Output)

    position: int = field(default=0, init=False)
    """Rows of the data taken so far."""
    updates: int = field(default=0, init=False)
    """Optimiser steps taken so far: the policy version of new rollouts."""
    row_ids: tuple[str, ...] = field(default=(), init=False)
    """Ids of the rows of the current step, for reports."""
    unscored: Unscored = field(default_factory=Unscored, init=False, repr=False)
    """What it knows of steps that taught nothing."""
    _own: dict[int, ScoredGroup] = field(default_factory=dict, init=False, repr=False)
    """This process's groups of the current step, by identity."""

    def __post_init__(self) -> None:
        check_settings(self)

    # -- the step -------------------------------------------------------------------------------

    def step(self, step: int) -> StepResult:
        """One step of the loop; `step` counts from 0."""
        started = time.perf_counter()
        version = self.updates
        with self.updater.weights.whole():
            scored = self.sample_groups(step)
        self.unscored.see(
            scored,
            failed=self.ranks.agree(self.rubric.lost > self.unscored.lost),
            lost=self.rubric.lost,
            cut=self.drop_truncated and all(r.truncated for group in scored for r in group.rollouts),
            steps=self.steps,
        )
        sampled = time.perf_counter()
        useful = [group for group in scored if group.has_signal]
        metrics = summarize(scored, self.tag) | {
            "useful_groups": len(useful) / len(scored),
            "lr": self.optimizer.rate(step, self.steps),
        }
        trained = [group for group in scored if any(group.scored)] if self.keep_equal_groups else useful
        if trained:
            with phase("update"):
                metrics |= self.update(trained, step)
        if self.pending is not None:
            waiting = self.runtime.sum({"groups": float(len(self.pending.waiting))})["groups"]
            metrics |= partial_metrics(scored, version, int(waiting))
        if self.reference_sync is not None and self.reference is not None:
            self.reference_sync(self.policy.module, self.reference.module, step)
        ended = time.perf_counter()
        tokens = sum(len(r.sampled_ids) for group in scored for r in group.rollouts)
        metrics |= {
            "time/rollout": sampled - started,
            "time/update": ended - sampled,
            "time/step": ended - started,
            "time/tokens_per_second": tokens / (ended - started),
        }
        return StepResult(metrics=metrics, groups=scored)

    def sample_groups(self, step: int) -> list[ScoredGroup]:
        """Prompts -> scored groups; with dynamic sampling until enough of them carry a signal."""
        if self.pending is not None:
            return self._continued(self.pending, step)
        rounds = self.dynamic_sampling.max_rounds if self.dynamic_sampling else 1
        kept: list[ScoredGroup] = []
        self.row_ids = ()
        self._own = {}
        for number in range(rounds):
            share = self.next_share(self.prompts_per_step)
            self.row_ids += share.ids
            seed = _mixed(self.seed, step, number)
            kept += self._shared(functools.partial(self._scored, share, seed))
            useful = [group for group in kept if group.has_signal]
            if len(useful) >= self.prompts_per_step:
                return useful[: self.prompts_per_step]
        # Groups with a signal first: if they are too few, the rest fills up and counts in the metrics.
        return sorted(kept, key=lambda group: not group.has_signal)[: self.prompts_per_step]

    def _shared(self, work: Callable[[], list[Placed]]) -> list[ScoredGroup]:
        """The groups of all processes; this one's own are kept whole, for its part of the updates."""
        groups, own = shared(self.ranks, work)
        self._own |= {id(group): group for group in own}
        return groups

    def _scored(self, share: Share, seed: int) -> list[Placed]:
        """This process's part of a step's groups."""
        prompts = [prompt for prompt, _ in share.items]
        places = None if self.ranks.world == 1 else share.places
        with phase("rollout"), Early(self.rubric, on=self.overlap_rewards) as early:
            rollouts = self.rollouts(prompts, seed, early.take, places)
            with phase("reward"):
                scored = early.score(rollouts)
        return list(map(Placed, share.places, self._untruncated(scored)))

    def _untruncated(self, scored: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        return [group.without_truncated() if self.drop_truncated else group for group in scored]

    def _continued(self, pending: Pending, step: int) -> list[ScoredGroup]:
        """The groups that are complete after this step's tokens, the oldest first; the others wait."""
        pending.read(self.feed)
        self._own = {}
        share = self.next_share(self.prompts_per_step)
        pending.begin(share, self.group_size, _mixed(self.seed, step, 0))
        self.row_ids = tuple(one.group.prompt.sample.id for one in pending.waiting)
        return self._shared(functools.partial(self._gone_on, pending))

    def _gone_on(self, pending: Pending) -> list[Placed]:
        done: dict[int, tuple[Rollout, ...]] = {}
        positions = [one.position for one in pending.waiting]  # they grow from the oldest group on
        with phase("rollout"), Early(self.rubric, on=self.overlap_rewards) as early:
            for number, group in pending.go_on(
                self.rollout_engine, self.sampling, self.reattention, self.updates
            ):
                done[number] = group
                early.take(number, group)
            with phase("reward"):
                scored = early.score([done[number] for number in sorted(done)], sorted(done))
        return list(map(Placed, [positions[number] for number in sorted(done)], self._untruncated(scored)))

    def rollouts(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        take: Callable[[int, tuple[Rollout, ...]], None] | None = None,
        places: Sequence[int] | None = None,
    ) -> list[tuple[Rollout, ...]]:
        """A group for each prompt. `take` gets each as soon as it is complete, if the engine can tell.
        `places`: those of the prompts in the whole step, if other processes have some of it."""
        asked = (prompts, self.group_size, self.sampling, self.reattention)
        drawn: dict[str, Any] = {"seed": seed} if places is None else {"seed": seed, "places": places}
        engine = self._synced_engine()
        groups: Callable[..., Iterator[tuple[int, tuple[Rollout, ...]]]] | None
        groups = getattr(engine, "groups", None)
        if groups is None:
            return [self._stamped(group) for group in engine.generate(*asked, **drawn)]
        done: dict[int, tuple[Rollout, ...]] = {}
        for number, group in groups(*asked, **drawn):
            done[number] = self._stamped(group)
            if take is not None:
                take(number, done[number])
        return [done[number] for number in range(len(prompts))]

    def _synced_engine(self) -> RolloutEngine:
        """The engine. One that holds a copy of the weights is told which version of them it needs next."""
        engine = self.rollout_engine
        if (sync := getattr(engine, "sync", None)) is not None:
            sync(self.updates)
        return engine

    def _stamped(self, group: Sequence[Rollout]) -> tuple[Rollout, ...]:
        return tuple(dataclasses.replace(one, policy_version=self.updates) for one in group)

    def next_prompts(self, count: int) -> list[Prompt]:
        """The next rows as prompts, without those that `row_rules` leave out; all of them in one process, and
        this process's part of them in several."""
        return [prompt for prompt, _ in self.next_share(count).items]

    def next_share(self, count: int) -> Share:
        with phase("data"):
            share, self.position = self.feed.share(count, self.position)
        return share

    def batch(self, groups: Sequence[ScoredGroup]) -> Batch:
        """Groups -> one batch. Unscored rollouts are left out: their advantage is 0."""
        sequences, advantages = [], []
        for group in groups:
            for rollout, advantage, scored in zip(
                group.rollouts, self.advantage(group).tolist(), group.scored, strict=True
            ):
                if scored:
                    sequences.append((rollout.prompt, rollout.spans))
                    advantages.append(advantage)
        batch = self.policy.batch(sequences)
        batch = dataclasses.replace(batch, advantages=torch.tensor(advantages, device=batch.ids.device))
        counts = self.runtime.sum({"tokens": batch.num_tokens, "sequences": batch.num_sequences})
        batch = dataclasses.replace(batch, num_tokens=counts["tokens"], num_sequences=counts["sequences"])
        if getattr(self.rollout_engine, "foreign_logprobs", False):
            batch = dataclasses.replace(
                batch, old_logprobs=self._own_scores(batch), engine_logprobs=batch.old_logprobs
            )
        if self.reference is None or wants_full_kl(self.objective):
            return batch
        return dataclasses.replace(batch, ref_logprobs=self.reference_scores(batch))

    def _own_scores(self, batch: Batch) -> Tensor:
        """The policy's log-probs before the first update, where the engine's are those of another program."""
        weights = self.updater.weights
        return score_without_grad(
            self.policy,
            batch,
            self.micro_tokens,
            self.sampling.logprob_temperature,
            in_step=self.updater.in_step if weights.in_step else None,
            run=weights.run,
        )

    def reference_scores(self, batch: Batch) -> Tensor:
        """The reference's log-probs of the batch's trained tokens."""
        assert self.reference is not None
        asked = (self.reference, batch, self.micro_tokens, self.sampling.logprob_temperature)
        in_step = self.updater.in_step
        if self._reference_engine is not None:
            run = functools.partial(through, self._reference_engine)
            return score_without_grad(*asked, in_step=in_step, run=run)
        with self.updater.weights.whole():  # with adapters the reference is the policy itself
            return score_without_grad(*asked)

    def update(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        """All updates on one set of rollouts; metrics are those of the last one. A process has its own
        groups of each update."""
        lr = self.optimizer.rate(step, self.steps)
        size = -(-len(groups) // self.updates_per_step)
        parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        batches = [self.batch([one for one in part if self._is_own(one)]) for part in parts]
        metrics: dict[str, float] = {}
        for _ in range(self.epochs_per_step):
            for batch in batches:
                metrics = self.updater(batch, lr)
                self.updates += 1
        return metrics

    def _is_own(self, group: ScoredGroup) -> bool:
        return self.ranks.world == 1 or id(group) in self._own

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
            workers=self.workers,
            prefetch=self.prefetch or self.prompts_per_step,
            ranks=self.ranks,
        )

    @functools.cached_property
    def pending(self) -> Pending | None:
        """The rollouts that go on in the next step."""
        return None if self.partial is None else Pending(settings=self.partial, policy=self.policy)

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
    def reference(self) -> QwenVL | AdaptersOff | None:
        """The policy as it was at the start, if the objective has a KL term."""
        return None if getattr(self.objective, "kl", None) is None else make_reference(self.policy)

    @functools.cached_property
    def _reference_engine(self) -> Any:
        """What fetches the reference's weights where processes share them; None where it is whole."""
        if self.compute.stage != 3 or not isinstance(self.reference, QwenVL):
            return None
        return sharded_frozen(self.reference.module, self.compute)

    @functools.cached_property
    def updater(self) -> Updater:
        return Updater(
            policy=self.policy,
            objective=self.objective,
            optimizer=self.optimizer.build(self.policy.module.parameters()),
            runtime=self.runtime,
            micro_tokens=self.micro_tokens,
            max_grad_norm=self.optimizer.max_grad_norm,
            temperature=self.sampling.logprob_temperature,
            reference=self.reference if wants_full_kl(self.objective) else None,
            on_nonfinite=self.on_nonfinite,
        )

    # -- what the loop needs --------------------------------------------------------------------

    def prepare(self) -> None:
        """Makes the reference before anything trains."""
        carry(self.policy.model.config, self.reattention, self.instruction)
        self.policy.module.to(self.runtime.device)
        _ = self.reference, self._reference_engine, self.updater.weights

    def canary_prompts(self) -> list[Prompt]:
        return self.feed.first(4)

    def evaluate(self, evaluation: Evaluation) -> tuple[Metrics, list[ScoredGroup]]:
        with phase("evaluation"), self.updater.weights.whole():
            return evaluation(
                self.policy,
                self._synced_engine(),
                self.rubric,
                self.instruction,
                self.reattention,
                ranks=self.ranks,
            )

    def state(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "updates": self.updates,
            "unscored_steps": self.unscored.steps,
            "rows": self.feed.state(),
            "rubric": self.rubric.state(),
            "pending": [] if self.pending is None else self.pending.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.position, self.updates = state["position"], state["updates"]
        self.unscored.steps = state["unscored_steps"]
        self.feed.load_state(state["rows"])
        self.rubric.load_state(state["rubric"])
        if self.pending is not None:
            self.pending.load_state(state.get("pending", []))
        elif state.get("pending"):
            log.warning("%d groups that are begun are dropped: partial is not set", len(state["pending"]))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """A reference that stays is made anew from the start; one that moves must be kept."""
        if self.reference_sync is None or self.reference is None:
            return {}
        return {"reference": self.reference.module.state_dict()}

    def load_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        if self.reference_sync is not None and self.reference is not None:
            self.reference.module.load_state_dict(dict(tensors["reference"]))

    def run(self) -> RunResult:
        """The whole run: canary, steps, evaluations, checkpoints, the table at the end."""
        with self.feed.reading():
            return run_training(self)


def _mixed(*numbers: int) -> int:
    """One seed from several numbers."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
