"""Comparisons that only a worker can make, for many replies at once, and what becomes of those given up."""

from __future__ import annotations

from collections.abc import Sequence

from reflectvlm.rewards.isolation import RewardError
from reflectvlm.rewards.maths import Equal, settle


def settled(questions: Sequence[bool | Equal], timeout: float) -> list[tuple[bool, str]]:
    """For each: equal or not, and a note where the worker gave up, which official scripts count as wrong.

    Raises the `RewardError` where the comparison itself could not be loaded: that is nobody's wrong answer.
    """
    asked = [one for one in questions if isinstance(one, Equal)]
    found = iter(settle(asked, timeout) if asked else ())
    return [_told(next(found)) if isinstance(one, Equal) else (one, "") for one in questions]


def _told(value: bool | RewardError) -> tuple[bool, str]:
    if not isinstance(value, RewardError):
        return value, ""
    if value.kind == "load":
        raise value
    return False, f"the comparison was given up ({value.kind})"
