"""The in-process rollout engine: prompts -> groups of rollouts, on the policy's own weights.

The work is done by `decoding.Decoding`, one per call; nothing of a call stays behind in the engine.

Left out here: CUDA graphs and partial rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.rollout.decoding import Decoding
from reflectvlm.rollout.placing import special_id
from reflectvlm.rollout.telling import Telling
from reflectvlm.rollout.triggers import Triggers
from reflectvlm.rollout.watch import TextWatch
from reflectvlm.types import Prompt, Rollout, SamplingParams, Visual


@dataclass(frozen=True, kw_only=True, eq=False)
class InProcessEngine:
    """Satisfies `protocols.RolloutEngine`.

    Example: `InProcessEngine(policy=policy).generate(prompts, 8, SamplingParams(), Implicit(), seed=0)`
    """

    policy: QwenVL
    max_rows: int = 64
    """Rows decoded at one time; bounds the memory of the cache."""
    _watches: dict[tuple[str, ...], TextWatch] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"InProcessEngine.max_rows is {self.max_rows}. It must be at least 1.")

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: SamplingParams,
        reattention: Reattention,
        *,
        seed: int,
    ) -> list[tuple[Rollout, ...]]:
        if n < 1:
            raise ValueError(f"generate was asked for n={n} rollouts per prompt. Ask for at least 1.")
        decoding = self._decoding(prompts, n, sampling, reattention, seed)
        for _ in decoding.steps(max(self.max_rows, n)):
            pass
        done = decoding.done
        return [tuple(done[p * n + m] for m in range(n)) for p in range(len(prompts))]

    def stream(
        self, prompt: Prompt, sampling: SamplingParams, reattention: Reattention, *, seed: int = 0
    ) -> Iterator[str | Visual | Rollout]:
        """One rollout as it comes: pieces of its text and inserted blocks in their order, and at the end the
        rollout."""
        decoding = self._decoding([prompt], 1, sampling, reattention, seed)
        telling = Telling(self.policy.decode)
        for rows in decoding.steps(1):
            if rows is not None:
                yield from telling.news(decoding.spans(rows, 0))
        rollout = decoding.done[0]
        yield telling.rest(rollout)
        yield rollout

    def _decoding(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: SamplingParams,
        reattention: Reattention,
        seed: int,
    ) -> Decoding:
        self.policy.module.eval()
        return Decoding(
            policy=self.policy,
            prompts=prompts,
            n=n,
            sampling=sampling,
            seed=seed,
            triggers=self._triggers(reattention),
            stop_watch=self._watch(tuple(sampling.stop)),
        )

    def _triggers(self, reattention: Reattention) -> Triggers:
        trigger = reattention.trigger
        special = special_id(self.policy, trigger)
        if special in (*self.policy.reserved_ids, *self.policy.end_ids):
            raise ValueError(
                f"The re-attention's trigger {trigger!r} stands for pixels or ends a turn, so nothing would "
                "ever be inserted. Give a tag of its own, e.g. '<REFLECTION>' or '<back>'."
            )
        texts = () if trigger is None or special is not None else (trigger,)
        return Triggers(
            policy=self.policy, reattention=reattention, special=special, watch=self._watch(texts)
        )

    def _watch(self, texts: tuple[str, ...]) -> TextWatch:
        if texts not in self._watches:
            policy = self.policy
            vocabulary = policy.model.lm_head.weight.shape[0] if texts else 1
            self._watches[texts] = TextWatch.create(texts, policy.decode, vocabulary, policy.device)
        return self._watches[texts]
