"""Rewards: one small file each, and the rubric that adds them up.

Names are imported on first use, because the isolated worker and `tags`-only users need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reflectvlm.rewards.accuracy import Accuracy
    from reflectvlm.rewards.back import BackReward, look_back_rubric
    from reflectvlm.rewards.custom import Custom
    from reflectvlm.rewards.isolation import RewardError, Worker
    from reflectvlm.rewards.judge_http import HttpJudge
    from reflectvlm.rewards.judged import Judged
    from reflectvlm.rewards.judges import RecordedJudge, RuleJudge
    from reflectvlm.rewards.layout import TagFormat
    from reflectvlm.rewards.length import LengthPenalty, SoftOverlong
    from reflectvlm.rewards.lift import per_rollout
    from reflectvlm.rewards.pool import WorkerPool
    from reflectvlm.rewards.reflection import ReflectionBalance, brpo_rubric
    from reflectvlm.rewards.rubric import RewardFailure, Rubric
    from reflectvlm.rewards.verdict import Verdict

_HOME = {
    "Accuracy": "accuracy",
    "BackReward": "back",
    "Custom": "custom",
    "HttpJudge": "judge_http",
    "Judged": "judged",
    "LengthPenalty": "length",
    "RecordedJudge": "judges",
    "ReflectionBalance": "reflection",
    "RewardError": "isolation",
    "RewardFailure": "rubric",
    "Rubric": "rubric",
    "RuleJudge": "judges",
    "SoftOverlong": "length",
    "TagFormat": "layout",
    "Verdict": "verdict",
    "Worker": "isolation",
    "WorkerPool": "pool",
    "brpo_rubric": "reflection",
    "look_back_rubric": "back",
    "per_rollout": "lift",
}

__all__ = [
    "Accuracy",
    "BackReward",
    "Custom",
    "HttpJudge",
    "Judged",
    "LengthPenalty",
    "RecordedJudge",
    "ReflectionBalance",
    "RewardError",
    "RewardFailure",
    "Rubric",
    "RuleJudge",
    "SoftOverlong",
    "TagFormat",
    "Verdict",
    "Worker",
    "WorkerPool",
    "brpo_rubric",
    "look_back_rubric",
    "per_rollout",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
