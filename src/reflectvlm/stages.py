"""What a recipe starts from: the identity of a stage, and the folder that keeps its model or its rows.

A stage is named by a hash of everything that decides its result: the composed recipe, this package's
version, the model it starts from (weights, configuration, tokenizer, image processor, chat template) and
the files that the recipe names (rows, a `.txt` instruction, the file of a `file.py:function`) by their
content. A model named as on a hub counts by that name alone, whatever is downloaded for it; a folder of
rows by its files' names, sizes and times. A stage before this one counts by what it made, model or rows,
wherever they lie and however they came about. What changes no result (`output`, `evaluation`, `test`, the
run's name) is left out. Left out as well: changes of the code within one version, of images that rows
name and of modules that a named file imports; delete the folder to make the stage anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflectvlm.recipe_check import RecipeError, leaves

VARIABLE = "REFLECTVLM_CACHE"
_CHANGES_NO_RESULT = (
    "output",
    "evaluation",
    "test",
    "name",
    "workers",
    "prefetch",
    "overlap_rewards",
    "compute",
)
_MADE_BEFORE = ("start_from", "data_from", "stages")
ROWS = "rows.jsonl"
_LARGE = 2**26
"""Bytes from which on a file is not read twice by one process."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_READ = (*_WEIGHTS, "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.py", "*templates/*.jinja")
"""What loading reads of a model's folder; its README, say, is not read, and checkpoints beside it are not."""


class StageStopped(RuntimeError):
    """A signal stopped the stage before its end; nothing of the run itself has begun."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


def stage_name(recipe: str, values: Mapping[str, Any], rows: Path | None = None) -> str:
    """`<recipe>-<hash16>` of a composed recipe whose stages have been made: `policy.path` is the model
    and `rows` the file that came of them."""
    from reflectvlm import __version__

    left_out = (*_CHANGES_NO_RESULT, *_MADE_BEFORE)
    kept: dict[str, Any] = {name: value for name, value in values.items() if name not in left_out}
    start = values.get("policy") or {}
    model = model_digest(start.get("path"))
    if model:  # the same model in another folder is the same start
        kept["policy"] = {**start, "path": model}
    if rows is not None:  # their images are named by content
        kept["data"] = {**kept["data"], "path": _content(rows).hex()}
    return f"{Path(recipe).stem}-{digest_of([kept, __version__])}"


def digest_of(values: Any) -> str:
    """16 figures of a hash over values and, where they name a file on this disk, over its content."""
    text = json.dumps(_with_contents(values), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_digest(name: str) -> str:
    """The name of a stage's folder for a title: `lookback_sft` of `lookback_sft-0123456789abcdef`."""
    return re.sub(r"-[0-9a-f]{16}$", "", name)


def model_digest(path: Any) -> str | None:
    """sha256 over every file of a local model that loading reads: weights, configuration, tokenizer,
    image processor and chat template. None for a hub name, which counts by name only, or no path at all."""
    from reflectvlm.models.tiny import pretrained_tiny

    if not isinstance(path, str):
        return None
    folder = pretrained_tiny() if path == "tiny" else Path(path)
    if not folder.is_dir() or not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return None
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _READ for file in folder.glob(pattern)}):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(_content(file))
    return digest.hexdigest()


def stages_folder() -> Path:
    """Where stages are kept: `$REFLECTVLM_CACHE/stages`, else `~/.cache/reflectvlm/stages`."""
    given = os.environ.get(VARIABLE)
    try:
        root = Path(given).expanduser() if given else Path.home() / ".cache" / "reflectvlm"
    except RuntimeError as error:
        raise RecipeError(
            f"There is no home folder to keep stages in. Set {VARIABLE} to a folder."
        ) from error
    folder = root / "stages"
    problem = _problem(folder)
    if problem:
        said = f"{VARIABLE} is {given!r}, but" if given else "Stages are kept in"
        raise RecipeError(
            f"{said} {folder} cannot be written: {problem}. Set {VARIABLE} to a folder that can, "
            "or give start_from=null and a policy.path of your own, data_from=null and a data.path."
        )
    return folder.absolute()


def finished_model(folder: Path) -> Path | None:
    """The model of a stage that ran to its end; its summary is written last."""
    if not (folder / "summary.json").is_file():
        return None
    if not any((folder / "model").glob("*.safetensors")):
        raise RecipeError(f"{folder} is a finished stage without a model. Delete the folder to make it anew.")
    return folder / "model"


def finished_rows(folder: Path) -> Path | None:
    """The rows of a stage that ran to its end; its summary is written last."""
    if not (folder / "summary.json").is_file():
        return None
    if not (folder / ROWS).is_file():
        raise RecipeError(f"{folder} is a finished stage without rows. Delete the folder to make it anew.")
    return folder / ROWS


def named_files(values: Any) -> dict[str, str]:
    """The files that texts in a recipe name (rewards, instructions), each with a digest of its content."""
    found: dict[str, str] = {}
    for _, value in leaves(values):
        for name in (str(value), str(value).rpartition(":")[0]) if isinstance(value, str) else ():
            path = os.path.expanduser(name)
            if os.path.isfile(path):
                found[name] = _content(Path(path)).hex()[:16]
    return found


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
    state = file.stat()
    if state.st_size < _LARGE:
        return _hashed(file)
    return _hashed_once(file, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _hashed_once(file: Path, size: int, time: int) -> bytes:  # noqa: ARG001  a changed file is another one
    """A chain asks about the weights it starts from once per stage."""
    return _hashed(file)


def _hashed(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of all files: content would be read in full for every run."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    states = [(file, file.stat()) for file in files]
    return [(str(file.relative_to(folder)), state.st_size, state.st_mtime_ns) for file, state in states]


def _problem(folder: Path) -> str | None:
    """Why no file can be made in `folder`; None if one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A name that no other process has, also not one with the same number on another machine.
        handle, probe = tempfile.mkstemp(prefix=".probe-", dir=folder)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        return error.strerror or str(error)
    return None
