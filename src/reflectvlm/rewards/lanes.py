"""Calls that wait for something, side by side in threads; their values come by place.

They may wait for minutes, and a stop has seconds. So the caller waits in short slices and asks at each
whether the work may be given up (`interrupt.py`). If it is, or on Ctrl-C, the threads are left behind, and
whatever waits in them, in threads of their own too, ends by itself at its next `still_wanted`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from reflectvlm.interrupt import Abandoned, safe_point

SLICE_SECONDS = 0.1
"""Longest time between two looks whether the work is still wanted."""


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
        raise
    if errors:
        raise errors[min(errors)]
    return values


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
