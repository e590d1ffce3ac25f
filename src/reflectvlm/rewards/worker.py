"""The program inside an isolated worker process: reads a request, calls a function, replies.

Started by `isolation.Worker` as a script of its own, so it may import nothing but the standard
library: no torch, no package of ours, and not the parent's main script. Only a function that asks for
the `Rollout` objects themselves makes it import our types, and torch with them.

A message is 8 bytes of length and a body. A request is three messages: a JSON head, the pickled function
(empty if it is found by name, or was sent before) and the pickled keyword arguments. The reply is two JSON
messages: the function is loaded; its result. Replies are JSON, so nothing that a user's function returns
is ever unpickled in the trainer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import difflib
import faulthandler
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import pickle
import select
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_IDLE_CHECK_MS = 2000
_WATCH_SECONDS = 1.0
_GRACE_SECONDS = 2.0
_MAX_VALUES = 1_000_000
_MAX_REPLY_CHARACTERS = 1 << 24
_MAX_REASON_CHARACTERS = 2000


def load(target: str) -> Callable[..., Any]:
    """`path/to/file.py:function`, `package.module:function` or `package.module.function`."""
    place, colon, name = target.rpartition(":")
    if not colon:
        place, _, name = target.rpartition(".")
    found: Any = _module_from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    for part in name.split("."):
        found = _part(found, part, place)
    if not callable(found):
        raise TypeError(f"{target} is a {type(found).__name__}, not a function")
    return found


def _part(owner: Any, name: str, place: str) -> Any:
    """`owner.name`; where there is none, an error that says what there is instead."""
    if hasattr(owner, name):
        return getattr(owner, name)
    own = [
        key
        for key, value in getattr(owner, "__dict__", {}).items()
        if callable(value) and not key.startswith("_")
    ]
    near = difflib.get_close_matches(name, own, n=1)
    hint = (
        f"the nearest is {near[0]!r}" if near else f"it has {', '.join(sorted(own)[:10]) or 'no functions'}"
    )
    raise AttributeError(f"{place} has no {name!r}; {hint}")


def describe(function: Callable[..., Any]) -> dict[str, Any]:
    """Which keyword arguments a function takes: `{"required": [...], "optional": [...], "any": bool}`."""
    kinds = inspect.Parameter
    named = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY, kinds.POSITIONAL_ONLY)
    ]
    every = inspect.signature(function).parameters.values()
    return {
        "required": [parameter.name for parameter in named if parameter.default is kinds.empty],
        "optional": [parameter.name for parameter in named if parameter.default is not kinds.empty],
        "any": any(parameter.kind is kinds.VAR_KEYWORD for parameter in every),
    }


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Calls a plain or an async function and waits for its value. Our own rewards are `reward(group, /)`,
    so what can only be given by place is."""
    first = [
        name
        for name, one in inspect.signature(function).parameters.items()
        if one.kind is one.POSITIONAL_ONLY
    ]
    named = {name: value for name, value in arguments.items() if name not in first}
    value = function(*(arguments[name] for name in first if name in arguments), **named)
    return awaited(value) if inspect.isawaitable(value) else value


def awaited(value: Any) -> Any:
    """The value of an awaitable, in whatever thread and loop we are."""

    async def wait() -> Any:
        return await value

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # A notebook's cell runs inside a loop, and a loop cannot wait for another one in its own thread.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()


def _module_from_file(path: Path) -> Any:
    name = f"_reflectvlm_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # a file may import its neighbours, as when run by itself
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


def _plain(value: Any) -> Any:
    """Arrays, tensors and fractions -> numbers, without importing their libraries; iterators -> lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Iterator):
        value = list(itertools.islice(value, _MAX_VALUES + 1))
    if isinstance(value, (list, tuple)):
        if len(value) > _MAX_VALUES:
            raise ValueError(f"it gave more than {_MAX_VALUES:,} values")
        return [_plain(item) for item in value]
    if hasattr(value, "__float__") and not isinstance(value, (int, float)):
        return float(value)
    return value


def _read(fd: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = os.read(fd, min(count - len(data), 1 << 20))
        if not piece:
            _leave()
        data += piece
    return bytes(data)


def _receive(fd: int) -> bytes:
    return _read(fd, struct.unpack("!Q", _read(fd, 8))[0])


def _send(fd: int, owner: int, reply: dict[str, Any]) -> None:
    if os.getpid() != owner:
        os._exit(0)  # a reward forked and let the copy come back here: it must not answer too
    body = json.dumps(reply).encode()
    data = memoryview(struct.pack("!Q", len(body)) + body)
    while data:
        data = data[os.write(fd, data) :]


def _failure(error: BaseException) -> dict[str, Any]:
    try:
        reason = "".join(traceback.format_exception_only(error)).strip()
        told = "".join(traceback.format_exception(error))
    except BaseException:  # noqa: BLE001 - an exception of a user's class may fail when it is printed
        reason = told = f"{type(error).__name__}, which cannot be printed"
    return {"error": reason[:_MAX_REASON_CHARACTERS], "traceback": told[-4000:]}


def _answer(
    head: dict[str, Any],
    code: bytes,
    body: bytes,
    loaded: dict[str, Callable[..., Any]],
    send: Callable[[dict[str, Any]], None],
    end_after: Callable[[float], None],
) -> None:
    target = head["target"]
    end_after(head["load"])
    # Boundary: whatever a user's file does, sys.exit included, is told to the parent as a reason.
    try:
        if target not in loaded:
            loaded[target] = pickle.loads(code) if code else load(target)
        described = describe(loaded[target])
        if {"group", "rollouts"} & {*described["required"], *described["optional"]}:
            # It gets `Rollout` objects. What unpickling them takes is loaded here, not in the call's time.
            importlib.import_module("reflectvlm.types")
    except BaseException as error:  # noqa: BLE001
        send(_failure(error))
        return
    send(described)
    end_after(head["seconds"])
    try:
        reply = {"value": _plain(call(loaded[target], pickle.loads(body))) if head["call"] else None}
        if len(json.dumps(reply)) > _MAX_REPLY_CHARACTERS:
            raise ValueError("it gave more than 16 MiB")
    except BaseException as error:  # noqa: BLE001
        reply = _failure(error)
    send(reply | {"memory": _memory()})


def _memory() -> int:
    """Bytes of memory this process holds now; 0 where that cannot be read."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _wait_for_request(fd: int, parent: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not poll.poll(_IDLE_CHECK_MS):
        # A process forked from the parent may hold our pipe open, so its end alone is no proof.
        if os.getppid() != parent:
            _leave()


def _watch(parent: int) -> None:
    """A call that sleeps or computes in Python must not outlive the parent by its whole time-out; one that
    hangs in C with the interpreter lock does, and the timer ends it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        _leave()

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _leave() -> None:
    """The parent is gone: ends this process and those it started, if it leads their group."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _limit(gib: float | None) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a reward that crashes at every row fills no disk
    if gib:
        size = int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main() -> None:
    owner, parent = os.getpid(), os.getppid()
    requests, replies = os.dup(0), os.dup(1)  # not inheritable: programs a reward starts get neither
    black_hole = os.open(os.devnull, os.O_RDWR)
    os.dup2(black_hole, 0)
    os.dup2(2, 1)  # what a reward prints goes to stderr and never between the replies
    start = json.loads(_receive(requests))
    sys.path[:] = start["sys_path"]
    _limit(start["memory_gib"])
    _watch(parent)

    def send(reply: dict[str, Any]) -> None:
        _send(replies, owner, reply)

    def end_after(seconds: float) -> None:
        # A C thread that needs no interpreter lock ends us if the parent died while a call hangs.
        faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True, file=black_hole)

    loaded: dict[str, Callable[..., Any]] = {}
    while True:
        _wait_for_request(requests, parent)
        head, code, body = json.loads(_receive(requests)), _receive(requests), _receive(requests)
        _answer(head, code, body, loaded, send, end_after)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
