"""What TRL's trainer adds to a call of a reward function. Imports nothing, since a worker imports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrlCall:
    """`function` with the arguments that only TRL's trainer gives; see `integrations.trl.from_trl`."""

    function: Callable[..., Any]
    answer_column: str

    def __call__(self, *, images: Sequence[Any], answers: Sequence[str], **columns: Any) -> Any:
        from_trainer = {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
        given = columns | {self.answer_column: answers, "images": images} | from_trainer
        return self.function(**given)


def _ignore(*_: object, **__: object) -> None:
    return None
