"""An engine that replays given texts, for tests, notebooks and looking at rewards and losses.

Texts are tokenised by the policy and their log-probs are the policy's own, so everything behind the
engine works as with sampled rollouts. Re-attention, stop strings and the token budget are obeyed.
Left out: the model has no say in what is written, and the seed changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.rollout.placing import Placed, answer_spans, place_insertions, text_ids
from reflectvlm.types import Prompt, Rollout, SamplingParams, Spans, StopReason, Text


@dataclass(frozen=True, kw_only=True, eq=False)
class ScriptedEngine:
    """Satisfies `protocols.RolloutEngine`.

    Example: `ScriptedEngine(policy=policy, texts=("\\boxed{7}", "\\boxed{8}"))` gives each prompt of a
    call with n=2 the one and then the other.
    """

    policy: QwenVL
    texts: Sequence[str] | Callable[[Prompt, int], str]
    """Taken in turn over all rollouts of a call; or a function of prompt and rollout number."""

    def __post_init__(self) -> None:
        if not callable(self.texts) and (isinstance(self.texts, str) or not self.texts):
            raise ValueError(
                f"ScriptedEngine.texts is {self.texts!r}. Give a sequence of one or more texts, "
                "or a function of prompt and rollout number."
            )

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: SamplingParams,
        reattention: Reattention,
        *,
        seed: int,
        places: Sequence[int] | None = None,
    ) -> list[tuple[Rollout, ...]]:
        del seed, places
        lines = [self._line(prompt, p, m, n, sampling) for p, prompt in enumerate(prompts) for m in range(n)]
        owners = [prompt for prompt in prompts for _ in range(n)]
        placed = place_insertions(self.policy, list(zip(owners, lines, strict=True)), reattention)
        logprobs = self._logprobs(owners, lines, placed, sampling.logprob_temperature)
        rollouts = [
            self._rollout(prompt, ids, scores, inserted, sampling)
            for prompt, ids, scores, inserted in zip(owners, lines, logprobs, placed, strict=True)
        ]
        return [tuple(rollouts[p * n : (p + 1) * n]) for p in range(len(prompts))]

    def _line(self, prompt: Prompt, p: int, member: int, n: int, sampling: SamplingParams) -> list[int]:
        """The ids of one rollout, cut where a sampled one would have ended."""
        script = self.texts
        text = script(prompt, member) if callable(script) else script[(p * n + member) % len(script)]
        (span,) = self.policy.answer(text)
        ids = list(span.ids[: sampling.max_tokens])
        for count in range(1, len(ids) + 1):
            so_far = self._text(ids[:count])
            if ids[count - 1] in sampling.stop_ids or any(stop in so_far for stop in sampling.stop):
                return ids[:count]
        return ids

    def _text(self, ids: Sequence[int]) -> str:
        ended = ids[-1] in self.policy.end_ids
        return self.policy.decode(ids[:-1] if ended else ids)

    def _stop(self, ids: Sequence[int], sampling: SamplingParams) -> StopReason:
        if ids[-1] in self.policy.end_ids:
            return "eos"
        text = self._text(ids)
        stopped = ids[-1] in sampling.stop_ids or any(stop in text for stop in sampling.stop)
        return "stop" if stopped else "length"

    def _rollout(
        self,
        prompt: Prompt,
        ids: list[int],
        logprobs: list[float],
        placed: Sequence[Placed],
        sampling: SamplingParams,
    ) -> Rollout:
        spans = answer_spans(ids, logprobs, placed)
        written = text_ids(spans)
        return Rollout(
            prompt=prompt,
            spans=spans,
            text=self._text(written),
            stop=self._stop(ids, sampling),
            offsets=self.policy.offsets(written),
        )

    def _logprobs(
        self,
        prompts: Sequence[Prompt],
        lines: Sequence[list[int]],
        placed: Sequence[list[Placed]],
        temperature: float,
    ) -> list[list[float]]:
        """The policy's own log-probs of each rollout's ids; 0 for those that are not trained."""
        if not lines:
            return []
        answers = [
            answer_spans(ids, [0.0] * len(ids), inserted) for ids, inserted in zip(lines, placed, strict=True)
        ]
        batch = self.policy.batch(list(zip(prompts, answers, strict=True)))
        with torch.no_grad():
            scores = self.policy.score(batch, self.policy.features(batch.images), temperature).logprobs
        return [self._own(scores[b][batch.trained[b]].tolist(), answers[b]) for b in range(len(lines))]

    @staticmethod
    def _own(scores: list[float], spans: Spans) -> list[float]:
        """One log-prob per id of the line: the trained ones' own, in order, and 0 for the others."""
        left = iter(scores)
        texts = [span for span in spans if isinstance(span, Text) and span.logprobs]
        return [next(left) if span.trained else 0.0 for span in texts for _ in span.ids]
