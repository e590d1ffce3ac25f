"""Every call that touches the disk, counted, so that a test can die or fail at each one of them.

`Disk(act).watch()` puts itself before Python's own functions (`open`, `os.fsync`, `os.rename`, …) and before
the writer of safetensors, and calls `act(Point)` before and after each call, and in the middle of what
writes: half of the bytes are then on the disk. It knows nothing of the code that is tested, so that code
cannot forget to announce a call. Left out: reading (a kill there changes nothing) and writers in C other
than safetensors'.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

CALLS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync", "truncate", "link", "symlink")
"""Functions of `os` that change the disk or wait for it, besides those that open and write."""


class Point(NamedTuple):
    """Where a process is. Example: `Point("during", "write", "/runs/a/state.json")`"""

    when: str
    """before, during or after."""
    call: str
    path: str


Act = Callable[[Point], None]


@dataclass
class Disk:
    """Calls `act` at every point of the threads that are inside of `watch`."""

    act: Act
    _threads: set[int] = field(default_factory=set)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        me = threading.get_ident()
        self._threads.add(me)
        with self._patched():
            try:
                yield
            finally:
                self._threads.discard(me)

    def at(self, when: str, call: str, path: Any) -> None:
        if self._watched():
            self.act(Point(when, call, _name(path)))

    def _watched(self) -> bool:
        """Files of other threads are left alone: they must not be seen half-written when this one dies."""
        return threading.get_ident() in self._threads

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        import safetensors.torch

        with contextlib.ExitStack() as stack:
            for name in CALLS:
                stack.enter_context(_replaced(os, name, self._around(name, getattr(os, name))))
            stack.enter_context(_replaced(os, "write", self._os_write(os.write)))
            stack.enter_context(_replaced(os, "open", self._os_open(os.open)))
            stack.enter_context(_replaced(os, "sendfile", self._around("write", os.sendfile)))
            opened = self._open(io.open)
            for module in (io, builtins):
                stack.enter_context(_replaced(module, "open", opened))
            native = self._native(safetensors.torch.serialize_file)
            stack.enter_context(_replaced(safetensors.torch, "serialize_file", native))
            yield

    def _around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **named: Any) -> Any:
            self.at("before", name, path)
            found = real(path, *rest, **named)
            self.at("after", name, path)
            return found

        return call

    def _os_open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return real(path, flags, *rest, **named)
            self.at("before", "open", path)
            found = real(path, flags, *rest, **named)
            self.at("after", "open", path)
            return found

        return call

    def _os_write(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(handle: int, data: Any) -> int:
            if not self._watched():
                return real(handle, data)
            self.at("before", "write", handle)
            half = real(handle, bytes(data)[: len(data) // 2])
            self.at("during", "write", handle)
            rest = real(handle, bytes(data)[half:])
            self.at("after", "write", handle)
            return half + rest

        return call

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if not self._watched() or not set(mode) & set("wax+") or isinstance(file, int):
                return real(file, mode, *rest, **named)
            self.at("before", "open", file)
            opened = _Written(real(file, mode, *rest, **named), self, file)
            self.at("after", "open", file)
            return opened

        return call

    def _native(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensors: Any, filename: Any, *rest: Any, **named: Any) -> Any:
            from safetensors import SafetensorError

            if not self._watched():
                return real(tensors, filename, *rest, **named)
            try:
                self.at("before", "open", filename)
                real(tensors, filename, *rest, **named)
                _in_the_middle(self, "write", Path(filename))
                self.at("after", "write", filename)
            except OSError as error:  # the real one words it so
                raise SafetensorError(f"Error: {error.strerror} (os error {error.errno})") from None
            return None

        return call


class _Written:
    """A file that says when it is written to: its bytes reach the disk when it is flushed or closed."""

    def __init__(self, file: Any, disk: Disk, path: Any) -> None:
        self.file, self.disk, self.path = file, disk, path
        self.kept = os.fstat(file.fileno()).st_size
        """Bytes that were there before: appending does not lose them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __iter__(self) -> Any:
        return iter(self.file)

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def write(self, data: Any) -> int:
        self.disk.at("before", "write", self.path)
        return int(self.file.write(data))

    def close(self) -> None:
        if self.file.closed:
            return
        path = Path(_name(self.path))
        try:
            self.file.flush()
            _in_the_middle(self.disk, "write", path, self.kept)
        finally:
            self.file.close()
        self.disk.at("after", "close", path)


def _in_the_middle(disk: Disk, call: str, path: Path, kept: int = 0) -> None:
    """Half of what was written, for as long as somebody looks."""
    data = path.read_bytes()
    _truncate(path, kept + max(len(data) - kept, 0) // 2)
    disk.at("during", call, path)
    with _open(path, "r+b") as file:
        file.write(data)


_truncate, _open = os.truncate, open


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _name(path: Any) -> str:
    if isinstance(path, int):
        return f"descriptor {path}"
    return os.fsdecode(path)


@dataclass
class KillAt:
    """Ends this process without any warning at the `deadly`-th point (from 1)."""

    deadly: int
    seen: int = 0

    def __call__(self, point: Point) -> None:
        del point
        self.seen += 1
        if self.seen == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class FailAt:
    """Raises `OSError(code)` at the `bad`-th point before a call (from 1), and, if `stays`, at all later
    ones, too. `spares`: calls that still work, as deleting does on a full disk."""

    bad: int
    code: int
    stays: bool = False
    spares: tuple[str, ...] = ()
    seen: int = 0
    failed: Point | None = None

    def __call__(self, point: Point) -> None:
        if point.when == "after" or point.call in self.spares:
            return
        self.seen += 1
        if self.seen == self.bad or (self.stays and self.seen > self.bad):
            self.failed = self.failed or point
            raise OSError(self.code, os.strerror(self.code), point.path)
