"""Answers that vLLM samples in rounds: each open row asks for the tokens up to its next trigger.

    ids so far + blocks  ->  Request  ->  Completion  ->  token by token: end? trigger?  ->  block  -> ...

Where an answer ends and where a tag is complete is decided here, on ids, by the rules of the in-process
engine (`rollout/decoding.py`), because vLLM finds a stop text in its own detokenised text: it may see a tag
one token late, or not at all if the tag began before a block. What it sampled behind a tag is dropped. What
it stopped for and we do not goes on in the next round. So its stops save work and change no rollout.

Left out: blocks that are a part of an image, and what attention says about an answer (ROUTE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from reflectvlm.integrations.vllm_requests import Completion, Request, check_prompt, collapse
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.rollout.continuing import Begun
from reflectvlm.rollout.placing import Placed, answer_spans
from reflectvlm.rollout.sampling import NonFiniteLogits
from reflectvlm.rollout.triggers import Triggers
from reflectvlm.rollout.watch import TextWatch
from reflectvlm.spans import count_tokens
from reflectvlm.types import Prompt, Rollout, SamplingParams, Spans, StopReason, Visual


@dataclass(kw_only=True, eq=False)
class Row:
    """One rollout so far."""

    prompt: Prompt
    place: int
    """The prompt's, in the call."""
    member: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    placed: list[Placed] = field(default_factory=list)
    stop: StopReason | None = None

    @property
    def spans(self) -> Spans:
        """Prompt and answer so far."""
        return self.prompt.spans + answer_spans(self.ids, self.logprobs, self.placed)

    def rollout(self, policy: QwenVL) -> Rollout:
        begun = Begun(
            ids=tuple(self.ids), logprobs=tuple(self.logprobs), placed=tuple(self.placed), stop=self.stop
        )
        return begun.rollout(policy, self.prompt)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounds:
    """The rules of one call."""

    policy: QwenVL
    sampling: SamplingParams
    triggers: Triggers
    stop_watch: TextWatch
    context: int
    """Most tokens of a row, prompt and blocks counted."""
    seed: int

    def requests(self, rows: Sequence[Row]) -> list[tuple[Row, Request]]:
        """What the rows that have not ended ask for next. One without room for a token ends here."""
        asked = [(row, self._request(row)) for row in rows if row.stop is None]
        return [(row, request) for row, request in asked if request is not None]

    def take(self, row: Row, request: Request, completion: Completion) -> None:
        """Adds what was sampled for a row, up to its end or to the first tag that brings a block."""
        check_prompt(request, completion, row.prompt)
        self._check(row, request, completion)
        for number, logprob in zip(completion.ids, completion.logprobs, strict=True):
            row.ids.append(number)
            row.logprobs.append(logprob)
            if (stop := self._ended(row.ids)) is not None:
                row.stop = stop
                return
            if (placed := self._inserted(row)) is not None:
                row.placed.append(placed)
                return

    def _inserted(self, row: Row) -> Placed | None:
        """What goes in where a row has just completed its trigger."""
        if self.triggers.reattention.trigger is None or not self.triggers.completed(row.ids):
            return None
        placed = self.triggers.ask(row.prompt, row.ids, row.placed, None)
        return None if placed is None else _whole(placed, row.prompt)

    def _request(self, row: Row) -> Request | None:
        spans = row.spans
        room = self.context - count_tokens(spans, row.prompt.grids)
        if room < 1 and not row.ids:
            raise ValueError(
                f"Row {row.prompt.sample.id!r}: its prompt leaves no room for an answer in a context of "
                f"{self.context} tokens. Raise engine.max_model_len, or lower max_prompt_tokens."
            )
        if room < 1:
            row.stop = "length"
            return None
        sampling, triggers = self.sampling, self.triggers
        ids, shown = collapse(spans, self.policy.vision)
        special = () if triggers.special is None else (triggers.special,)
        return Request(
            ids=ids,
            images=tuple(row.prompt.sample.images[image] for image in shown),
            image_tokens=tuple(row.prompt.grids[image].tokens for image in shown),
            image_id=self.policy.vision.pad,
            max_tokens=min(sampling.max_tokens - len(row.ids), room),
            temperature=sampling.temperature,
            seed=request_seed(self.seed, row.place, row.member, len(row.ids)),
            stop_ids=tuple(sorted({*self.policy.end_ids, *sampling.stop_ids, *special})),
            stop=(*sampling.stop, *triggers.watch.texts),
            banned=self.policy.reserved_ids,
        )

    def _ended(self, ids: Sequence[int]) -> StopReason | None:
        """Why an answer ends with the last of its ids; None if it goes on."""
        if ids[-1] in self.policy.end_ids:
            return "eos"
        if ids[-1] in self.sampling.stop_ids or self.stop_watch.completes(ids):
            return "stop"
        return "length" if len(ids) >= self.sampling.max_tokens else None

    def _check(self, row: Row, request: Request, completion: Completion) -> None:
        sample, ids, logprobs = row.prompt.sample.id, completion.ids, completion.logprobs
        if not ids or len(ids) != len(logprobs) or len(ids) > request.max_tokens:
            raise RuntimeError(
                f"Row {sample!r}, rollout {row.member}: vLLM was asked for 1 to {request.max_tokens} tokens "
                f"and gave {len(ids)} with {len(logprobs)} log-probs. It has perhaps given up the request; "
                "its own log says why."
            )
        if reserved := sorted({*ids} & {*request.banned}):
            raise RuntimeError(
                f"Row {sample!r}, rollout {row.member}: vLLM sampled {self.policy.decode(reserved)!r}, ids "
                f"{reserved}, which stand for pixels or for nothing and were banned by logit_bias. Take a "
                "version of vLLM that heeds it, or the in-process engine."
            )
        for token, logprob in enumerate(logprobs, start=len(row.ids) + 1):
            if not math.isfinite(logprob):
                raise NonFiniteLogits(sample, row.member, token, self.sampling.temperature)


def request_seed(*numbers: int) -> int:
    """One seed from that of the call, the prompt's place, the rollout's number and its tokens so far, so that
    no rollout's tokens depend on its neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _whole(placed: Placed, prompt: Prompt) -> Placed:
    """Raises ValueError for a block that is a part of an image."""
    for span in (*placed.insertion.before, *placed.insertion.after):
        if isinstance(span, Visual) and span.keep is not None:
            raise ValueError(
                f"Row {prompt.sample.id!r}: the re-attention shows {len(span.keep)} of the visual tokens of "
                f"image {span.image}, and vLLM shows whole images only. Take engine=InProcessEngine "
                "(reflectvlm.rollout.engine), or a re-attention that shows all of them, such as VisualCopy."
            )
    return placed
