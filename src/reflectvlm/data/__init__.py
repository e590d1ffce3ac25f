"""Where rows come from: built-in tasks, a user's files, instructions. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reflectvlm.data.curriculum import Curriculum
    from reflectvlm.data.digit_traces import DigitTraces
    from reflectvlm.data.digits import Digits
    from reflectvlm.data.fetch import ImageLimits
    from reflectvlm.data.filtered import Dataset
    from reflectvlm.data.instructions import instruction
    from reflectvlm.data.rows import Columns
    from reflectvlm.data.shapes import Shapes
    from reflectvlm.data.sources import dataset

_HOME = {
    "Columns": "reflectvlm.data.rows",
    "Curriculum": "reflectvlm.data.curriculum",
    "Dataset": "reflectvlm.data.filtered",
    "DigitTraces": "reflectvlm.data.digit_traces",
    "Digits": "reflectvlm.data.digits",
    "ImageLimits": "reflectvlm.data.fetch",
    "Shapes": "reflectvlm.data.shapes",
    "dataset": "reflectvlm.data.sources",
    "instruction": "reflectvlm.data.instructions",
}

__all__ = [
    "Columns",
    "Curriculum",
    "Dataset",
    "DigitTraces",
    "Digits",
    "ImageLimits",
    "Shapes",
    "dataset",
    "instruction",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
