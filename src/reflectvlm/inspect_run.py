"""A run's folder or one checkpoint on the screen: what is whole, what is not, and how far it came."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reflectvlm.train.lock import holder
from reflectvlm.train.manifest import problem_of
from reflectvlm.train.run_folder import RunFolder
from reflectvlm.train.table import Table, say

_SHOWN = ("loss", "reward", "accuracy", "eval/accuracy", "grad_norm", "lr", "unscored", "time/step")
"""Metrics of the last steps that are shown, where a run has them."""
_STEPS = 8
_TAIL = 2**20
"""Bytes at the end of a log that are read."""


def show_run(path: Path) -> int:
    """Prints the state of a run: who writes to it, its checkpoints, its dumped batches, its last steps."""
    run = RunFolder(path)
    for line in _head(run):
        say(line)
    for table in (_checkpoints(run), _dumps(run), _steps(run)):
        say("")
        if table.rows:
            table.show()
        else:
            say(f"{table.title}: none")
    return 0


def show_checkpoint(path: Path) -> int:
    """Prints what a checkpoint holds. Returns 0 if it is valid, every byte compared with its manifest."""
    problem = problem_of(path)
    say(f"{path}: {'valid' if problem is None else f'not valid: {problem}'}")
    files = sorted(one for one in path.rglob("*") if one.is_file())
    table = Table("Files", ("file", "bytes", "tensors", "values", "not finite"))
    for file in files:
        cells = _tensors_of(file) if file.suffix == ".safetensors" else ("", "", "")
        table.add(file.relative_to(path).as_posix(), f"{file.stat().st_size:,}", *cells)
    say("")
    table.show()
    return 0 if problem is None else 1


def _head(run: RunFolder) -> Iterator[str]:
    who = holder(run.lock)
    if run.finished:
        state = "finished"
    elif who:
        state = f"unfinished; process {who['pid']} on {who['host']} is at it"
    else:
        state = "unfinished, and no process is at it; resume=auto goes on"
    yield f"{run.path}: {state}"
    if run.recipe.is_file():
        yield f"recipe: {run.recipe}"
    if (run.path / "overrides.txt").is_file():
        words = (run.path / "overrides.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        yield f"overrides: {' '.join(filter(None, words)) or 'none'}"
    if run.model.is_dir():
        yield f"model: {run.model}"


def _checkpoints(run: RunFolder) -> Table:
    table = Table("Checkpoints", ("name", "saved", "MB", "state"))
    if run.checkpoints.is_dir():
        for path in sorted(one for one in run.checkpoints.iterdir() if one.is_dir()):
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
            table.add(path.name, saved, f"{size / 1e6:.1f}", _state(path))
    return table


def _state(path: Path) -> str:
    if path.name.startswith(".tmp-"):
        return "a save that was cut off, or is being written"
    if path.name.startswith("superseded-"):
        return "kept from before the run was taken up at an earlier step; counts no more"
    return problem_of(path) or "valid"


def _dumps(run: RunFolder) -> Table:
    table = Table("Dumped batches (reflectvlm inspect FOLDER)", ("folder", "step", "why"))
    for file in sorted(run.path.glob("*/batch.json"), key=lambda one: one.stat().st_mtime):
        about = _object(file.read_text(encoding="utf-8", errors="replace"))
        step, why = about.get("step"), str(about.get("reason", "batch.json cannot be read"))
        table.add(file.parent.name, "?" if step is None else str(step), why[:120])
    return table


def _steps(run: RunFolder) -> Table:
    lines = [one for one in _last_lines(run.metrics) if "step" in one]
    steps: dict[Any, dict[str, Any]] = {}
    for line in lines:  # an evaluation is a line of its own
        steps.setdefault(line["step"], {}).update(line)
    shown = [name for name in _SHOWN if any(name in values for values in steps.values())]
    table = Table("Last steps", ("step", *shown))
    for step, values in list(steps.items())[-_STEPS:]:
        table.add(str(step), *(_number(values, name) for name in shown))
    return table


def _number(values: dict[str, Any], name: str) -> str:
    if name not in values:
        return "–"
    value = values[name]
    return f"{value:.4g}" if isinstance(value, int | float) else "not finite" if value is None else str(value)


def _last_lines(file: Path) -> list[dict[str, Any]]:
    """The last rows of a log; a line that a kill has cut is left out."""
    if not file.is_file():
        return []
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - _TAIL))
        text = stream.read().decode("utf-8", errors="replace")
    lines = text.splitlines()[1 if size > _TAIL else 0 :]
    return [one for line in lines if (one := _object(line))]


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _tensors_of(file: Path) -> tuple[str, str, str]:
    """Tensors, values and how many of these are NaN or infinite, one tensor in memory at a time."""
    from safetensors import SafetensorError, safe_open

    count = values = bad = 0
    try:
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118  no mapping
                tensor = stream.get_tensor(name)
                count, values = count + 1, values + tensor.numel()
                bad += int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
    except (SafetensorError, OSError) as error:
        return "unreadable", str(error)[:80], ""
    return f"{count:,}", f"{values:,}", f"{bad:,}"
