"""What a recipe starts from: the identity of a cold start, and the folder its model is kept in.

A stage is named by a hash of everything that decides its result: the composed recipe, this package's
version, the weights it starts from and the files that the recipe names (rows, a `.txt` instruction, the
file of a `file.py:function`) by their content. A folder of rows counts by its files' names, sizes and
times. What changes no result (`output`, `evaluation`, `test`, the
run's name) is left out. Left out as well: changes of the code within one version, of images that rows
name and of modules that a named file imports; delete the folder to make the stage anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflectvlm.recipe_check import RecipeError

VARIABLE = "REFLECTVLM_CACHE"
_CHANGES_NO_RESULT = ("output", "evaluation", "test", "name")


class StageStopped(RuntimeError):
    """A signal stopped the stage before its end; nothing of the run itself has begun."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


def stage_name(recipe: str, values: Mapping[str, Any]) -> str:
    """`<recipe>-<hash16>` of a composed recipe."""
    from reflectvlm import __version__

    kept: dict[str, Any] = {name: value for name, value in values.items() if name not in _CHANGES_NO_RESULT}
    start = values.get("policy") or {}
    weights = weights_digest(start.get("path"))
    if weights:  # the same weights in another folder are the same start
        kept["policy"] = {**start, "path": weights}
    text = json.dumps([_with_contents(kept), __version__], sort_keys=True, default=str)
    return f"{Path(recipe).stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def weights_digest(path: Any) -> str | None:
    """sha256 over a local model's safetensors files; None for a hub name or no path at all."""
    from reflectvlm.models.tiny import pretrained_tiny

    if not isinstance(path, str):
        return None
    folder = pretrained_tiny() if path == "tiny" else Path(path)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(_content(file))
    return digest.hexdigest()


def stages_folder() -> Path:
    """Where stages are kept: `$REFLECTVLM_CACHE/stages`, else `~/.cache/reflectvlm/stages`."""
    given = os.environ.get(VARIABLE)
    try:
        root = Path(given).expanduser() if given else Path.home() / ".cache" / "reflectvlm"
    except RuntimeError as error:
        raise RecipeError(
            f"There is no home folder to keep cold starts in. Set {VARIABLE} to a folder."
        ) from error
    folder = root / "stages"
    problem = _problem(folder)
    if problem:
        said = f"{VARIABLE} is {given!r}, but" if given else "Cold starts are kept in"
        raise RecipeError(
            f"{said} {folder} cannot be written: {problem}. Set {VARIABLE} to a folder that can, "
            "or give start_from=null and a policy.path of your own."
        )
    return folder.absolute()


def finished_model(folder: Path) -> Path | None:
    """The model of a stage that ran to its end; its summary is written last."""
    if not (folder / "summary.json").is_file():
        return None
    if not any((folder / "model").glob("*.safetensors")):
        raise RecipeError(
            f"{folder} is a finished cold start without a model. Delete the folder to make it anew."
        )
    return folder / "model"


def _with_contents(value: Any, key: str = "", in_data: bool = False) -> Any:
    """`value` with a digest beside every text in it that is the name of something on this disk."""
    if isinstance(value, Mapping):
        return {
            name: _with_contents(inner, str(name), in_data or name == "data") for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_with_contents(inner, key, in_data) for inner in value]
    if not isinstance(value, str):
        return value
    for name in (value, value.rpartition(":")[0]):
        path = os.path.expanduser(name)
        if os.path.isfile(path):  # unlike Path.is_file, takes any text, however long
            return [value, _content(Path(path)).hex()]
    folder = Path(os.path.expanduser(value))
    # Under other keys a word like "train" is no folder, even if one here is called so.
    if in_data and key == "path" and folder.is_dir():
        return [value, _listing(folder)]
    return value


def _content(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of all files: content would be read in full for every run."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    states = [(file, file.stat()) for file in files]
    return [(str(file.relative_to(folder)), state.st_size, state.st_mtime_ns) for file, state in states]


def _problem(folder: Path) -> str | None:
    """Why no file can be made in `folder`; None if one can."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None
