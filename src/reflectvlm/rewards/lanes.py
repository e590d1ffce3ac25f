"""Calls that wait for something, side by side in threads; their values come by place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any


def side_by_side(
    calls: Sequence[Callable[[], Any]], threads: int, stop: Callable[[], None] | None = None
) -> list[Any]:
    """What each call gives; call number i runs in thread i modulo `threads`, so that every run of the same
    calls hands them out in the same way. One thread is the caller's own.

    An exception is raised here once all calls have ended: the first one by place. If the caller itself is
    interrupted (Ctrl-C), no further call begins, `stop` is called to end those that wait, and the threads
    are left behind: they are daemons and hold up nothing.
    """
    count = min(threads, len(calls))
    if count <= 1:
        return [call() for call in calls]
    values: list[Any] = [None] * len(calls)
    errors: dict[int, BaseException] = {}
    interrupted = threading.Event()

    def run(lane: int) -> None:
        for place in range(lane, len(calls), count):
            if interrupted.is_set():
                return
            # Boundary: an exception must reach the caller's thread, whatever it is.
            try:
                values[place] = calls[place]()
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
            thread.join()
    except BaseException:
        interrupted.set()
        if stop is not None:
            stop()
        raise
    if errors:
        raise errors[min(errors)]
    return values
