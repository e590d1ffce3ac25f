"""Signs of life: what this process is doing, for a launcher that watches it.

A launcher names a small file in `REFLECTVLM_PULSE`. The process writes into it, in place, when it last got
on, whether it waits for others, and its phase: enough to tell which of several processes died or hangs, and
in what. Without the variable all of this does nothing.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

VARIABLE = "REFLECTVLM_PULSE"
_LAYOUT = struct.Struct("<d?64s")
"""Time of the last beat (seconds since 1970), waits, phase."""


class Pulse(NamedTuple):
    """What a process last said of itself."""

    at: float
    waits: bool
    phase: str


class _Own:
    """This process's file. Opened at the first beat, so that importing touches nothing."""

    def __init__(self) -> None:
        self.file: mmap.mmap | None = None
        self.asked = False
        self.waits = False
        self.phase = "start"

    def write(self, now: float) -> None:
        if not self.asked:
            self.asked = True
            self.file = _mapped(os.environ.get(VARIABLE))
        if self.file is not None:
            _LAYOUT.pack_into(self.file, 0, now, self.waits, self.phase.encode()[:64])


_own = _Own()


def beat(clock: Callable[[], float] = time.time) -> None:
    """This process got on."""
    if not _own.asked or _own.file is not None:
        _own.write(clock())


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What this process does within the block: data, rollout, reward, update, save, evaluation."""
    before, _own.phase = _own.phase, name
    beat()
    try:
        yield
    finally:
        _own.phase = before
        beat()


@contextmanager
def waiting() -> Iterator[None]:
    """Within the block this process waits for others."""
    before, _own.waits = _own.waits, True
    beat()
    try:
        yield
    finally:
        _own.waits = before
        beat()


def create(path: Path) -> None:
    """An empty file for a process that is about to be started."""
    path.write_bytes(_LAYOUT.pack(time.time(), False, b"start"))


def read(path: Path) -> Pulse:
    at, waits, name = _LAYOUT.unpack(path.read_bytes()[: _LAYOUT.size])
    return Pulse(at, waits, name.rstrip(b"\0").decode(errors="replace"))


def _mapped(path: str | None) -> mmap.mmap | None:
    if not path:
        return None
    handle = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(handle, _LAYOUT.size)
    finally:
        os.close(handle)
