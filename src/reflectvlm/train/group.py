"""The processes of a run on one machine: started, watched, and ended together (`launch.py`).

One that dies ends the others: they find the connection closed and end by themselves, or are told to, or are
killed, within `GRACE` seconds and half of that again. One that has not got on for REFLECTVLM_TIMEOUT minutes
and does not wait for others hangs, and ends them as well. Of several that have failed the one is named that
did so by itself. A signal to the launcher is one to all processes, which stop and save together.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from reflectvlm import pulse
from reflectvlm.pulse import LOST, TOLD
from reflectvlm.train.printing import put_error

if TYPE_CHECKING:
    from reflectvlm.train.launch import Launch

GRACE = 20.0
"""Seconds in which the others may end by themselves once one has failed; a quarter of it each after SIGTERM
and SIGKILL."""
_LOOK = 0.1
"""Seconds between two looks."""
_SHOWN = "warning: rank"
"""Lines of other ranks that are shown as they come."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STOPPED = {75, *(128 + number for number in _SIGNALS)}
"""Exit codes of a run that was stopped (`signals.py`)."""


@dataclass(kw_only=True, eq=False)
class _Rank:
    """One process and what it has said."""

    number: int
    process: subprocess.Popen[str]
    pulse: Path
    said: deque[str] = field(default_factory=lambda: deque(maxlen=40))
    """Its last lines on stderr; the first rank has the terminal and keeps none."""
    listener: threading.Thread | None = None

    def ended(self) -> int | None:
        return self.process.poll()

    def last_said(self) -> list[str]:
        """Its last three lines that have not been shown."""
        self._heard_out()
        return [line for line in self.said if line.strip() and not line.startswith(_SHOWN)][-3:]

    def close(self) -> None:
        """Also when the launcher ends with an error."""
        if self.ended() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._heard_out()

    def _heard_out(self) -> None:
        if self.listener is not None:
            self.listener.join(timeout=1)  # what it started may hold the stream open

    def told(self) -> str:
        """How it ended, or that it hangs, and in what."""
        state = pulse.read(self.pulse)
        code = self.ended()
        if code is None:
            silence = pulse.clock() - state.at
            return f"rank {self.number} hangs: in phase {state.phase!r} it has not got on for {silence:.0f} s"
        if code == LOST:
            return f"rank {self.number} lost the others in its phase {state.phase!r}"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"rank {self.number} {how} in its phase {state.phase!r}"


class Group:
    """All processes of this machine."""

    def __init__(self, launch: Launch, command: Sequence[str], folder: Path) -> None:
        self.launch, self.command, self.folder = launch, list(command), folder
        self.port = launch.main_port or _free_port()
        self.ranks: list[_Rank] = []
        self.asked: int | None = None
        """The signal that this process was sent."""
        self.held: list[int] | None = None
        """Signals that came while a process was started, which could be told to the others only."""
        self.patience = 60 * pulse.patience_minutes()

    def run(self) -> int:
        try:
            with self._passed_on():
                for local in range(self.launch.processes):
                    if self.asked is None:
                        self.held = []
                        self.ranks.append(self._start(local))
                        came, self.held = self.held, None
                        for number in came:
                            self._pass_on(number)
                failed = self._watch()
                return self._end(failed) if failed is not None else self._stop_code() or 0
        finally:
            for rank in self.ranks:
                rank.close()

    def _start(self, local: int) -> _Rank:
        number = self.launch.node_rank * self.launch.processes + local
        at = self.folder / f"pulse-{number}"
        pulse.create(at)
        process = subprocess.Popen(
            [sys.executable, "-m", "reflectvlm", *self.command],
            env={**os.environ, **self._environment(number, local), pulse.VARIABLE: str(at)},
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends
            stdout=None if number == 0 else subprocess.DEVNULL,
            stderr=None if number == 0 else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C comes once, from here
        )
        rank = _Rank(number=number, process=process, pulse=at)
        if process.stderr is not None:
            rank.listener = threading.Thread(target=_listen, args=(process.stderr, rank), daemon=True)
            rank.listener.start()
        return rank

    def _environment(self, number: int, local: int) -> Mapping[str, str]:
        launch = self.launch
        threads = max(1, len(os.sched_getaffinity(0)) // launch.processes)
        made = {
            "RANK": str(number),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(launch.processes * launch.nodes),
            "LOCAL_WORLD_SIZE": str(launch.processes),
            "MASTER_ADDR": launch.main_address,
            "MASTER_PORT": str(self.port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        }
        return made if launch.on_gpu else made | {"REFLECTVLM_CPU": "1"}

    def _watch(self) -> _Rank | None:
        """Waits until all have ended well, or returns the one that has not."""
        while True:
            codes = [rank.ended() for rank in self.ranks]
            if all(code == 0 for code in codes):
                return None
            if any(code is not None and code != 0 for code in codes):
                return self._first_failed()
            if (hanging := self._hanging()) is not None:
                return hanging
            time.sleep(_LOOK)

    def _first_failed(self) -> _Rank:
        """Of those that have failed, the one that did so first of all; the others may only have lost it."""
        time.sleep(2 * _LOOK)  # a death and what it does to others are seen in any order
        return min((rank for rank in self.ranks if rank.ended() not in (None, 0)), key=_by_itself)

    def _hanging(self) -> _Rank | None:
        """One that has not got on for too long and does not wait for others."""
        states = [(rank, pulse.read(rank.pulse)) for rank in self.ranks if rank.ended() is None]
        late = pulse.clock() - self.patience
        silent = [(state.at, rank) for rank, state in states if not state.waits and state.at < late]
        return min(silent, key=lambda one: one[0])[1] if silent else None

    def _end(self, failed: _Rank) -> int:
        """Ends the others, tells what happened, and returns the exit code of all."""
        if failed.ended() is not None:
            # Of a run that was stopped and saved the first process may still wait for its trackers.
            self._wait(self.patience if failed.ended() in _STOPPED else GRACE)
            failed = self._missed(failed)
        told, hangs = failed.told(), failed.ended() is None
        if hangs:
            failed.process.kill()
            failed.process.wait()
        codes = {rank.ended() for rank in self.ranks}
        self._finish_off()
        if (stopped := self._stop_code()) is not None:
            return stopped
        code = failed.process.returncode
        # Where an error of one has reached all, the first rank has told it.
        if hangs or code < 0 or not codes <= {code, TOLD}:
            patience = f" ({pulse.TIMEOUT}={self.patience / 60:g} minutes)" if hangs else ""
            put_error(
                f"error: {told}{patience}; all are ended. resume=auto goes on from the last checkpoint.\n"
            )
            if failed.number and code != -signal.SIGKILL:  # which leaves no time for last words
                put_error("".join(f"rank {failed.number}: {line}" for line in failed.last_said()))
        return code if code > 0 else 1

    def _missed(self, failed: _Rank) -> _Rank:
        """Where one has waited for another in vain: that other, if it is here and has long been silent."""
        if failed.ended() != LOST:
            return failed
        late = pulse.clock() - self.patience / 2
        alive = [(pulse.read(rank.pulse).at, rank) for rank in self.ranks if rank.ended() is None]
        silent = [one for one in alive if one[0] < late]
        return min(silent, key=lambda one: one[0])[1] if silent else failed

    def _stop_code(self) -> int | None:
        """The exit code if all ended because this process was told to, as those of a stopped run are."""
        if self.asked is None:
            return None
        ours = {128 + self.asked, -self.asked, 0}
        codes = [rank.process.returncode for rank in self.ranks]
        if not all(code in ours or code == LOST for code in codes):
            return None
        if 128 + self.asked not in codes:  # before one of them could catch it
            put_error(f"error: stopped by {signal.Signals(self.asked).name} before the run had begun\n")
        return 128 + self.asked

    def _finish_off(self) -> None:
        for last in (signal.SIGTERM, signal.SIGKILL):
            for rank in self.ranks:
                if rank.ended() is None:
                    rank.process.send_signal(last)
            self._wait(GRACE / 4)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(rank.ended() is None for rank in self.ranks):
            time.sleep(_LOOK)

    def _pass_on(self, number: int) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    @contextlib.contextmanager
    def _passed_on(self) -> Iterator[None]:
        """Within the block signals to this process go to all of its processes, and end them, not it."""

        def handle(number: int, _frame: FrameType | None) -> None:
            self.asked = self.asked or number
            if self.held is None:
                self._pass_on(number)
            else:
                self.held.append(number)

        before: dict[signal.Signals, Any] = {}
        for asked in _SIGNALS:
            if signal.getsignal(asked) is not signal.SIG_IGN:  # nohup, a job in the background
                before[asked] = signal.signal(asked, handle)
        try:
            yield
        finally:
            for asked, handler in before.items():
                signal.signal(asked, signal.SIG_DFL if handler is None else handler)


def _by_itself(rank: _Rank) -> tuple[int, float]:
    """A smaller one for what is rather a cause than a consequence: killed, failed, told by another of its
    failure, left alone; and of those the one that got on least."""
    code = rank.process.returncode
    kind = 0 if code < 0 else 3 if code == LOST else 2 if code == TOLD else 1
    return kind, pulse.read(rank.pulse).at


def _listen(stream: IO[str], rank: _Rank) -> None:
    with stream:
        for line in stream:
            rank.said.append(line)
            if line.startswith(_SHOWN):
                put_error(line)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
