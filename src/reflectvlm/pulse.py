"""Signs of life: what this process is doing, for a launcher that watches it.

A launcher names a small file in `REFLECTVLM_PULSE`. The process writes into it, in place, when it last got
on, whether it waits for others, and its phase: enough to tell which of several processes died or hangs, and
in what. Without a launcher all of this does nothing.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

VARIABLE = "REFLECTVLM_PULSE"
TIMEOUT = "REFLECTVLM_TIMEOUT"
LOST = 69
"""Exit code of a process that others have left alone (EX_UNAVAILABLE)."""
TOLD = 70
"""Exit code of a process that was told of another's error (EX_SOFTWARE)."""
_LAYOUT = struct.Struct("<d?64s")
"""Time of the last beat (of the clock below), waits, phase."""
clock = time.monotonic
"""One for all processes of a machine. It neither jumps nor counts the time in which the machine sleeps."""


class Pulse(NamedTuple):
    """What a process last said of itself."""

    at: float
    waits: bool
    phase: str


class _Own:
    """This process's file, if it has one."""

    def __init__(self) -> None:
        self.file: mmap.mmap | None = None
        self.waits = False
        self.phase = "start"


_own = _Own()


def begin() -> bool:
    """Takes the file that a launcher named; whether there is one. The processes that this one starts are not
    the launcher's, so they are not told."""
    path = os.environ.pop(VARIABLE, None)
    if not path:
        return False
    handle = os.open(path, os.O_RDWR)
    try:
        _own.file = mmap.mmap(handle, _LAYOUT.size)
    finally:
        os.close(handle)
    beat()
    return True


def beat() -> None:
    """This process got on."""
    if _own.file is not None:
        _LAYOUT.pack_into(_own.file, 0, clock(), _own.waits, _own.phase.encode()[:64])


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What this process does within the block: data, rollout, reward, update, save, evaluation. After an
    error the phase stays: it is what the process ends in."""
    before, _own.phase = _own.phase, name
    beat()
    yield
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


def patience_minutes() -> float:
    """How long a process may stand still, or wait for the others, before the run ends with an error."""
    given = os.environ.get(TIMEOUT, "60")
    try:
        minutes = float(given)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise ValueError(f"{TIMEOUT} is {given!r}. It must be a number of minutes, above 0.")
    return minutes


def create(path: Path) -> None:
    """An empty file for a process that is about to be started."""
    path.write_bytes(_LAYOUT.pack(clock(), False, b"start"))


def read(path: Path) -> Pulse:
    at, waits, name = _LAYOUT.unpack(path.read_bytes()[: _LAYOUT.size])
    return Pulse(at, waits, name.rstrip(b"\0").decode(errors="replace"))
