"""What a check at the start says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

Status: TypeAlias = Literal["ok", "warning", "failed", "not applicable"]


class Result(NamedTuple):
    """Example: `Result("weights", "ok", "1,774,336 numbers in 115 tensors are finite")`"""

    name: str
    status: Status
    found: str
    """One line, with the numbers."""
    remedy: str = ""
    """What to do; empty where nothing is wrong."""


class CheckFailed(RuntimeError):
    """A check at the start has failed; nothing has been trained."""

    def __init__(self, failed: Sequence[Result]) -> None:
        self.failed = tuple(failed)
        found = " ".join(f"{one.name}: {_ended(one.found)} {_ended(one.remedy)}".strip() for one in failed)
        number = "A check" if len(self.failed) == 1 else f"{len(self.failed)} checks"
        super().__init__(f"{number} at the start failed. {found} output.checks=false trains all the same.")


def _ended(text: str) -> str:
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."
