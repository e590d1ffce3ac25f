"""Engines that turn prompts into rollouts. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reflectvlm.rollout.engine import InProcessEngine
    from reflectvlm.rollout.long_tail import StopGroup

_HOME = {
    "InProcessEngine": "reflectvlm.rollout.engine",
    "StopGroup": "reflectvlm.rollout.long_tail",
}

__all__ = [
    "InProcessEngine",
    "StopGroup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
