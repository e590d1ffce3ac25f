"""`reflectvlm inspect PATH`: what is in a dumped batch, a run's folder or a checkpoint. See `cli_help`.

Only reads, and unpickles nothing. Every text that comes out of a file is shown with its control characters
as escapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectvlm.generate_options import Given
from reflectvlm.recipe_check import RecipeError, nearest

_KEYS = ("path", "model", "rows")
_CHECKPOINT = re.compile(r"(?:\.old-|superseded-)?step-\d+(?:-again)*")
_OF_A_RUN = ("recipe.yaml", "metrics.jsonl", "checkpoints", "lock.json", "summary.json")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the words after `inspect` say."""

    path: Path
    model: str | None = None
    """Whose tokenizer makes text of a dump's ids; None for the text that the dump has."""
    rows: int = 8
    """Most rows of a dump whose text is shown."""

    @classmethod
    def read(cls, words: Sequence[str]) -> Asked:
        given = Given.parsed(words, "inspect", _KEYS, above=(), bare="path")
        path = given.text("path")
        if path is None:
            raise RecipeError("inspect needs a path: a dumped batch, a run's folder or a checkpoint.")
        rows = given.value("rows", int, 8)
        if rows < 0:
            raise RecipeError(f"rows is {rows}. It must be a whole number, 0 or more.")
        return cls(path=Path(path).expanduser(), model=given.text("model"), rows=rows)


def inspect(words: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 1 if a checkpoint is asked for that is not valid."""
    asked = Asked.read(words)
    show, folder = _kind(asked.path)
    return show(folder, asked)


def _kind(path: Path) -> tuple[Callable[[Path, Asked], int], Path]:
    """What shows this path, and its folder."""
    if not path.exists():
        raise RecipeError(f"{str(path)!r} does not exist.{_neighbour(path)}")
    folder = path if path.is_dir() else path.parent
    if any((folder / name).is_file() for name in ("batch.json", "batch.safetensors")):
        return _dump, folder
    if (folder / "manifest.json").is_file() or _CHECKPOINT.fullmatch(folder.name):
        return _checkpoint, folder
    if folder.name == "checkpoints" and _is_run(folder.parent):
        return _run, folder.parent
    if _is_run(folder):
        return _run, folder
    raise RecipeError(_nothing(path, folder))


def _dump(folder: Path, asked: Asked) -> int:
    from reflectvlm.inspect_dump import show_dump

    return show_dump(folder, asked.model, asked.rows)


def _checkpoint(folder: Path, _: Asked) -> int:
    from reflectvlm.inspect_run import show_checkpoint

    return show_checkpoint(folder)


def _run(folder: Path, _: Asked) -> int:
    from reflectvlm.inspect_run import show_run

    return show_run(folder)


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in _OF_A_RUN)


def _neighbour(path: Path) -> str:
    """The name that was perhaps meant."""
    while not path.parent.exists():
        path = path.parent
    if not path.parent.is_dir():
        return f" {path.parent} is a file."
    near = nearest(path.name, (one.name for one in path.parent.iterdir()))
    return f" Did you mean {str(path.parent / near)!r}?" if near else ""


def _nothing(path: Path, folder: Path) -> str:
    """Why a path cannot be inspected, and what can."""
    if path.is_dir():
        if runs := sorted(str(one) for one in folder.iterdir() if one.is_dir() and _is_run(one)):
            more = f" and {len(runs) - 8} more" if len(runs) > 8 else ""
            return f"{str(path)!r} holds several runs: {', '.join(runs[:8])}{more}. Name one of them."
        if (folder / "config.json").is_file():
            return f"{str(path)!r} is a model. `reflectvlm generate model={path}` asks it something."
    return f"{str(path)!r} is no dumped batch, no run's folder and no checkpoint."
