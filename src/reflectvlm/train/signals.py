"""Signals and a time limit as a wish to stop: give up or finish the step, save, then exit.

| asked by | exit code |
|---|---|
| SIGHUP (a closed terminal; not under nohup, which ignores it) | 129 |
| SIGINT (Ctrl-C) | 130 |
| SIGTERM (a preempted job) | 143 |
| `max_minutes` | 75, EX_TEMPFAIL: try again |

A second signal stops at once, without saving; a third does not even clean up. Several processes stop
together, for the reason of whichever was asked (`agreed`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

from reflectvlm.train.ranks import Ranks

OUT_OF_TIME = 75
"""Exit code of a run that `max_minutes` stopped."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_begun: list[float] = []
"""When this command began, if it is one: several runs of it share one limit."""


@contextlib.contextmanager
def one_command(clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Within the block every run counts its minutes from the block's start, and not from its own."""
    _begun[:] = [clock()]
    try:
        yield
    finally:
        _begun.clear()


@dataclass
class StopRequest:
    """Within the `with` block the first signal only sets `requested`. Outside of the main thread, where
    Python allows no handlers, only the time limit works.

    Example:
        with StopRequest() as stop:
            for step in range(steps):
                train(step)
                if stop.requested:
                    save(step)
                    sys.exit(stop.exit_code)
    """

    max_minutes: float | None = None
    """Counted from the start of the command, or of the block; None is no limit."""
    clock: Callable[[], float] = time.monotonic
    reserve: float = 0.0
    """Seconds before the limit at which to stop: what saving takes."""
    reason: str | None = field(default=None, init=False)
    """`"SIGTERM"`, `"SIGINT"`, `"SIGHUP"` or `"max_minutes=30"` once one of them asked."""
    exit_code: int = field(default=0, init=False)
    """128 + the signal's number, as shells report it, or OUT_OF_TIME; 0 before."""
    _previous: dict[int, Any] = field(default_factory=dict, init=False, repr=False)
    _start: float = field(default=0.0, init=False, repr=False)
    _seen: int = field(default=0, init=False, repr=False)

    @property
    def requested(self) -> bool:
        if self.reason is None and self.seconds_left() <= 0:
            self.reason, self.exit_code = f"max_minutes={self.max_minutes:g}", OUT_OF_TIME
        return self.reason is not None

    def seconds_left(self) -> float:
        """Until the moment at which saving must begin; infinite without a limit."""
        if self.max_minutes is None:
            return float("inf")
        return self._start + 60 * self.max_minutes - self.reserve - self.clock()

    def __enter__(self) -> StopRequest:
        self._start = _begun[0] if _begun else self.clock()
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a job in the background
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the handler had been installed outside of Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._seen += 1
        if self._seen > 2:
            os._exit(128 + number)
        if self._seen > 1:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.reason = signal.Signals(number).name
        self.exit_code = 128 + number
        # Not `print` or `logging`: the signal may have come in the middle of one of them.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.reason}: stopping and saving. Again: stop at once, unsaved.\n".encode())


def agreed(ranks: Ranks, stop: StopRequest) -> bool:
    """Whether some process was asked to stop; then all know why, and give the same reason."""
    told = ranks.gather((stop.reason, stop.exit_code) if stop.requested else None)
    asked = [one for one in told if one is not None]
    if asked:
        stop.reason, stop.exit_code = asked[0]
    return bool(asked)
