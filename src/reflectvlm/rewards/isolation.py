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
- One that died between two calls, or has grown too big, is replaced without a call being lost.

Left out: a sandbox. A user's function has the user's rights. POSIX only.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reflectvlm.rewards import pipes
from reflectvlm.rewards.pipes import RewardError

__all__ = ["Code", "Parameters", "RewardError", "Worker", "pickled"]

_SCRIPT = Path(__file__).with_name("worker.py")
_MAX_GROWTH_BYTES = 1 << 30


class Parameters(NamedTuple):
    """Keyword arguments a function takes; `any` if it has `**kwargs`."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    any: bool


class Code(NamedTuple):
    """A function that was given as an object, ready to travel; made by `pickled`."""

    label: str
    body: bytes
    digest: str


def pickled(function: Callable[..., Any], label: str) -> Code:
    """The function as it is now, with what it refers to. Raises whatever its pickling raises.

    Made with cloudpickle, which takes functions of a notebook or of the main script by value, as the
    standard pickle cannot, and reads no more than the globals they use; those of an importable module
    travel by name and are imported in the process.
    """
    import cloudpickle  # type: ignore[import-untyped]

    body = cloudpickle.dumps(function)
    return Code(label, body, hashlib.sha256(body).hexdigest())


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
        """After so many calls a fresh process takes over: it bounds what a function leaks. So it does
        once the process has grown by 1 GiB since its first call."""
        self.starts = 0
        """Processes started so far."""
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None
        self._calls = 0
        self._sent: set[str] = set()
        self._memory: int | None = None
        self._printed = pipes.Printed()
        self._owner = os.getpid()
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def call(self, target: str | Code, arguments: Mapping[str, Any], timeout: float) -> Any:
        """`target(**arguments)` with plain data, or a `RewardError` after at most `timeout` seconds.

        `target` is `path/to/file.py:function`, `package.module:function`,
        `package.module.function` or `pickled(function)`. Arguments travel by pickle; the value must be
        JSON-like (numbers, strings, lists, None), arrays become lists.
        """
        try:
            body = pickle.dumps(dict(arguments))
        except Exception as error:  # noqa: BLE001 - any object may refuse to be pickled, in any way
            return RewardError("error", f"the arguments for {_shown(target)} cannot be pickled: {error!r}")
        return self._request(target, body, timeout)[1]

    def parameters(self, target: str | Code) -> Parameters | RewardError:
        """What `target` takes, found in the worker: the module is never imported here."""
        described, value = self._request(target, None, self.load_timeout)
        if isinstance(value, RewardError):
            return value
        return Parameters(tuple(described["required"]), tuple(described["optional"]), described["any"])

    def close(self) -> None:
        """Ends the process and waits for it. A later call starts a fresh one."""
        with self._lock:
            self._stop()

    def abort(self) -> None:
        """Ends a call that another thread waits for: it gets a `RewardError` at once."""
        process = self._process
        if process is not None and self._owner == os.getpid():
            pipes.end_group(process)

    def _request(self, target: str | Code, body: bytes | None, timeout: float) -> tuple[dict[str, Any], Any]:
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

    def _exchange(self, target: str | Code, body: bytes | None, timeout: float) -> tuple[dict[str, Any], Any]:
        process, described = self._loaded(target, body, timeout)
        what = _shown(target)
        reply = pipes.receive(process, self._printed, time.monotonic() + timeout, what, timeout)
        self._watch_growth(reply)
        if "error" in reply:
            raise RewardError("error", reply["error"], reply["traceback"])
        return described, reply["value"]

    def _loaded(
        self, target: str | Code, body: bytes | None, timeout: float
    ) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
        """Asks, and waits until the function is loaded. What died since its last call, as when a reward
        left a time bomb or closed our pipes, is no fault of this call: it gets a fresh process, once."""
        used = self._process is not None
        try:
            return self._asked(target, body, timeout)
        except RewardError as error:
            if error.kind != "crash" or not used:
                raise
        self._stop()
        return self._asked(target, body, timeout)

    def _asked(
        self, target: str | Code, body: bytes | None, timeout: float
    ) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
        process = self._running()
        self._calls += 1
        deadline = time.monotonic() + self.load_timeout
        name, code = (target, b"") if isinstance(target, str) else (f"pickled {target.digest}", target.body)
        head = {"target": name, "call": body is not None, "load": self.load_timeout, "seconds": timeout}
        for message in (json.dumps(head).encode(), b"" if name in self._sent else code, body or b""):
            pipes.send(process, self._printed, message, deadline)
        described = pipes.receive(
            process, self._printed, deadline, f"loading {_shown(target)}", self.load_timeout
        )
        if "error" in described:
            raise RewardError("load", described["error"], described["traceback"])
        self._sent.add(name)
        return process, described

    def _watch_growth(self, reply: Mapping[str, Any]) -> None:
        memory = int(reply.get("memory", 0))
        self._memory = memory if self._memory is None else self._memory
        if memory - self._memory > _MAX_GROWTH_BYTES:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and not pipes.dead(self._process):
            return self._process
        self._stop()
        mark = uuid.uuid4().hex
        process = subprocess.Popen(
            # -P: the folder of worker.py must not shadow modules by the names of its neighbours.
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, pipes.MARK: mark},
            start_new_session=True,
        )
        self._process, self._calls, self._memory = process, 0, None
        self._sent = set()
        self._end = weakref.finalize(self, pipes.kill, process, os.getpid(), mark)
        self.starts += 1
        assert process.stdin is not None
        assert process.stderr is not None
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stderr.fileno(), False)
        start = {"sys_path": sys.path, "memory_gib": self.memory_gib}
        pipes.send(process, self._printed, json.dumps(start).encode(), time.monotonic() + self.load_timeout)
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


def _shown(target: str | Code) -> str:
    return target if isinstance(target, str) else target.label
