"""One line now and then about calls that are under way."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from reflectvlm.curate.call_counts import Outcome
from reflectvlm.curate.teachers.reasons import reason_of
from reflectvlm.train.console import duration

log = logging.getLogger("reflectvlm")


@dataclass(eq=False)
class Progress:
    """Says `120 of 1,000 requests (40 known before), 3.2 a second, 0:04:35 to go, 54,321 + 12,345 tokens`."""

    total: int
    every: float = 10.0
    """Seconds between two lines."""
    clock: Callable[[], float] = time.monotonic
    _done: int = field(default=0, init=False)
    _asked: int = field(default=0, init=False)
    _tokens: list[int] = field(default_factory=lambda: [0, 0], init=False)
    _errors: Counter[str] = field(default_factory=Counter, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _told_of: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._start = self._told = self.clock()

    def add(self, outcomes: Sequence[Outcome]) -> None:
        with self._lock:
            for one in outcomes:
                self._done += 1
                self._asked += one.new
                self._tokens[0] += one.said.prompt_tokens if one.new else 0
                self._tokens[1] += one.said.tokens if one.new else 0
                if one.said.text is None:
                    self._errors[reason_of(one.said)] += 1
            if self.clock() - self._told >= self.every:
                self._tell()

    def end(self) -> None:
        """Says the last state, if an earlier one was said."""
        with self._lock:
            if self._told_of not in (0, self._done):
                self._tell()

    def _tell(self) -> None:
        self._told, self._told_of = self.clock(), self._done
        seconds = max(self._told - self._start, 1e-9)
        left = self.total - self._done
        # Known ones take no time, so what is left is reckoned by those that were asked.
        to_go = duration(seconds / self._asked * left) if self._asked else "?"
        log.info(
            "%s of %s requests (%s known before), %.3g a second, %s to go, %s + %s tokens%s",
            f"{self._done:,}",
            f"{self.total:,}",
            f"{self._done - self._asked:,}",
            self._asked / seconds,
            to_go,
            *(f"{count:,}" for count in self._tokens),
            "".join(f", {name} {count:,}" for name, count in sorted(self._errors.items())),
        )
