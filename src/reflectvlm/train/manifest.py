"""What makes a folder a checkpoint: a manifest with size and sha256 of every file, and its own checksum."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from reflectvlm.train.packing import JSON

FORMAT_VERSION = 2
"""2: what the checkpoint belongs to is in it (`keeping.py`)."""


class Invalid(Exception):
    """Why a folder is no checkpoint."""


def problem_of(path: Path) -> str | None:
    """Why a folder is no valid checkpoint, every byte compared; None if it is one."""
    try:
        read_manifest(path)
    except (Invalid, ValueError) as reason:
        return str(reason)
    return None


def read_manifest(path: Path, *, content: bool = True) -> dict[str, Any]:
    """The manifest of a valid checkpoint; `Invalid` names the first file that differs."""
    manifest = _manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise Invalid(f"{name} is missing")
        try:
            size, digest = file.stat().st_size, sha256(file) if content else expected["sha256"]
        except OSError as error:
            raise Invalid(f"{name} cannot be read: {error.strerror or error}") from None
        if size != expected["size"]:
            raise Invalid(f"{name} has {size} bytes, its manifest says {expected['size']}")
        if digest != expected["sha256"]:
            raise Invalid(f"{name} has another sha256 than its manifest says")
    return manifest


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        body = {key: value for key, value in manifest.items() if key != "checksum"}
        intact = manifest["checksum"] == checksum(body)
    except OSError:
        raise Invalid("manifest.json is missing") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise Invalid("manifest.json is damaged") from None
    if not intact:
        raise Invalid("manifest.json is damaged")
    if manifest["format"] != FORMAT_VERSION:
        remedy = "Update reflectvlm to read it" if manifest["format"] > FORMAT_VERSION else "Start anew"
        raise ValueError(
            f"{path} has checkpoint format {manifest['format']}; this version of reflectvlm reads "
            f"{FORMAT_VERSION}. {remedy}."
        )
    if manifest["step"] != step_of(path):
        raise Invalid(f"manifest.json is that of step {manifest['step']}")
    return dict(manifest)


def looks_valid(path: Path) -> bool:
    try:
        read_manifest(path, content=False)
    except (Invalid, ValueError):
        return False
    return True


def step_of(path: Path) -> int:
    """The number in a folder's name, or -1."""
    found = re.fullmatch(r"(?:\.old-)?step-(\d+)", path.name)
    return int(found[1]) if found else -1


def canonical(value: JSON) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def checksum(body: JSON) -> str:
    return hashlib.sha256(canonical(body).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
