"""Trainers, and the run around their steps. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reflectvlm.train.distill import Distiller
    from reflectvlm.train.evaluate import Evaluation
    from reflectvlm.train.optim import AdamW
    from reflectvlm.train.pending import PartialRollouts
    from reflectvlm.train.rl import DynamicSampling, RLTrainer
    from reflectvlm.train.run import Output, RunResult
    from reflectvlm.train.sft import SFTTrainer

_HOME = {
    "AdamW": "reflectvlm.train.optim",
    "Distiller": "reflectvlm.train.distill",
    "DynamicSampling": "reflectvlm.train.rl",
    "Evaluation": "reflectvlm.train.evaluate",
    "Output": "reflectvlm.train.run",
    "PartialRollouts": "reflectvlm.train.pending",
    "RLTrainer": "reflectvlm.train.rl",
    "RunResult": "reflectvlm.train.run",
    "SFTTrainer": "reflectvlm.train.sft",
}

__all__ = [
    "AdamW",
    "Distiller",
    "DynamicSampling",
    "Evaluation",
    "Output",
    "PartialRollouts",
    "RLTrainer",
    "RunResult",
    "SFTTrainer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
