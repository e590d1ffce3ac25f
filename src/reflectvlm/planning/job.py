"""What is computed, as numbers: how a model trains, on how much, divided over how many processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from reflectvlm.planning.shapes import ModelShape
from reflectvlm.train.compute import Compute as Settings
from reflectvlm.train.compute import Kind

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["auto", "eager", "dense", "split", "varlen", "flex"]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How the run is spread over `world` processes, each with a GPU."""

    kind: Kind = "single"
    world: int = 1
    offload_optimizer: bool = False
    """Moments and master weights are in the host's memory."""
    offload_parameters: bool = False
    """So are the weights that are not in use (zero3 only)."""
    bucket: int = Settings.bucket
    """Numbers that are sent at one time."""
    live: int = 1_000_000_000
    """zero3: most parameters that are whole at one time in an update: DeepSpeed's own default."""

    def __post_init__(self) -> None:
        if self.world < 1:
            raise ValueError(f"gpus is {self.world}. It must be at least 1.")
        if self.kind == "single" and self.world > 1:
            raise ValueError(
                f"compute is single, and gpus is {self.world}. Use compute=ddp or one of zero1, zero2, zero3."
            )
        _ = self.settings  # which has its own rules

    @property
    def settings(self) -> Settings:
        """What a trainer is given."""
        return Settings(
            kind=self.kind,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            bucket=self.bucket,
        )

    @property
    def stage(self) -> int:
        """0 without ZeRO (arXiv 1910.02054)."""
        return self.settings.stage

    def shared(self, stage: int) -> int:
        """Among how many processes something is divided from this stage on."""
        return self.world if self.stage >= stage else 1


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """LoRA (arXiv 2106.09685) on all matrices of the language model's layers."""

    rank: int = 16
    bits: int | None = None
    """Of the frozen matrices below it (QLoRA, arXiv 2305.14314); None: not quantised."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"The adapter's rank is {self.rank}. It must be at least 1.")
        if self.bits not in (None, 4, 8):
            raise ValueError(f"The adapter's base has {self.bits} bits. Quantised ones have 4 or 8.")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the model trains and in which numbers."""

    weights: Dtype = "float32"
    products: Dtype | None = None
    """Of matrix products; None is that of the weights."""
    frozen: frozenset[str] = frozenset()
    """Of vision, projector, language."""
    rows_only: bool = False
    """Of embedding and head some rows train (`embeddings=new_tags`): held like the whole."""
    adapter: Adapter | None = None
    checkpointing: bool = False
    attention: Attention = "auto"
    chunk: int = 256
    moments: Literal[32, 8] = 32
    """Bits of an optimiser's moment; 32 stands for the weights' own dtype."""
    reference: bool = False
    """A copy for the KL term; with an adapter the model itself, its adapter switched off."""
    exact_kl: bool = False
    """The KL term compares whole distributions (`estimator: full`)."""
    gpu: bool = True
    bare: bool = False
    """Tensors alone, without what a process and its allocator take of a card."""

    @property
    def w(self) -> int:
        """Bytes of a weight."""
        return BYTES[self.weights]

    @property
    def c(self) -> int:
        """Bytes of what a product takes and gives."""
        return BYTES[self.products or self.weights]

    @property
    def casts(self) -> bool:
        """Weights are cast for the products."""
        return self.products is not None and BYTES[self.products] != self.w


@dataclass(frozen=True, kw_only=True)
class Load:
    """One step of one process. Lengths are those of every row: the longest for a safe plan."""

    kind: Literal["rl", "sft", "distill"] = "rl"
    prompt: int
    """Tokens, visual ones counted."""
    answer: int
    visual: int = 0
    """Visual tokens of a prompt."""
    inserted: int = 0
    """Tokens that re-attention puts into an answer."""
    group: int = 1
    prompts: int = 1
    """Prompts of a step, or rows of SFT."""
    updates: int = 1
    """Optimiser steps on them."""
    micro_tokens: int = 16_384
    max_rows: int = 64
    cuts: bool = False
    """top_p, top_k or min_p: the drawing sorts."""

    def __post_init__(self) -> None:
        for name in ("prompt", "answer", "group", "prompts", "updates", "micro_tokens", "max_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. It must be at least 1.")
        if not 0 <= self.visual <= self.prompt:
            raise ValueError(
                f"A prompt of {self.prompt} tokens cannot hold {self.visual} visual ones. Give visual= at "
                "most as much as prompt=, or lower policy.max_pixels."
            )

    @property
    def row(self) -> int:
        return self.prompt + self.behind

    @property
    def behind(self) -> int:
        """Tokens behind the prompt."""
        return self.answer + self.inserted

    @property
    def slots(self) -> int:
        """Rows that are decoded at one time: a group is never split."""
        return max(min(self.prompts * self.group, self.max_rows), self.group)


@dataclass(frozen=True, kw_only=True)
class Job:
    shape: ModelShape
    training: Training
    load: Load
    compute: Compute = field(default_factory=Compute)
