"""Policies, one per model family, and how they are loaded. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reflectvlm.models.feature_cache import FeatureCache
    from reflectvlm.models.lora import LoRA
    from reflectvlm.models.qwen_vl import QwenVL, load_policy

_HOME = {
    "FeatureCache": "reflectvlm.models.feature_cache",
    "LoRA": "reflectvlm.models.lora",
    "QwenVL": "reflectvlm.models.qwen_vl",
    "load_policy": "reflectvlm.models.qwen_vl",
}

__all__ = [
    "FeatureCache",
    "LoRA",
    "QwenVL",
    "load_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
