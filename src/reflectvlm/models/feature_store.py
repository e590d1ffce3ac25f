"""Where vision features are kept under a key: in memory and on disk, both bounded; the least recently used
leaves first.

A file is written aside and renamed, so several processes may share a folder: each sees a file whole or
not at all. A file carries a checksum; one that does not match is told once, deleted and counts as absent.
Of several processes each takes stock of the folder anew every 64 writes and whenever it seems full, so
together they may for a moment stand above the limit by what the others have written since.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("reflectvlm")

_LOOK_EVERY = 64
"""Files written between two looks at the whole folder."""
_STALE_SECONDS = 3600.0
"""A file half written by a process that was killed is deleted after so long."""


class MemoryStore:
    """Tensors of at most `limit` bytes together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Tensor | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: str, value: Tensor) -> None:
        """Keeps the tensor, unless it alone is above the limit."""
        size = value.numel() * value.element_size()
        if key in self._kept or size > self.limit:
            return
        while self.used + size > self.limit:
            _, old = self._kept.popitem(last=False)
            self.used -= old.numel() * old.element_size()
        self._kept[key] = value
        self.used += size


class FolderStore:
    """One safetensors file for each tensor; the files together have at most `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._used = 0
        self._unseen = _LOOK_EVERY
        """Writes since the last look at the folder."""
        self._told: set[str] = set()

    def get(self, key: str) -> Tensor | None:
        path = self._path(key)
        try:
            value = _read(path)
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001  boundary: a broken file raises whatever its reader likes
            self._tell("broken", "%s cannot be used and is made anew: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # another process may just have deleted it
            os.utime(path)
        return value

    def put(self, key: str, value: Tensor) -> None:
        """Writes the tensor, unless it alone is above the limit. A disk that refuses is told once."""
        path = self._path(key)
        body = _packed(value)
        if len(body) > self.limit or path.exists():
            return
        aside = self.folder / f".{key}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
        try:
            self._make_room(len(body))
            aside.write_bytes(body)
            os.replace(aside, path)
        except OSError as error:
            self._tell("write", "vision features cannot be kept in %s: %s", self.folder, error)
            with contextlib.suppress(OSError):
                aside.unlink()
            return
        self._used += len(body)
        self._unseen += 1

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self, size: int) -> None:
        if self._unseen < _LOOK_EVERY and self._used + size <= self.limit:
            return
        files = sorted(self._files())
        self._used, self._unseen = sum(file.size for file in files), 0
        for file in files:
            if self._used + size <= self.limit:
                break
            with contextlib.suppress(FileNotFoundError):
                file.path.unlink()
            self._used -= file.size

    def _files(self) -> Iterator[_File]:
        """What lies there; half-written files of dead processes are deleted."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # another process made room
                    continue
                path = Path(entry.path)
                if entry.name.endswith(".tmp") and time.time() - stat.st_mtime > _STALE_SECONDS:
                    path.unlink(missing_ok=True)
                elif entry.name.endswith((".safetensors", ".tmp")):
                    yield _File(stat.st_mtime_ns, stat.st_size, path)

    def _tell(self, what: str, text: str, *values: object) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning(f"{text} Further cases like this are not told.", *values)


class _File(NamedTuple):
    """Sorts by when it was last used."""

    used: int
    size: int
    path: Path


def digest_of(value: Tensor) -> str:
    """sha256 of a tensor's bytes; kind and shape are not in it."""
    return hashlib.sha256(_bytes(value)).hexdigest()


def _bytes(value: Tensor) -> memoryview:
    flat = value.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def _packed(value: Tensor) -> bytes:
    from safetensors.torch import save

    body: bytes = save({"features": value.contiguous()}, metadata={"sha256": digest_of(value)})
    return body


def _read(path: Path) -> Tensor:
    """Raises FileNotFoundError, and whatever a broken file raises."""
    from safetensors import safe_open

    if not path.exists():
        raise FileNotFoundError(path)
    with safe_open(path, framework="pt") as file:
        # A copy: what the reader gives keeps the file mapped, and a process has only so many mappings.
        value: Tensor = file.get_tensor("features").clone()
        wanted = (file.metadata() or {}).get("sha256")
    if digest_of(value) != wanted:
        raise ValueError("its checksum does not match")
    return value
