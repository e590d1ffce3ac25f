"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a wrong resume.

A checkpoint is a folder `step-000123` of safetensors files and `state.json`. It is
written to `.tmp-…` beside its place, every file is flushed to the disk, `manifest.json` (size and
sha256 of every file, and a checksum of itself) comes last, and one rename makes it visible. Whether
a folder is a checkpoint is decided by its manifest, never by its number.

Nothing is pickled, so loading runs no code. Left out: sharded files of several ranks (the caller
gathers first). Saving while training goes on is `saver.py`, what is valid `manifest.py`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reflectvlm.train.manifest import (
    FORMAT_VERSION,
    Invalid,
    canonical,
    checksum,
    looks_valid,
    read_manifest,
    sha256,
    step_of,
)
from reflectvlm.train.packing import JSON

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """What `CheckpointStore.load` gives back.

    Example: `Checkpoint(step=12, tensors={"model": {...}, "optimizer": {...}}, state={"epoch": 1},
    path=Path("runs/a/checkpoints/step-000012"))`
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, JSON]
    path: Path
    """Its folder."""


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run. One process writes; any number may read."""

    folder: Path
    keep: int = 2
    """Newest valid checkpoints that stay; older ones go after the next one is safe."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if self.keep < 1:
            raise ValueError(f"CheckpointStore.keep is {self.keep}. It must be at least 1.")

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, JSON],
    ) -> Path:
        """Write checkpoint `step` whole or not at all and return its folder.

        `tensors`: one file `<name>.safetensors` each. `OSError` if it cannot be written; earlier
        checkpoints are then intact.
        """
        _check(step, tensors)
        text = _json_text(state)
        final = self.folder / f"step-{step:06d}"
        temporary = self.folder / f".tmp-{final.name}-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob(".tmp-*"):
                _remove(stale)
            temporary.mkdir()
            _fill(temporary, step, tensors, text)
            _put_aside(final)
            _rename(temporary, final)
            _fsync(self.folder)
        except OSError as error:
            raise OSError(
                error.errno,
                f"Checkpoint of step {step} could not be written to {self.folder}: "
                f"{error.strerror or error}. Free space or fix the folder's permissions; "
                "earlier checkpoints there are intact.",
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._prune(final)
        return final

    def latest(self) -> Path | None:
        """The valid checkpoint with the highest step, or None. Every byte is compared with its
        manifest; each folder that differs is skipped with a warning that says where."""
        while True:
            candidates = self._candidates()
            for path in candidates:
                try:
                    read_manifest(path)
                except Invalid as reason:
                    if path.exists():  # else the writer has rotated it away since
                        logger.warning("Checkpoint %s is skipped: %s", path, reason)
                else:
                    return path
            if self._candidates() == candidates:
                return None

    def tidy(self) -> Path | None:
        """Remove what killed processes left, and return `latest`. For the one process that writes, before it
        begins: a run with nothing left to save would keep those files for ever."""
        newest = self.latest()
        for leftover in self.folder.glob(".tmp-*"):
            _remove(leftover)
        for aside in self.folder.glob(".old-step-*"):
            if aside == newest:
                newest = aside.with_name(aside.name.removeprefix(".old-"))
                _rename(aside, newest)
            elif newest is not None:
                _remove(aside)
        return newest

    def load(self, path: Path, *, verify: bool = True) -> Checkpoint:
        """Read one checkpoint, tensors on the CPU. `verify=False` compares sizes only: enough for
        a path that `latest` has just returned."""
        path = Path(path)
        try:
            manifest = read_manifest(path, content=verify)
        except Invalid as reason:
            raise ValueError(
                f"{path} is no valid checkpoint: {reason}. Choose another step, or resume=auto for the "
                "newest valid one."
            ) from None
        try:
            tensors = {name: load_file(path / f"{name}.safetensors") for name in manifest["tensors"]}
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (OSError, RuntimeError, SafetensorError) as error:  # rotated away by now, or no such format
            raise ValueError(
                f"{path} is no valid checkpoint: it cannot be read ({error}). Choose another step, or "
                "resume=auto for the newest valid one."
            ) from error
        return Checkpoint(step=manifest["step"], tensors=tensors, state=state, path=path)

    def supersede_after(self, step: int) -> None:
        """Take all checkpoints above `step` out of the count. Call it when a run is taken up again from
        an earlier one than the newest: a later resume must not mix two histories. They are renamed to
        `superseded-…` and never deleted: only who made them knows whether they are still wanted."""
        for path in self._candidates():
            if step_of(path) > step:
                target = path.with_name(f"superseded-{path.name.removeprefix('.old-')}")
                while target.exists():
                    target = target.with_name(f"{target.name}-again")
                _rename(path, target)
                logger.warning("Checkpoint %s is kept as %s and counts no more", path.name, target)

    def _candidates(self) -> list[Path]:
        """Folders that may be checkpoints, newest first. One put aside counts only if nothing stands
        in its place: a kill may have come between the two renames of a step saved twice."""
        found = [path for path in self.folder.glob("step-*") if path.is_dir() and step_of(path) >= 0]
        names = {path.name for path in found}
        aside = [p for p in self.folder.glob(".old-step-*") if p.is_dir() and p.name[5:] not in names]
        return sorted([*found, *aside], key=step_of, reverse=True)

    def _prune(self, newest: Path) -> None:
        """Delete what `keep` does not cover. `newest` stays whatever its number. A folder counts as
        valid here by its manifest and sizes; hashing everything at every save would cost minutes."""
        try:
            for leftover in self.folder.glob(".old-step-*"):
                _remove(leftover)
            kept = 1
            for path in self._candidates():
                if path == newest or not looks_valid(path):
                    continue
                kept += 1
                if kept > self.keep:
                    _delete(path)
        except OSError as error:
            logger.warning("Old checkpoints in %s could not be deleted: %s", self.folder, error)


# ---------------------------------------------------------------------------------------------
# Writing. Everything that touches the disk passes through the functions at the end of the file.


def _check(step: int, tensors: Mapping[str, Any]) -> None:
    if step < 0:
        raise ValueError(f"Checkpoint step is {step}. It must be 0 or more.")
    names = [*(f"{name}.safetensors" for name in tensors), "state.json", "manifest.json"]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError(
                f"Checkpoint part {name!r} is no plain file name. Use letters, digits, _, - and dots."
            )
        if names.count(name) > 1:
            raise ValueError(f"Checkpoint part {name!r} occurs twice. Give every part its own name.")


def _json_text(state: Mapping[str, JSON]) -> str:
    for key, value in state.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Checkpoint state[{key!r}] is not JSON: {error}. Put tensors under `tensors`; "
                "`pack` takes other nests apart."
            ) from None
    return json.dumps(dict(state))


def _fill(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: str,
) -> None:
    """Write all files, flush each, and the manifest last."""
    for name, values in tensors.items():
        ready = _own_memory(values)
        _write(folder / f"{name}.safetensors", partial(save_file, ready))
    _write(folder / "state.json", partial(_write_text, state))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    described = {}
    for path in files:
        _fsync(path)
        described[path.relative_to(folder).as_posix()] = {
            "size": path.stat().st_size,
            "sha256": sha256(path),
        }
    for directory in sorted(path for path in folder.rglob("*") if path.is_dir()):
        _fsync(directory)
    body = {"format": FORMAT_VERSION, "step": step, "tensors": list(tensors), "files": described}
    manifest = canonical({**body, "checksum": checksum(body)})
    _write(folder / "manifest.json", partial(_write_text, manifest))
    _fsync(folder / "manifest.json")
    _fsync(folder)


def _own_memory(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as the file format wants; copied only
    where they do share, e.g. tied embeddings."""
    seen: set[int] = set()
    ready = {}
    for name, tensor in values.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        if address in seen:
            tensor = tensor.clone()
            address = tensor.untyped_storage().data_ptr()
        seen.add(address)
        ready[name] = tensor
    return ready


def _put_aside(path: Path) -> Path | None:
    """Move a checkpoint out of the way under a name that `latest` still knows."""
    if not path.exists():
        return None
    aside = path.with_name(f".old-{path.name.removeprefix('.old-')}")
    if path != aside:
        if aside.exists():
            _remove(aside)
        _rename(path, aside)
    return aside


def _delete(path: Path) -> None:
    """Rename, then remove: no half-deleted folder ever carries a checkpoint's name."""
    aside = _put_aside(path)
    if aside is not None:
        _remove(aside)


# ---------------------------------------------------------------------------------------------
# The disk.


def _write(path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except SafetensorError as error:
        # The writer below safetensors reports the system's error only inside its text.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush a folder; for a file it is a real failure.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def _remove(path: Path) -> None:
    shutil.rmtree(path)
