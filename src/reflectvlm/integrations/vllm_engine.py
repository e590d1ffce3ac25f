"""Rollouts by vLLM, in the trainer's own processes or by a server, behind the same `RolloutEngine`.

    colocate   vLLM shares the trainer's GPU and sleeps while the trainer works
    server     vLLM has GPUs of its own; weights go there over NCCL

Implicit re-attention is plain sampling. COPY stops at the trigger, appends the image, and goes on as a new
request, whose prefix vLLM still has in its cache (`vllm_rounds.py`). ROUTE needs attention weights, which
vLLM does not give, and is refused. Weights and processes are TRL's `VLLMGeneration` (`vllm_backends.py`).

vLLM's kernels are not the trainer's, so its log-probs differ a little. The trainer computes its own for the
ratio, and weights each token by how far the two are apart (`ClippedSurrogate.importance_cap`).

Left out: partial rollouts, groups handed out one by one, tensor parallelism when colocated, and answers
token by token (`stream`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from reflectvlm.integrations.vllm_backends import check_installed, make_backend
from reflectvlm.integrations.vllm_requests import Backend
from reflectvlm.integrations.vllm_rounds import Rounds, Row
from reflectvlm.interrupt import safe_point
from reflectvlm.models.feature_cache import vision_of
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.rollout.triggers import Triggers
from reflectvlm.rollout.watch import TextWatch
from reflectvlm.types import Prompt, Rollout, SamplingParams

Mode = Literal["colocate", "server"]


@dataclass(kw_only=True, eq=False)
class Held:
    """Which of the policy's weights vLLM has, by optimiser steps."""

    wanted: int | None = None
    """None: nobody tells."""
    version: int | None = None
    """None: none, or nobody knows."""

    @property
    def stale(self) -> bool:
        return self.wanted is None or self.version != self.wanted


@dataclass(frozen=True, kw_only=True, eq=False)
class VLLMEngine:
    """Satisfies `protocols.RolloutEngine`. Has run against doubles of vLLM only: see docs/vllm.md.

    Example, in a recipe: `engine: {_target_: reflectvlm.integrations.vllm_engine.VLLMEngine, _partial_: true,
    mode: colocate, gpu_memory_utilization: 0.4, max_model_len: 8192}`
    """

    policy: QwenVL
    mode: Mode = "colocate"
    max_rows: int = 64
    """Rows decoded at one time."""
    max_model_len: int | None = None
    """Longest row, prompt and blocks counted; None: what the model was made for. vLLM must have room in its
    cache for one such row. With a server: the server's own value."""
    gpu_memory_utilization: float = 0.4
    """colocate: share of the GPU's memory for vLLM's weights and cache."""
    sleep: bool = True
    """colocate: give that memory back between calls. Weights are then sent again before the next."""
    url: str = "http://localhost:8000"
    """server: where it listens."""
    group_port: int = 51216
    """server: over which weights are sent."""
    timeout: float = 240.0
    """server: seconds to wait until it is up."""
    backend: Backend | None = None
    """A vLLM that exists already; None makes one as `mode` says."""
    _held: Held = field(default_factory=Held, init=False, repr=False)
    _watches: dict[tuple[str, ...], TextWatch] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"engine.mode is {self.mode!r}. It must be 'colocate' or 'server'.")
        if self.max_rows < 1:
            raise ValueError(f"engine.max_rows is {self.max_rows}. It must be at least 1.")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(
                f"engine.max_model_len is {self.max_model_len}. It must be at least 1, or null for the "
                "model's own."
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"engine.gpu_memory_utilization is {self.gpu_memory_utilization}. It is a share of the GPU's "
                "memory: above 0 and at most 1."
            )
        if self.backend is None:
            check_installed()

    @property
    def foreign_logprobs(self) -> bool:
        """vLLM's arithmetic is not the trainer's."""
        return True

    def sync(self, version: int) -> None:
        """The next rollouts are to be sampled from the policy's weights after `version` optimiser steps. The
        weights are sent then. If nobody calls it, they are sent before every call of `generate`."""
        self._held.wanted = version

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
        if n < 1:
            raise ValueError(f"generate was asked for n={n} rollouts per prompt. Ask for at least 1.")
        _check_reattention(reattention)
        _check_sampling(sampling)
        rounds = Rounds(
            policy=self.policy,
            sampling=sampling,
            triggers=Triggers.create(self.policy, reattention, self._watch),
            stop_watch=self._watch(tuple(sampling.stop)),
            context=self._context,
            seed=seed,
        )
        rows = [
            Row(prompt=prompt, place=place, member=member)
            for place, prompt in zip(places or range(len(prompts)), prompts, strict=True)
            for member in range(n)
        ]
        backend = self._awake()
        try:
            while asked := rounds.requests(rows):
                safe_point()
                completions = backend.generate([request for _, request in asked])
                for (row, request), completion in zip(asked, completions, strict=True):
                    rounds.take(row, request, completion)
        finally:
            if backend.sleep():
                self._held.version = None
        made = [row.rollout(self.policy) for row in rows]
        return [tuple(made[start : start + n]) for start in range(0, len(made), n)]

    def _awake(self) -> Backend:
        """The backend with the weights that are wanted, ready to generate. Also where there is nothing to
        generate: with several processes all of them send their weights together."""
        backend, held = self._backend, self._held
        stale = held.stale
        if stale:
            backend.load_weights()
        backend.wake()
        if stale:
            trains = any(one.requires_grad for one in vision_of(self.policy.model).parameters())
            backend.reset_caches(encoder=trains)
            held.version = held.wanted
        return backend

    @functools.cached_property
    def _backend(self) -> Backend:
        if self.backend is not None:
            return self.backend
        return make_backend(
            self.policy,
            mode=self.mode,
            max_rows=self.max_rows,
            max_model_len=self.max_model_len,
            gpu_memory_utilization=self.gpu_memory_utilization,
            sleep=self.sleep,
            url=self.url,
            group_port=self.group_port,
            timeout=self.timeout,
        )

    @property
    def _context(self) -> int:
        most = int(self.policy.model.config.get_text_config().max_position_embeddings)
        return most if self.max_model_len is None else min(most, self.max_model_len)

    def _watch(self, texts: tuple[str, ...]) -> TextWatch:
        if texts not in self._watches:
            config = self.policy.model.config.get_text_config()
            vocabulary = int(config.vocab_size) if texts else 1
            device = torch.device("cpu")
            self._watches[texts] = TextWatch.create(texts, self.policy.decode, vocabulary, device)
        return self._watches[texts]


def _check_reattention(reattention: Reattention) -> None:
    if reattention.probe is not None:
        raise ValueError(
            f"{type(reattention).__name__} asks what the answer attends to, which vLLM does not tell. Take "
            "engine=InProcessEngine (reflectvlm.rollout.engine), or reattention=VisualCopy."
        )


def _check_sampling(sampling: SamplingParams) -> None:
    """vLLM states log-probs after it has cut the distribution; ours are those before (`SamplingParams`)."""
    cuts = {"top_p": (sampling.top_p, 1.0), "top_k": (sampling.top_k, 0), "min_p": (sampling.min_p, 0.0)}
    used = [f"{name}={value}" for name, (value, none) in cuts.items() if value != none]
    if used and sampling.temperature > 0:
        raise ValueError(
            f"sampling.{', sampling.'.join(used)}: vLLM tells log-probs of the cut distribution only, and "
            "training needs those of the whole one. Set top_p=1, top_k=0, min_p=0, or take "
            "engine=InProcessEngine (reflectvlm.rollout.engine)."
        )
