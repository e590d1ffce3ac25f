"""How fast a server may be asked: requests and tokens per minute, and pauses that it asks for.

Each limit is a bucket that leaks: what a request costs is poured in, what the limit allows runs out with
time, and the next request begins when the level is down to what one second allows. So requests come evenly
instead of a minute's worth at once. Tokens are guessed before and put right after. Left out: limits that
several processes share.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from reflectvlm.rewards.lanes import pause

BURST_SECONDS = 1.0
"""What may come at once after a rest, as the limit's worth of so long."""
_NEXT_TO_NOTHING = 1e-6
"""Seconds: what rounding leaves, which no clock may ever see pass."""


@dataclass
class Bucket:
    """Example: `Bucket(per_minute=60).wait(now)` is how long the next request has to wait at `now`."""

    per_minute: float
    _level: float = field(default=0.0, init=False)
    _at: float = field(default=0.0, init=False)

    def wait(self, now: float) -> float:
        """Seconds, from 0 on."""
        self._leak(now)
        over = self._level - max(0.0, self.per_minute / 60 * BURST_SECONDS - 1)
        seconds = over * 60 / self.per_minute
        return seconds if seconds > _NEXT_TO_NOTHING else 0.0

    def pour(self, cost: float, now: float) -> None:
        """A negative cost takes out again what was poured in too much."""
        self._leak(now)
        self._level = max(0.0, self._level + cost)

    def _leak(self, now: float) -> None:
        self._level = max(0.0, self._level - max(0.0, now - self._at) * self.per_minute / 60)
        self._at = max(self._at, now)


class Pace:
    """Who wants to ask calls `begin`, waits there, and says afterwards by `end` what it took.

    Example: `pace = Pace(requests_per_minute=60); pace.begin(500); …; pace.end(500, 380)`
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = pause,
    ) -> None:
        self._requests = None if requests_per_minute is None else Bucket(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else Bucket(tokens_per_minute)
        self._clock, self._sleep = clock, sleep
        self._held_until = 0.0
        self._lock = threading.Lock()

    def begin(self, tokens: float) -> None:
        """Until one more request, of about so many tokens, may be sent."""
        while True:
            with self._lock:
                now = self._clock()
                waits = [max(0.0, self._held_until - now)]
                waits += [bucket.wait(now) for bucket in (self._requests, self._tokens) if bucket is not None]
                if not any(waits):
                    if self._requests is not None:
                        self._requests.pour(1, now)
                    if self._tokens is not None:
                        self._tokens.pour(tokens, now)
                    return
            self._sleep(max(waits))

    def end(self, guessed: float, tokens: float) -> None:
        """It took so many tokens, and not as many as guessed."""
        if self._tokens is not None:
            with self._lock:
                self._tokens.pour(tokens - guessed, self._clock())

    def hold(self, seconds: float) -> None:
        """The server asked for a pause: nobody asks it for so long."""
        with self._lock:
            self._held_until = max(self._held_until, self._clock() + seconds)
