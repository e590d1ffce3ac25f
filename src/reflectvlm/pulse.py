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
import zlib
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
_LAYOUT = struct.Struct("<Qd?64s")
"""Number of the beat, its time (of the clock below), waits, phase."""
_SLOT = _LAYOUT.size + 4
"""Bytes of a beat and of its checksum. Beats go by turns into two slots, so that one is whole at any moment,
also where a process is killed, or looked at, in the middle of the other."""
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
        self.beats = 0
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
        _own.file = mmap.mmap(handle, 2 * _SLOT)
    finally:
        os.close(handle)
    beat()
    return True


def beat() -> None:
    """This process got on."""
    if _own.file is not None:
        _own.beats += 1
        at = _own.beats % 2 * _SLOT
        _own.file[at : at + _SLOT] = _slot(_own.beats, _own.waits, _own.phase)


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
    """A file for a process that is about to be started."""
    path.write_bytes(_slot(0, False, "start") + bytes(_SLOT))


def read(path: Path) -> Pulse:
    """The last whole beat. Raises RuntimeError where there is none: nothing of ours leaves such a file."""
    for _ in range(1000):
        data = path.read_bytes()
        if whole := [_LAYOUT.unpack(slot[:-4]) for slot in (data[:_SLOT], data[_SLOT:]) if _is_whole(slot)]:
            _, at, waits, name = max(whole)
            return Pulse(at, waits, name.rstrip(b"\0").decode(errors="replace"))
        time.sleep(0.001)  # both slots were written to while they were read
    raise RuntimeError(
        f"{path} holds no sign of life. Something else has written to it; start the run again."
    )


def _slot(number: int, waits: bool, name: str) -> bytes:
    beat = _LAYOUT.pack(number, clock(), waits, name.encode()[:64])
    return beat + zlib.crc32(beat).to_bytes(4, "little")


def _is_whole(slot: bytes) -> bool:
    return any(slot) and zlib.crc32(slot[:-4]) == int.from_bytes(slot[-4:], "little")
