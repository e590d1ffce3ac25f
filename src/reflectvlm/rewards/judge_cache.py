"""Verdicts on disk, by the content of the request: a second run asks nothing and says the same.

One JSON object a line, only ever appended to. A line is written under a lock by one `write`, so that two
processes may share a file; a line that was cut when its process was killed is passed over. Of two verdicts
on one request the first in the file counts for everybody, also for the one that came second.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reflectvlm.rewards.verdict import Verdict

_log = logging.getLogger("reflectvlm")


def read_verdict(row: Mapping[str, Any]) -> Verdict:
    score = row["score"]
    return Verdict(score=None if score is None else float(score), why=str(row["why"]))


def verdict_line(verdict: Verdict) -> dict[str, Any]:
    return {"score": verdict.score, "why": verdict.why}


class VerdictCache:
    """Example: `VerdictCache("judge.jsonl").get(key)` is a `Verdict`, or None if nobody has asked.

    `read` and `written` say how a line holds what was said: by default a verdict, elsewhere a text
    (`eval/asking.py`). `read` raises ValueError, KeyError or TypeError for a line that holds none.
    """

    def __init__(
        self,
        path: str | Path,
        read: Callable[[Mapping[str, Any]], Any] = read_verdict,
        written: Callable[[Any], dict[str, Any]] = verdict_line,
        *,
        what: str = "judge's cache",
        strict: bool = False,
    ) -> None:
        """`what` the file is, in messages. `strict`: one that cannot be written is an error, where what was
        said has cost something; else a warning."""
        self.path = Path(path)
        self.what, self.strict = what, strict
        self._read, self._written = read, written
        self._verdicts: dict[str, Any] = {}
        self._read_to = 0
        self._lock = threading.Lock()
        self._failed = False
        if self.path.is_dir():
            raise ValueError(
                f"The {what} {self.path} is a folder. Name a file, e.g. {self.path}/judge.jsonl."
            )
        if strict:  # found out before anything is paid for
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.open("ab").close()
            except OSError as error:
                raise self._unwritable(error) from error

    def get(self, key: str) -> Any:
        """Also what another process has written in the meantime."""
        with self._lock:
            if key not in self._verdicts:
                self._read_on()
            return self._verdicts.get(key)

    def has(self, wanted: Callable[[Any], bool]) -> bool:
        """Whether any that is there is such a one, also of those that another process has written."""
        with self._lock:
            self._read_on()
            return any(map(wanted, self._verdicts.values()))

    def put(self, key: str, verdict: Any, **about: Any) -> Any:
        """Writes a verdict unless there is one already; gives the one that counts."""
        line = {"key": key, **about, **self._written(verdict)}
        with self._lock:
            try:
                self._append(key, json.dumps(line).encode() + b"\n")
            except OSError as error:
                if self.strict:
                    raise self._unwritable(error) from error
                if not self._failed:
                    _log.warning(
                        "The %s %s cannot be written: %s. It costs a re-run.", self.what, self.path, error
                    )
                self._failed = True
            return self._verdicts.setdefault(key, verdict)

    def _unwritable(self, error: OSError) -> ValueError:
        return ValueError(
            f"The {self.what} {self.path} cannot be written: {error.strerror or error}. Make room or name "
            "another file, and start again: what is in it is not asked again."
        )

    def _append(self, key: str, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            self._read_on()
            if key in self._verdicts:
                return
            size = os.fstat(fd).st_size
            cut = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            whole = b"\n" + line if cut else line
            if os.write(fd, whole) < len(whole):  # the disk is full: the next line begins on a new one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)  # and the lock with it

    def _read_on(self) -> None:
        """Reads the whole lines that are new."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read_to)
                new = file.read()
        except FileNotFoundError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.split(b"\n"):
            self._keep(line)
        self._read_to += len(whole)

    def _keep(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            row = json.loads(line)
            self._verdicts.setdefault(str(row["key"]), self._read(row))
        except (ValueError, KeyError, TypeError, RecursionError):
            _log.warning("A line of the %s %s is cut or damaged and is passed over.", self.what, self.path)
