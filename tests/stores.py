"""Checkpoint stores with known contents, for tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from reflectvlm.train.checkpoint import CheckpointStore

HERE = Path(__file__).parent


def put(store: CheckpointStore, step: int) -> Path:
    """A small checkpoint whose content tells its step."""
    value = torch.full((8,), float(step))
    return store.save(step, tensors={"model": {"w": value}, "optimizer": {"m": value}}, state={"step": step})


def values_of(store: CheckpointStore) -> set[float]:
    """Every number in the newest checkpoint: one, unless two were mixed."""
    newest = store.latest()
    assert newest is not None
    found = store.load(newest)
    return {float(v) for part in found.tensors.values() for one in part.values() for v in one} | {
        found.state["step"]
    }


def in_child(tmp_path: Path, script: str, *arguments: object, seconds: float = 120) -> Any:
    """What a script prints as JSON, within so many seconds."""
    file = tmp_path / "child.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{script}")
    command = [sys.executable, str(file), str(tmp_path / "runs"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
