"""Calls that wait for something, side by side in threads; their values come by place.

They may wait for minutes, and a stop has seconds. So the caller waits in short slices and asks at each
whether the work may be given up (`interrupt.py`). If it is, or on Ctrl-C, the threads are left behind, and
whatever waits in them, in threads of their own too, ends by itself at its next `still_wanted`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from reflectvlm.interrupt import Abandoned, safe_point

SLICE_SECONDS = 0.1
"""Longest time between two looks whether the work is still wanted."""
LEAVING_SECONDS = 1.0
"""Longest time that lanes left behind are waited for; they are daemons and hold up nothing."""


class _Thread(threading.local):
    left: tuple[threading.Event, ...] = ()
    """Set when the callers of this lane, and theirs, have left; empty in a thread that is no lane."""


_thread = _Thread()


def side_by_side(
    calls: Sequence[Callable[[], Any]],
    threads: int,
    stop: Callable[[], None] | None = None,
    *,
    apart: bool = False,
) -> list[Any]:
    """What each call gives; call number i runs in thread i modulo `threads`, so that every run of the same
    calls hands them out in the same way. One thread is the caller's own, unless `apart`: then even a
    single call that never looks up can be left.

    An exception is raised here once all calls have ended: the first one by place. If the caller itself is
    interrupted (Ctrl-C, `Abandoned`), no further call begins, `stop` is called to end those that wait, and
    the threads are left behind: they are daemons and hold up nothing.
    """
    count = min(threads, len(calls))
    if count == 0 or (count == 1 and not apart):
        return [_wanted(call) for call in calls]
    values: list[Any] = [None] * len(calls)
    errors: dict[int, BaseException] = {}
    interrupted = threading.Event()
    left = (*_thread.left, interrupted)

    def run(lane: int) -> None:
        _thread.left = left
        for place in range(lane, len(calls), count):
            # Boundary: an exception must reach the caller's thread, whatever it is.
            try:
                values[place] = _wanted(calls[place])
            except BaseException as error:  # noqa: BLE001
                errors[place] = error

    lanes = [
        threading.Thread(target=run, args=(lane,), name=f"reward-{lane}", daemon=True)
        for lane in range(count)
    ]
    try:
        for thread in lanes:
            thread.start()
        for thread in lanes:
            while thread.is_alive():
                thread.join(SLICE_SECONDS)
                still_wanted()
    except BaseException:
        interrupted.set()
        if stop is not None:
            stop()
        # A lane that is about to notice must not end what the next calls begin.
        until = time.monotonic() + 3 * SLICE_SECONDS
        for thread in lanes:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))
        raise
    if errors:
        raise errors[min(errors)]
    return values


class Ahead(NamedTuple):
    """A call that may be made now, while there is more to come; see `early.py`."""

    call: Callable[[], Any]
    key: Hashable = None
    """Calls with the same key give the same: it is called once. None: it is like no other."""
    stop: Callable[[], None] | None = None
    """Ends what waits in such calls, if nobody waits for them any more."""


class Lanes:
    """Threads for calls that come one by one, each in a lane of the caller's choice after those that came
    before it. A lane begins when it is first needed.

    Example: `number = lanes.put(0, call)`, then `lanes.wait()`, then `lanes.done[number]`.
    """

    def __init__(self, count: int) -> None:
        self.done: dict[int, Any] = {}
        """What each call gave, by its number."""
        self.count = count
        self._given = 0
        self._left = threading.Event()
        self._above = (*_thread.left, self._left)
        self._lines: dict[int, queue.SimpleQueue[tuple[int, Callable[[], Any]] | None]] = {}
        self._threads: list[threading.Thread] = []
        self._errors: dict[int, BaseException] = {}
        self._stops: list[Callable[[], None]] = []

    def put(self, lane: int, call: Callable[[], Any], stop: Callable[[], None] | None = None) -> int:
        """The call's number. `stop` ends what waits in such calls: it is called when they are left behind."""
        if stop is not None and stop not in self._stops:
            self._stops.append(stop)
        lane %= self.count
        if lane not in self._lines:
            self._lines[lane] = queue.SimpleQueue()
            thread = threading.Thread(target=self._run, args=(lane,), name=f"reward-{lane}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._lines[lane].put((self._given, call))
        self._given += 1
        return self._given - 1

    def wait(self) -> None:
        """Until all calls have ended; raises the exception of the first that has one. Who waits no longer,
        on Ctrl-C or `Abandoned`, calls `leave`."""
        self._close()
        for thread in self._threads:
            while thread.is_alive():
                thread.join(SLICE_SECONDS)
                still_wanted()
        if self._errors:
            raise self._errors[min(self._errors)]

    def leave(self) -> None:
        """No further call begins, and those that wait are ended; after `wait` there is nothing to do."""
        self._left.set()
        self._close()
        if any(thread.is_alive() for thread in self._threads):
            for stop in self._stops:
                stop()
        until = time.monotonic() + LEAVING_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _close(self) -> None:
        for line in self._lines.values():
            line.put(None)

    def _run(self, lane: int) -> None:
        _thread.left = self._above
        while (given := self._lines[lane].get()) is not None:
            number, call = given
            # Boundary: an exception must reach the waiting thread, whatever it is.
            try:
                self.done[number] = _wanted(call)
            except BaseException as error:  # noqa: BLE001
                self._errors[number] = error


def still_wanted() -> None:
    """Raises `Abandoned` if nobody waits for what this thread does: in a lane if its caller has left,
    elsewhere if the work may be given up and a stop was asked for."""
    if any(event.is_set() for event in _thread.left):
        raise Abandoned
    if not _thread.left:
        safe_point()


def pause(seconds: float) -> None:
    """Sleeps so long, but no longer than it is wanted."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        still_wanted()
        time.sleep(min(left, SLICE_SECONDS))


def _wanted(call: Callable[[], Any]) -> Any:
    still_wanted()
    return call()
