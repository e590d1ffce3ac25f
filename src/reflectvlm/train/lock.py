"""A lock between processes: a file that names its holder, read and changed only under `flock`.

It works between processes of one POSIX machine. Across machines that share a disk it can only refuse. A
holder that died leaves a lock that the next one takes over.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def lock(path: Path) -> None:
    import fcntl

    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = _holder(file.read())
        if holder is not None and holder != _myself() and _alive(holder):
            raise RuntimeError(
                f"{path.parent} is in use by process {holder['pid']} on {holder['host']}. Two processes "
                "must not write to one run: wait for it, stop it, or choose another name. "
                f"If that process is surely gone, delete {path}."
            )
        file.seek(0)
        file.truncate()
        file.write(json.dumps(_myself()) + "\n")


def unlock(path: Path) -> None:
    import fcntl

    if not path.exists():
        return
    with path.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = _holder(file.read())
        # Emptied, not deleted: another process may already wait on this very file.
        if holder == _myself():
            file.truncate(0)


def holder(path: Path) -> dict[str, Any] | None:
    """The living process that holds a lock, or None: for people who ask."""
    if not path.is_file():
        return None
    found = _holder(path.read_text(encoding="utf-8"))
    return found if found is not None and _alive(found) else None


def _myself() -> dict[str, Any]:
    """With host and birth: in containers every process may have the number 1."""
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "born": _born(pid)}


def _holder(text: str) -> dict[str, Any] | None:
    """Who holds it; None for a free lock, or one cut short by a kill."""
    try:
        found = json.loads(text)
        return {"pid": int(found["pid"]), "host": str(found["host"]), "born": found["born"]}
    except (ValueError, KeyError, TypeError):
        return None


def _alive(holder: Mapping[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return True  # cannot be asked from here
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, and alive
    born = _born(holder["pid"])
    # A reused number: some other process was born later under the same pid.
    return born is None or holder["born"] is None or born == holder["born"]


def _born(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None where the kernel does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "dead" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return None
