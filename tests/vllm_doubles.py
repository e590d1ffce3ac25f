"""Doubles of vLLM: one answers with a policy of ours, one replays a script."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reflectvlm.integrations.vllm_requests import Completion, Request
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.reattention import Implicit
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.spans import flatten
from reflectvlm.types import Prompt, Sample, SamplingParams, Span, Text, Visual


@dataclass(kw_only=True, eq=False)
class Notes:
    """What a double was asked to do, in order."""

    calls: list[Any] = field(default_factory=list)
    rounds: list[list[Request]] = field(default_factory=list)
    forgets: bool = False
    """As vLLM at sleep level 2: its weights are gone after a sleep."""

    def load_weights(self) -> None:
        self.calls.append("load")

    def reset_caches(self, *, encoder: bool) -> None:
        self.calls.append("reset all" if encoder else "reset but encoder")

    def wake(self) -> None:
        self.calls.append("wake")

    def sleep(self) -> bool:
        self.calls.append("sleep")
        return self.forgets


@dataclass(kw_only=True, eq=False)
class PolicyBackend(Notes):
    """Cuts the images it is handed and reads the ids it is given, as vLLM does, and samples from a policy."""

    policy: QwenVL
    deaf: bool = False
    """Sees no stop text, so every request runs on behind a tag."""
    off_by: float = 0.0
    """Added to every log-prob: the arithmetic of another engine."""
    _engine: InProcessEngine = field(init=False)

    def __post_init__(self) -> None:
        self._engine = InProcessEngine(policy=self.policy)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.calls.append("generate")
        self.rounds.append(list(requests))
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Completion:
        prompt = self._prompt(request)
        sampling = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            stop=() if self.deaf else request.stop,
            stop_ids=request.stop_ids,
        )
        ((made,),) = self._engine.generate([prompt], 1, sampling, Implicit(), seed=request.seed)
        (text,) = made.spans
        assert isinstance(text, Text)
        return Completion(
            ids=text.ids,
            logprobs=tuple(logprob + self.off_by for logprob in text.logprobs),
            prompt_ids=tuple(flatten(prompt.spans, prompt.grids, self.policy.vision).ids.tolist()),
        )

    def _prompt(self, request: Request) -> Prompt:
        spans: list[Span] = []
        start = image = at = 0
        while at < len(request.ids):
            if request.ids[at : at + 3] == tuple(self.policy.vision):
                spans += [Text(ids=request.ids[start:at]), Visual(image=image)]
                image, at, start = image + 1, at + 3, at + 3
            else:
                at += 1
        sample = Sample(id="", question="", answer="", images=request.images)
        return Prompt(
            sample=sample,
            spans=(*spans, Text(ids=request.ids[start:])),
            patches=tuple(map(self.policy.patches, request.images)),
        )


@dataclass(kw_only=True, eq=False)
class ScriptedBackend(Notes):
    """Replays ids, all with the same log-prob; a script is of one request after another."""

    script: list[Sequence[int]]
    logprob: float = -0.5
    change: Callable[[Completion], Completion] = lambda made: made
    """What goes wrong with what it says."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.calls.append("generate")
        self.rounds.append(list(requests))
        return [self.change(self._one(request)) for request in requests]

    def _one(self, request: Request) -> Completion:
        ids = tuple(self.script.pop(0))
        return Completion(ids=ids, logprobs=(self.logprob,) * len(ids), prompt_ids=request.expanded)


def changed(**changes: Any) -> Callable[[Completion], Completion]:
    return lambda made: dataclasses.replace(made, **changes)
