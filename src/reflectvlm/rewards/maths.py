"""Questions that only sympy can settle, asked in killable processes, several at once, each once.

Nothing here parses anything: `grading.py`, which does, is run by the workers and never imported.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from reflectvlm.rewards.isolation import RewardError
from reflectvlm.rewards.pool import WorkerPool, shared_pool

_GRADING = Path(__file__).with_name("grading.py")
_MEMORY_GIB = 4.0
_REMEMBERED = 8192


class Equal(NamedTuple):
    """Is this answer equal to the gold answer, by this function of `grading.py`?"""

    function: Literal["math_equal", "lookback_equal", "exchanged_equal", "mathvision_equal"]
    gold: str
    answer: str


def settle(questions: Sequence[Equal], timeout: float, *, first: int = 0) -> list[bool | RewardError]:
    """A decision for each, in their order; a `RewardError` where the process was killed or died.

    Decisions are remembered, failures are not. `timeout` is for one question, `first` as in `WorkerPool.map`.
    """
    new = [question for question in dict.fromkeys(questions) if _known(question) is None]
    found: dict[Equal, bool | RewardError] = {}
    for name in sorted({question.function for question in new}):
        asked = [question for question in new if question.function == name]
        # Three steps may each use up the soft limit; the hard one must come after them.
        soft = max(1, int(timeout / 4))
        calls = [{"gold": one.gold, "answer": one.answer, "seconds": soft} for one in asked]
        values = math_pool().map(f"{_GRADING}:{name}", calls, timeout, first=first)
        found |= {
            one: value if isinstance(value, RewardError) else bool(value)
            for one, value in zip(asked, values, strict=True)
        }
    for question, value in found.items():
        if not isinstance(value, RewardError):
            _remember(question, value)
    return [found[one] if one in found else bool(_known(one)) for one in questions]


def settle_one(question: Equal, timeout: float) -> bool:
    """The same for one; raises the `RewardError`."""
    (value,) = settle([question], timeout)
    if isinstance(value, RewardError):
        raise value
    return value


def math_pool() -> WorkerPool:
    return shared_pool(str(_GRADING), memory_gib=_MEMORY_GIB)


_decisions: OrderedDict[Equal, bool] = OrderedDict()
_lock = threading.Lock()


def _known(question: Equal) -> bool | None:
    with _lock:
        return _decisions.get(question)


def _remember(question: Equal, value: bool) -> None:
    with _lock:
        _decisions[question] = value
        while len(_decisions) > _REMEMBERED:
            _decisions.popitem(last=False)
