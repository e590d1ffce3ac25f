"""Fuzzing: programs of bytes, batches of them with seeds of their own, and the layouts that texts are held
against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from reflectvlm.tags import Block, Layout, grpo, look_back, qwen_la

SECONDS = 0.5
"""Most processor time of one example; they have at most a few thousand characters."""
PROGRAMS = st.one_of(st.binary(max_size=12), st.binary(min_size=12, max_size=120))
Target = Callable[[bytes, Path], None]

LAYOUTS = (
    look_back(),
    grpo(),
    qwen_la(),
    Layout(name="free", blocks=(Block("think"),), boxed=True, free_text=True),
    Layout(
        name="many",
        blocks=(Block("a", min=0, max=None), Block("b", min=1, max=2, allow_empty=True), Block("a", min=0)),
        floating=(Block("c", min=0, max=3),),
    ),
)


@dataclass
class Dice:
    """Decisions read from bytes; 0 after their end, so that every program ends."""

    data: bytes
    place: int = 0

    def below(self, limit: int) -> int:
        self.place += 1
        return self.data[self.place - 1] % limit if self.place <= len(self.data) else 0

    def one(self, of: Any) -> Any:
        return of[self.below(len(of))]

    def text(self, tokens: tuple[Any, ...], most: int = 200) -> Any:
        """The rest of the program, or as much of it as `most`, one token a byte."""
        rest = self.data[self.place : self.place + most]
        self.place += len(rest)
        return tokens[0][:0].join(tokens[byte % len(tokens)] for byte in rest)


@dataclass
class Count:
    examples: int = 0
    slowest: float = 0.0


def fuzz(target: Target, root: Path, batch: int, examples: int, count: Count) -> None:
    """One batch with its own seed; a failing example is made small and printed with that seed."""

    @seed(batch)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(PROGRAMS)
    def one(program: bytes) -> None:
        took = _timed(target, program, root)
        if took >= SECONDS:  # once more: the collector of garbage may have come by
            took = _timed(target, program, root)
        assert took < SECONDS, f"{took:.2f} s for {program!r}"
        count.examples += 1
        count.slowest = max(count.slowest, took)

    one()


def _timed(target: Target, program: bytes, root: Path) -> float:
    started = time.thread_time()
    target(program, root)
    return time.thread_time() - started
