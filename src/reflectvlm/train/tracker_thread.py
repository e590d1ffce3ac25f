"""Calls that may stall, such as those of a tracker behind a network, in a thread of their own.

In order, at most so many of them waiting, and never waited for until the end. Left out: calls that return
something.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

WAITING = 256
"""Calls that may wait; of a run's trackers one or two come with every step."""


class Lane:
    """Example: `Lane("wandb").put(lambda: run.log(values))` comes back at once."""

    def __init__(self, name: str, waiting: int = WAITING) -> None:
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(waiting)
        # A daemon: a call that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], None]) -> bool:
        """False, and the call is lost, if too many wait already. The call must raise nothing."""
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            return False
        return True

    def close(self, last: Callable[[], None], seconds: float) -> bool:
        """All calls and then `last`; False if they are not done after so many seconds."""
        until = time.monotonic() + seconds
        try:
            for one in (last, None):
                self._calls.put(one, timeout=max(0.0, until - time.monotonic()))
        except queue.Full:
            return False
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
