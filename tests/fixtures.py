"""Builders that several tests share: a tiny policy, images that can be told apart, prompts, and a
re-attention that follows a script."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from reflectvlm.batch import Batch, TokenScores
from reflectvlm.models.loading import load_image_processor, load_tokenizer
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.tiny import TinyFamily, pretrained_tiny, tiny_model
from reflectvlm.protocols import DecodeState
from reflectvlm.types import AttentionProbe, Insertion, Instruction, Prompt, Rollout, Sample, Spans, Visual

GAIN = 4.0
"""Factor on the random weight matrices. At 1 an attention pattern is nearly uniform and a position
that is off by one moves log-probs by less than 3e-4; at 4 it moves them by more than 1e-2."""


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer(str(pretrained_tiny()))


def make_policy(
    seed: int = 0,
    gain: float = GAIN,
    dtype: torch.dtype = torch.float32,
    family: TinyFamily = "qwen2_5_vl",
    **settings: Any,
) -> QwenVL:
    """A fresh random tiny policy with its weight matrices times `gain`.

    At this gain float32 rounding alone reaches 5e-5 between two ways of computing the same number;
    parity tests therefore run in float64, where what is left (1e-6) is the log-probs' own float32.
    """
    model = tiny_model(tokenizer(), seed, family).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(gain)
    processor = load_image_processor(str(pretrained_tiny()), None, None)
    return QwenVL(model=model.to(dtype), tokenizer=tokenizer(), image_processor=processor, **settings)


def uneven(policy: QwenVL, seed: int = 0) -> QwenVL:
    """Moves norms and biases, which begin as ones and zeros: a norm without its weights, or one in place of
    another, would change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(len(parameter), generator=generator).to(parameter.dtype)
    return policy


def favour(policy: QwenVL, tokens: Sequence[str], factor: float) -> QwenVL:
    """Enlarges the embeddings of some tokens in place, so that they are sampled often (or, where
    the hidden state points away from them, never)."""
    with torch.no_grad():
        policy.model.lm_head.weight[policy.tokenizer.convert_tokens_to_ids(list(tokens))] *= factor
    return policy


def noise_image(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """A page of coloured blocks; two seeds give two different pages."""
    rng = np.random.default_rng([seed, 5])
    blocks = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def make_sample(
    seed: int = 0,
    question: str = "What is the upper left digit?",
    sizes: Sequence[tuple[int, int]] = ((64, 64),),
) -> Sample:
    """A sample with one image for each (width, height)."""
    images = tuple(noise_image(100 * seed + i, *size) for i, size in enumerate(sizes))
    return Sample(id=f"sample-{seed}", question=question, answer="7", images=images)


def make_prompt(
    policy: QwenVL,
    seed: int = 0,
    question: str = "What is the upper left digit?",
    sizes: Sequence[tuple[int, int]] = ((64, 64),),
    instruction: str = "",
) -> Prompt:
    return policy.prompt(make_sample(seed, question, sizes), Instruction(text=instruction))


def score(policy: QwenVL, sequences: Sequence[tuple[Prompt, Spans]], temperature: float = 1.0) -> TokenScores:
    """What the trainer says about these sequences, without gradients."""
    return score_batch(policy, policy.batch(sequences), temperature)


def score_batch(policy: QwenVL, batch: Batch, temperature: float = 1.0) -> TokenScores:
    with torch.no_grad():
        return policy.score(batch, policy.features(batch.images), temperature)


def sequences_of(groups: Sequence[Sequence[Rollout]]) -> list[tuple[Prompt, Spans]]:
    return [(rollout.prompt, rollout.spans) for group in groups for rollout in group]


@dataclass(frozen=True)
class ShowAgain:
    """Satisfies `protocols.Reattention`: shows an image at its trigger, `at_most` times a row."""

    trigger: str | None
    image: int = 0
    keep: tuple[int, ...] | None = None
    at_most: int = 2
    place: str = "auto"
    probe: AttentionProbe | None = None

    def __call__(self, state: DecodeState, /) -> Insertion | None:
        if len(state.insertions) >= self.at_most or not state.prompt.patches:
            return None
        block = (Visual(image=self.image, keep=self.keep),)
        before = self.place == "before" or (self.place == "auto" and state.special)
        return Insertion(before=block) if before else Insertion(after=block)
