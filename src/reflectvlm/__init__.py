"""reflectvlm: RL and SFT that teach a vision-language model to look at its image again.

`types.py` is the page to read first. Names are imported on first use, so that `import reflectvlm`
itself loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reflectvlm.advantages import GroupMean, LeaveOneOut
    from reflectvlm.config import load_recipe
    from reflectvlm.data.digit_traces import DigitTraces
    from reflectvlm.data.digits import Digits
    from reflectvlm.data.instructions import instruction
    from reflectvlm.data.shapes import shapes
    from reflectvlm.data.sources import dataset
    from reflectvlm.generator import Generator
    from reflectvlm.models.qwen_vl import load_policy
    from reflectvlm.objectives import KL, ClippedSurrogate
    from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
    from reflectvlm.rewards.accuracy import Accuracy
    from reflectvlm.rewards.back import look_back_rubric
    from reflectvlm.rewards.custom import Custom
    from reflectvlm.rewards.layout import TagFormat
    from reflectvlm.rewards.lift import per_rollout
    from reflectvlm.rewards.reflection import brpo_rubric
    from reflectvlm.rewards.rubric import Rubric
    from reflectvlm.rollout.engine import InProcessEngine
    from reflectvlm.tags import look_back, qwen_la
    from reflectvlm.train.distill import Distiller
    from reflectvlm.train.evaluate import Evaluation
    from reflectvlm.train.optim import AdamW
    from reflectvlm.train.rl import RLTrainer
    from reflectvlm.train.run import Output
    from reflectvlm.train.sft import SFTTrainer
    from reflectvlm.types import (
        Insertion,
        Instruction,
        Prompt,
        Rollout,
        Sample,
        SamplingParams,
        ScoredGroup,
        Text,
        Visual,
    )

__version__ = "0.1.0"

_HOME = {
    "Accuracy": "reflectvlm.rewards.accuracy",
    "AdamW": "reflectvlm.train.optim",
    "ClippedSurrogate": "reflectvlm.objectives",
    "Custom": "reflectvlm.rewards.custom",
    "DigitTraces": "reflectvlm.data.digit_traces",
    "Digits": "reflectvlm.data.digits",
    "Distiller": "reflectvlm.train.distill",
    "Evaluation": "reflectvlm.train.evaluate",
    "Generator": "reflectvlm.generator",
    "GroupMean": "reflectvlm.advantages",
    "Implicit": "reflectvlm.reattention",
    "InProcessEngine": "reflectvlm.rollout.engine",
    "Insertion": "reflectvlm.types",
    "Instruction": "reflectvlm.types",
    "KL": "reflectvlm.objectives",
    "LeaveOneOut": "reflectvlm.advantages",
    "Output": "reflectvlm.train.run",
    "Prompt": "reflectvlm.types",
    "RLTrainer": "reflectvlm.train.rl",
    "Rollout": "reflectvlm.types",
    "Rubric": "reflectvlm.rewards.rubric",
    "SFTTrainer": "reflectvlm.train.sft",
    "Sample": "reflectvlm.types",
    "SamplingParams": "reflectvlm.types",
    "ScoredGroup": "reflectvlm.types",
    "TagFormat": "reflectvlm.rewards.layout",
    "Text": "reflectvlm.types",
    "Visual": "reflectvlm.types",
    "VisualCopy": "reflectvlm.reattention",
    "VisualRoute": "reflectvlm.reattention",
    "brpo_rubric": "reflectvlm.rewards.reflection",
    "dataset": "reflectvlm.data.sources",
    "instruction": "reflectvlm.data.instructions",
    "load_policy": "reflectvlm.models.qwen_vl",
    "load_recipe": "reflectvlm.config",
    "look_back": "reflectvlm.tags",
    "look_back_rubric": "reflectvlm.rewards.back",
    "per_rollout": "reflectvlm.rewards.lift",
    "qwen_la": "reflectvlm.tags",
    "shapes": "reflectvlm.data.shapes",
}

__all__ = [
    "KL",
    "Accuracy",
    "AdamW",
    "ClippedSurrogate",
    "Custom",
    "DigitTraces",
    "Digits",
    "Distiller",
    "Evaluation",
    "Generator",
    "GroupMean",
    "Implicit",
    "InProcessEngine",
    "Insertion",
    "Instruction",
    "LeaveOneOut",
    "Output",
    "Prompt",
    "RLTrainer",
    "Rollout",
    "Rubric",
    "SFTTrainer",
    "Sample",
    "SamplingParams",
    "ScoredGroup",
    "TagFormat",
    "Text",
    "Visual",
    "VisualCopy",
    "VisualRoute",
    "__version__",
    "brpo_rubric",
    "dataset",
    "instruction",
    "load_policy",
    "load_recipe",
    "look_back",
    "look_back_rubric",
    "per_rollout",
    "qwen_la",
    "shapes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
