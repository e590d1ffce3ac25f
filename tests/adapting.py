"""Tiny policies with adapters, fresh and as if trained for a while."""

from __future__ import annotations

from typing import Any

import torch

from fixtures import make_policy
from reflectvlm.models.freezing import trained_rows
from reflectvlm.models.lora import LoRA, choose_what_trains
from reflectvlm.models.qwen_vl import QwenVL, load_policy

TAGS = ("<REFLECTION>", "</REFLECTION>")
ALL = {"language": "all", "vision": "all", "projector": "all"}
FIRST = 2318
"""The id of the first new tag."""
IDS = (100, 140)
"""Tokens of `test_lora.rows`."""


def lora_tiny(lora: LoRA | None = None, tags: tuple[str, ...] = (), **settings: Any) -> QwenVL:
    """The tiny base with fresh adapters."""
    return load_policy("tiny", lora=lora or LoRA(rank=4), new_tags=tags, **settings)


def random_lora(lora: LoRA | None = None, ids: tuple[int, ...] = (), **settings: Any) -> QwenVL:
    """Random weights so large that small errors show, in float64, with adapters and rows as if trained."""
    policy = make_policy(dtype=torch.float64, **settings)
    choose_what_trains(policy.model, ids, lora=lora or LoRA(rank=4))
    return disturb(policy)


def disturb(policy: QwenVL, scale: float = 0.1, seed: int = 0) -> QwenVL:
    """Moves all that trains, in place: adapters, lengths of DoRA, rows of new tags."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in policy.module.named_parameters():
            if not parameter.requires_grad:
                continue
            rows = trained_rows(parameter)
            place = slice(None) if rows is None else list(rows)
            noise = torch.randn(parameter[place].shape, generator=generator).to(parameter.dtype)
            parameter[place] += scale * noise
    return policy


def adapters_of(policy: QwenVL) -> dict[str, torch.Tensor]:
    return {name: p for name, p in policy.module.named_parameters() if "lora_" in name}


def bits(policy: QwenVL) -> dict[str, torch.Tensor]:
    """A copy of everything that the policy is."""
    return {name: tensor.clone() for name, tensor in policy.module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
