"""Printing that never stops a command and never changes its exit code.

Nobody may read on (`| head`), the disk behind a file may be full, the process may have been started without
standard output, and a character may have no place in its encoding. In each case less is printed, and that
is all: a job script that waits for 143 or 75 must get it. Left out: which lines are printed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


def put(text: str) -> None:
    """On standard output, at once: a line that waits in a buffer meets a closed pipe only at exit."""
    stream = SafeStream(sys.stdout)
    stream.write(text)
    stream.flush()


def put_error(text: str) -> None:
    """On standard error."""
    stream = SafeStream(sys.stderr)
    stream.write(text)
    stream.flush()


def settle() -> None:
    """Writes what is still in buffers. Where that cannot be done it is dropped, so that the end of the
    process, which tries once more, does not put 120 in the place of its exit code."""
    for stream in (sys.stdout, sys.stderr):
        SafeStream(stream).flush()


@runtime_checkable
class Writable(Protocol):
    """What is needed of a stream."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...
    def fileno(self) -> int: ...


@dataclass
class SafeStream:
    """A text stream that falls silent instead of raising. Also what rich writes to: it answers a broken
    pipe itself with SystemExit, which would end the training."""

    file: Writable | None
    """None: the process was started with standard output closed."""

    @property
    def encoding(self) -> str:
        return getattr(self.file, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        with contextlib.suppress(ValueError, OSError):
            return self.file is not None and self.file.isatty()
        return False

    def fileno(self) -> int:
        if self.file is None:
            raise OSError("standard output is closed")
        return self.file.fileno()

    def write(self, text: str) -> int:
        try:
            self._write(text)
        except (OSError, ValueError) as error:
            self._silence(error)
        return len(text)

    def flush(self) -> None:
        try:
            if self.file is not None:
                self.file.flush()
        except (OSError, ValueError) as error:
            self._silence(error)

    def _write(self, text: str) -> None:
        if self.file is None:
            return
        try:
            self.file.write(text)
        except UnicodeEncodeError:
            self.file.write(text.encode(self.encoding, "replace").decode(self.encoding))

    def _silence(self, error: Exception) -> None:
        if isinstance(error, OSError) and (self.file is sys.stdout or self.file is sys.stderr):
            # Python flushes both once more at exit; without this it would end with 120.
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
        self.file = None
