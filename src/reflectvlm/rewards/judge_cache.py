"""Verdicts on disk, by the content of the request: a second run asks nothing and says the same.

One JSON object a line, only ever appended to. A line is written under a lock by one `write`, so that two
processes may share a file; a line that was cut when its process was killed is passed over. Of two verdicts
on one request the first in the file counts for everybody, also for the one that came second.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from reflectvlm.rewards.verdict import Verdict

_log = logging.getLogger("reflectvlm")


class VerdictCache:
    """Example: `VerdictCache("judge.jsonl").get(key)` is a `Verdict`, or None if nobody has asked."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._verdicts: dict[str, Verdict] = {}
        self._read_to = 0
        self._lock = threading.Lock()
        self._failed = False
        if self.path.is_dir():
            raise ValueError(
                f"The judge's cache {self.path} is a folder. Name a file, e.g. {self.path}/judge.jsonl."
            )

    def get(self, key: str) -> Verdict | None:
        """Also what another process has written in the meantime."""
        with self._lock:
            if key not in self._verdicts:
                self._read_on()
            return self._verdicts.get(key)

    def put(self, key: str, verdict: Verdict, **about: Any) -> Verdict:
        """Writes a verdict unless there is one already; gives the one that counts."""
        line = {"key": key, **about, "score": verdict.score, "why": verdict.why}
        with self._lock:
            try:
                self._append(key, json.dumps(line).encode() + b"\n")
            except OSError as error:
                if not self._failed:
                    _log.warning(
                        "The judge's cache %s cannot be written: %s. It costs a re-run.", self.path, error
                    )
                self._failed = True
            return self._verdicts.setdefault(key, verdict)

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
            os.write(fd, b"\n" + line if cut else line)
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
            score = row["score"]
            verdict = Verdict(score=None if score is None else float(score), why=str(row["why"]))
            self._verdicts.setdefault(str(row["key"]), verdict)
        except (ValueError, KeyError, TypeError, RecursionError):
            _log.warning("A line of the judge's cache %s is cut or damaged and is passed over.", self.path)
