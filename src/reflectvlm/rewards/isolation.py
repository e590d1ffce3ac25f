"""Runs functions that cannot be trusted to return in a process that can be killed.

math-verify and reward functions of users may hang inside C code, where neither a signal handler
nor a thread can stop them; they may crash, call `sys.exit`, print or leak memory. `Worker.call`
always comes back within its time-outs, with the value or with a `RewardError` that says why not.

- The process is a fresh interpreter that runs `worker.py`. It is not `multiprocessing`'s spawn,
  because that runs the user's main script again in the child and would import torch with it.
- It starts at the first call, is killed together with its own children after a time-out, and is
  replaced at the next call. It is always waited for, so there are no zombies.
- It ends when the parent ends, even by `kill -9`: the pipe closes, the parent's id changes, and a
  hanging call is cut short by a timer in C.

Left out: a sandbox. A user's function has the user's rights. POSIX only.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

_SCRIPT = Path(__file__).with_name("worker.py")
_POLL_MS = 200

Kind = Literal["timeout", "crash", "error", "load"]


class RewardError(Exception):
    """Why a call gave no value. Returned by `Worker.call`, raised by rewards."""

    def __init__(self, kind: Kind, reason: str, details: str = "") -> None:
        super().__init__(kind, reason, details)
        self.kind = kind
        """timeout, crash (the process died), error (an exception), load (could not be imported)."""
        self.reason = reason
        self.details = details
        """The traceback inside the worker, if there is one."""

    def __str__(self) -> str:
        return self.reason


class Parameters(NamedTuple):
    """Keyword arguments a function takes; `any` if it has `**kwargs`."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    any: bool


class Worker:
    """One process that calls functions by name, one at a time; safe to share between threads.

    Example: `Worker().call("json:loads", {"s": "3"}, timeout=5.0)` is 3.
    """

    def __init__(
        self,
        *,
        load_timeout: float = 60.0,
        memory_gib: float | None = None,
        max_calls: int = 10_000,
    ) -> None:
        self.load_timeout = load_timeout
        """Seconds for starting and for importing the function; slow imports are no fault of a call."""
        self.memory_gib = memory_gib
        """Address space the process may use; None is unlimited."""
        self.max_calls = max_calls
        """After so many calls a fresh process takes over: it bounds what a function leaks."""
        self.starts = 0
        """Processes started so far."""
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None
        self._calls = 0
        self._owner = os.getpid()
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def call(self, target: str, arguments: Mapping[str, Any], timeout: float) -> Any:
        """`target(**arguments)` with plain data, or a `RewardError` after at most `timeout` seconds.

        `target` is `path/to/file.py:function`, `package.module:function` or
        `package.module.function`. Arguments travel by pickle; the value must be JSON-like
        (numbers, strings, lists, None), arrays become lists.
        """
        try:
            body = pickle.dumps(dict(arguments))
        except Exception as error:  # noqa: BLE001 - any object may refuse to be pickled, in any way
            return RewardError("error", f"the arguments for {target} cannot be pickled: {error!r}")
        return self._request(target, body, timeout)[1]

    def parameters(self, target: str) -> Parameters | RewardError:
        """What `target` takes, found in the worker: the module is never imported here."""
        described, value = self._request(target, None, self.load_timeout)
        if isinstance(value, RewardError):
            return value
        return Parameters(tuple(described["required"]), tuple(described["optional"]), described["any"])

    def close(self) -> None:
        """Ends the process and waits for it. A later call starts a fresh one."""
        with self._lock:
            self._stop()

    def _request(self, target: str, body: bytes | None, timeout: float) -> tuple[dict[str, Any], Any]:
        with self._lock:
            if self._owner != os.getpid():
                self._forget()
            if self._calls >= self.max_calls:
                self._stop()
            try:
                return self._exchange(target, body, timeout)
            except RewardError as error:
                if error.kind in ("timeout", "crash"):
                    self._stop()
                return {}, error
            except BaseException:
                # An interrupt between request and reply would leave the reply to the next caller.
                self._stop()
                raise

    def _exchange(self, target: str, body: bytes | None, timeout: float) -> tuple[dict[str, Any], Any]:
        process = self._running()
        self._calls += 1
        deadline = time.monotonic() + self.load_timeout
        head = {"target": target, "call": body is not None, "load": self.load_timeout, "seconds": timeout}
        _send(process, json.dumps(head).encode(), deadline)
        _send(process, body or b"", deadline)
        described = _receive(process, deadline, f"loading {target}", self.load_timeout)
        if "error" in described:
            raise RewardError("load", described["error"], described["traceback"])
        reply = _receive(process, time.monotonic() + timeout, target, timeout)
        if "error" in reply:
            raise RewardError("error", reply["error"], reply["traceback"])
        return described, reply["value"]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and not _dead(self._process):
            return self._process
        self._stop()
        process = subprocess.Popen(
            # -P: the folder of worker.py must not shadow modules by the names of its neighbours.
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._process, self._calls = process, 0
        self._end = weakref.finalize(self, _kill, process, os.getpid())
        self.starts += 1
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        start = {"sys_path": sys.path, "memory_gib": self.memory_gib}
        _send(process, json.dumps(start).encode(), time.monotonic() + self.load_timeout)
        return process

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _forget(self) -> None:
        """In a forked child: the process is the parent's, so leave it alone and start our own."""
        if self._end is not None:
            self._end.detach()
        self._process = self._end = None
        self._owner = os.getpid()


_shared: dict[tuple[int, str], Worker] = {}
_shared_lock = threading.Lock()


def shared_worker(name: str, memory_gib: float | None = None) -> Worker:
    """The worker of this name in this process, made at the first use."""
    with _shared_lock:
        return _shared.setdefault((os.getpid(), name), Worker(memory_gib=memory_gib))


def _dead(process: subprocess.Popen[bytes]) -> bool:
    """Has it ended? Does not reap it: its id must stay taken until `_kill` has used it."""
    if process.returncode is not None:
        return True
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _kill(process: subprocess.Popen[bytes], owner: int) -> None:
    """Ends a worker with everything it started, and waits for it."""
    if owner != os.getpid():
        return
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


def _send(process: subprocess.Popen[bytes], body: bytes, deadline: float) -> None:
    assert process.stdin is not None
    fd = process.stdin.fileno()
    data = memoryview(struct.pack("!Q", len(body)) + body)
    while data:
        _wait(process, fd, select.POLLOUT, deadline, "a worker that reads nothing", 0.0)
        try:
            data = data[os.write(fd, data[: 1 << 16]) :]
        except BlockingIOError:
            continue
        except BrokenPipeError:
            raise _crash(process) from None


def _receive(process: subprocess.Popen[bytes], deadline: float, what: str, seconds: float) -> dict[str, Any]:
    assert process.stdout is not None
    fd = process.stdout.fileno()

    def read(count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            _wait(process, fd, select.POLLIN, deadline, what, seconds)
            piece = os.read(fd, min(count - len(data), 1 << 20))
            if not piece:
                raise _crash(process)
            data += piece
        return bytes(data)

    try:
        reply = json.loads(read(struct.unpack("!Q", read(8))[0]))
    except ValueError as error:
        raise RewardError("crash", f"the reward's process sent something that is no reply: {error}") from None
    assert isinstance(reply, dict)
    return reply


def _wait(
    process: subprocess.Popen[bytes], fd: int, event: int, deadline: float, what: str, seconds: float
) -> None:
    """Until `fd` is ready. Looks at the process too: a grandchild may keep its pipe open."""
    poll = select.poll()
    poll.register(fd, event)
    while True:
        left = deadline - time.monotonic()
        if poll.poll(max(0.0, min(left * 1000, _POLL_MS))):
            return
        if left <= 0:
            raise RewardError(
                "timeout", f"TimeoutError: {what} gave no answer in {seconds:g} s and was killed"
            )
        if _dead(process):
            raise _crash(process)


def _crash(process: subprocess.Popen[bytes]) -> RewardError:
    patience = time.monotonic() + 1.0
    while not _dead(process) and time.monotonic() < patience:
        time.sleep(0.005)
    if not _dead(process):
        return RewardError("crash", "the reward's process closed its pipe")
    _kill(process, os.getpid())
    code = process.returncode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return RewardError("crash", f"the reward's process died with {how}")
