"""SIGTERM and Ctrl-C as a wish: finish the step, save, then stop.

Left out: other signals (SIGHUP keeps its meaning) and agreement between ranks, which the runtime
reaches by gathering `requested`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any


@dataclass
class StopRequest:
    """Within the `with` block the first SIGTERM or SIGINT only sets `requested`; a second one stops
    at once. Outside of the main thread, where Python allows no handlers, it does nothing.

    Example:
        with StopRequest() as stop:
            for step in range(steps):
                train(step)
                if stop.requested:
                    save(step)
                    sys.exit(stop.exit_code)
    """

    signal_name: str | None = field(default=None, init=False)
    """`"SIGTERM"` or `"SIGINT"` once one arrived."""
    exit_code: int = field(default=0, init=False)
    """128 + the signal's number, as shells report it: 143 or 130; 0 before."""
    _previous: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
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
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.signal_name = signal.Signals(number).name
        self.exit_code = 128 + number
        # Not `print` or `logging`: the signal may have come in the middle of one of them.
        with contextlib.suppress(OSError):
            note = (
                f"\n{self.signal_name}: finishing this step, then saving and stopping. Again: stop at once.\n"
            )
            os.write(2, note.encode())
