"""Messages to and from a worker process, with deadlines, and the end of one with all it started.

A message is 8 bytes of length and a body; what stands in them is said in `worker`. What a reward prints
comes through a pipe of its own, which is read while we wait: it can neither fill up nor flood the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from reflectvlm.rewards.lanes import still_wanted

MARK = "REFLECTVLM_WORKER"
"""Environment variable by which everything that a worker started is found again."""
_POLL_MS = 200
_MAX_REPLY_BYTES = 1 << 26
_MAX_PRINTED_BYTES = 1 << 16

Kind = Literal["timeout", "crash", "error", "load", "unscored"]


class RewardError(Exception):
    """Why a call gave no value. Returned by `Worker.call`, raised by rewards."""

    def __init__(self, kind: Kind, reason: str, details: str = "") -> None:
        super().__init__(kind, reason, details)
        self.kind = kind
        """timeout, crash (the process died), error (an exception), load (could not be imported), unscored
        (a judge gave no verdict)."""
        self.reason = reason
        self.details = details
        """The traceback inside the worker, if there is one."""

    def __str__(self) -> str:
        return self.reason


class Printed:
    """Passes what a reward prints on to stderr, the first 64 KiB of it; the rest is read and dropped."""

    def __init__(self) -> None:
        self._left = _MAX_PRINTED_BYTES

    def drain(self, fd: int) -> bool:
        """Reads what is there. False once nobody can write any more."""
        try:
            piece = os.read(fd, _MAX_PRINTED_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if self._left > 0 and piece:
            self._left -= len(piece)
            self._show(piece.decode(errors="replace"))
            if self._left <= 0:
                self._show("\n[reflectvlm: what this reward prints from here on is dropped]\n")
        return bool(piece)

    def _show(self, text: str) -> None:
        # Our own stderr may be closed, missing (None) or a full pipe: printing is not worth a step.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)


def send(process: subprocess.Popen[bytes], printed: Printed, body: bytes, deadline: float) -> None:
    assert process.stdin is not None
    fd = process.stdin.fileno()
    data = memoryview(struct.pack("!Q", len(body)) + body)
    while data:
        _wait(process, printed, fd, select.POLLOUT, deadline, "a worker that reads nothing", 0.0)
        try:
            data = data[os.write(fd, data[: 1 << 16]) :]
        except BlockingIOError:
            continue
        except BrokenPipeError:
            raise _crash(process) from None


def receive(
    process: subprocess.Popen[bytes], printed: Printed, deadline: float, what: str, seconds: float
) -> dict[str, Any]:
    """The next JSON message, or a `RewardError` at the deadline or the process's end."""
    assert process.stdout is not None
    fd = process.stdout.fileno()

    def read(count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            _wait(process, printed, fd, select.POLLIN, deadline, what, seconds)
            piece = os.read(fd, min(count - len(data), 1 << 20))
            if not piece:
                raise _crash(process)
            data += piece
        return bytes(data)

    length = struct.unpack("!Q", read(8))[0]
    if length > _MAX_REPLY_BYTES:
        raise RewardError("crash", f"the reward's process sent {length:,} bytes, which is no reply")
    try:
        reply = json.loads(read(length))
    except (ValueError, RecursionError) as error:
        raise RewardError("crash", f"the reward's process sent something that is no reply: {error}") from None
    if not isinstance(reply, dict):
        raise RewardError("crash", "the reward's process sent something that is no reply")
    return reply


def dead(process: subprocess.Popen[bytes]) -> bool:
    """Has it ended? Does not reap it: its id must stay taken until `kill` has used it."""
    if process.returncode is not None:
        return True
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def kill(process: subprocess.Popen[bytes], owner: int, mark: str) -> None:
    """Ends a worker with everything it started, and waits for it."""
    if owner != os.getpid():
        return
    end_group(process)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    process.wait()
    _kill_marked(mark)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and those it started, without waiting for them."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _kill_marked(mark: str) -> None:
    """What left the worker's process group, by `setsid`, still has the worker's mark (Linux only)."""
    wanted = f"{MARK}={mark}".encode()
    for _ in range(5):  # a child may fork while we look
        found = [pid for pid in _processes() if wanted in _environment(pid)]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _processes() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []  # somebody else's, or gone


def _wait(
    process: subprocess.Popen[bytes],
    printed: Printed,
    fd: int,
    event: int,
    deadline: float,
    what: str,
    seconds: float,
) -> None:
    """Until `fd` is ready. Looks at the process too: a grandchild may keep its pipe open."""
    assert process.stderr is not None
    prints = process.stderr.fileno()
    poll = select.poll()
    poll.register(fd, event)
    poll.register(prints, select.POLLIN)
    while True:
        still_wanted()
        left = deadline - time.monotonic()
        ready = [at for at, _ in poll.poll(max(0.0, min(left * 1000, _POLL_MS)))]
        if prints in ready and not printed.drain(prints):
            poll.unregister(prints)
        if fd in ready:
            return
        if left <= 0:
            raise RewardError(
                "timeout", f"TimeoutError: {what} gave no answer in {seconds:g} s and was killed"
            )
        if not ready and dead(process):
            raise _crash(process)


def _crash(process: subprocess.Popen[bytes]) -> RewardError:
    patience = time.monotonic() + 1.0
    while not dead(process) and time.monotonic() < patience:
        time.sleep(0.005)
    if not dead(process):
        return RewardError("crash", "the reward's process closed its pipe")
    status = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if status is None or status.si_code == os.CLD_EXITED:
        how = f"exit status {status.si_status if status else process.returncode}"
    else:
        how = f"signal {_signal_name(status.si_status)}"
    return RewardError("crash", f"the reward's process died with {how}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)  # a real-time signal
