"""Stopping on a signal: the step is finished, the exit code is the shell's."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from reflectvlm.train.signals import StopRequest


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    """No test may leave its own handler behind in the test process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    after = {number: signal.getsignal(number) for number in before}
    assert after == before


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "SIGINT", 130)]
)
def test_first_signal_only_asks(number: int, name: str, code: int) -> None:
    """Prevents a signal from tearing a step apart, or being forgotten: 143 = 128 + 15, 130 = 128 + 2."""
    with StopRequest() as stop:
        assert (stop.requested, stop.signal_name, stop.exit_code) == (False, None, 0)
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.signal_name, stop.exit_code) == (True, name, code)


def test_second_signal_stops_at_once() -> None:
    """Prevents a hung step from making a run unstoppable short of SIGKILL."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit) as exit_:
            os.kill(os.getpid(), signal.SIGTERM)
        assert exit_.value.code == 143
        assert stop.signal_name == "SIGTERM"


def test_handlers_come_back_after_an_error() -> None:
    """Prevents a failed run in a notebook from swallowing every later Ctrl-C (see the fixture)."""
    with pytest.raises(RuntimeError, match="inside"), StopRequest():
        raise RuntimeError("inside")


def test_other_threads_are_left_alone() -> None:
    """Prevents "signal only works in main thread" when a notebook trains in a thread."""
    seen: list[bool] = []

    def train() -> None:
        with StopRequest() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [False]
