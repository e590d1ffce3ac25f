"""One folder a run: what was asked for, on which machine and code, and all that came of it.

    runs/<name>/  recipe.yaml overrides.txt environment.json git.json
                  metrics.jsonl samples.jsonl sample_images/ tensorboard/ checkpoints/
                  model/ curves.png summary.json summary.md

A run is finished once its `summary.json` is there. Machine and code are in `environment.py`, the lock is in
`lock.py`, what may differ when a run is taken up again in `changes.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from reflectvlm.train import lock
from reflectvlm.train.changes import Change, MayChange, changes, check, nothing
from reflectvlm.train.environment import environment, git_state
from reflectvlm.train.run import Output
from reflectvlm.train.trackers import finite

log = logging.getLogger("reflectvlm")


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, locked for this process until `close`."""

    path: Path
    resumed: bool = False
    """True: the folder existed and is taken up again."""
    checkpoint: Path | None = None
    """The very checkpoint to go on from, where one was named."""
    changed: tuple[Change, ...] = ()
    """Settings in which the run goes on otherwise than it began."""

    @classmethod
    def open(
        cls,
        name: str,
        output: Output,
        begun: str,
        may_change: MayChange = nothing,
        settings: str | None = None,
    ) -> RunFolder:
        """The folder that `output.resume` asks for: never, auto, a run folder or one of its checkpoints.
        `begun` is what every folder of such a run holds; `settings` say what a run without a recipe is."""
        given: dict[str, Any] = {
            "recipe_yaml": output.recipe_yaml or settings,
            "overrides": output.overrides,
            "may_change": may_change,
        }
        if output.resume in ("auto", "never"):
            return cls.create(output.root, name, resume=output.resume, **given)
        path = Path(output.resume).absolute()
        if path.parent.name == "checkpoints" and path.name.startswith("step-"):
            if not path.is_dir():
                there = ", ".join(sorted(one.name for one in path.parent.glob("step-*"))) or "none"
                raise ValueError(f"resume={output.resume!r} is not there. Checkpoints of that run: {there}.")
            if cls(path.parent.parent).finished:
                raise ValueError(
                    f"{path.parent.parent} is finished, so it cannot go on from {path.name}. Start from its "
                    "model with start_from=null policy.path=…/model, or give the run's folder and more steps."
                )
            folder = cls.reopen(path.parent.parent, **given)
            return dataclasses.replace(folder, checkpoint=path)
        if not (path / begun).exists():
            raise ValueError(
                f"resume={output.resume!r} is no run folder: it has no {begun}. "
                "Give the folder of a run, or one of its checkpoints, or auto, or never."
            )
        return cls.reopen(path, **given)

    @classmethod
    def create(
        cls,
        root: Path | str,
        name: str,
        *,
        recipe_yaml: str | None,
        overrides: Sequence[str],
        resume: str = "never",
        may_change: MayChange = nothing,
    ) -> RunFolder:
        """Make and lock a folder for a run: `root/name`, or `name-2`, `name-3`, … if there is one.

        `resume="auto"` takes up the newest unfinished one of them instead, which must have been
        started with the same recipe but for what `may_change`; if all are finished, the newest of this
        recipe, if any.
        """
        if not re.fullmatch(r"[^./\\\0][^/\\\0]*", name):
            raise ValueError(f"Run name {name!r} is no plain folder name. Use letters, digits, _ and -.")
        if resume not in ("auto", "never"):
            raise ValueError(f"resume is {resume!r}. It must be 'auto' or 'never'.")
        path, resumed = _claim(Path(root), name, recipe_yaml, reuse=resume == "auto")
        return cls(path, resumed)._taken(recipe_yaml, overrides, may_change)

    @classmethod
    def reopen(
        cls,
        path: Path,
        *,
        recipe_yaml: str | None,
        overrides: Sequence[str],
        may_change: MayChange = nothing,
    ) -> RunFolder:
        """Lock this very folder and take it up again."""
        return cls(path, resumed=True)._taken(recipe_yaml, overrides, may_change)

    def _taken(self, recipe_yaml: str | None, overrides: Sequence[str], may_change: MayChange) -> RunFolder:
        """Locked, and described unless it is finished: then its files tell how it was made."""
        lock.lock(self.lock)
        try:
            found = check(self.recipe, recipe_yaml, may_change, finished=self.finished)
            if self.finished and not found:
                return self
            if self.finished:
                os.replace(self.summary, _free(self.summary))  # it is longer than it was
            self._describe(recipe_yaml, overrides)
            return dataclasses.replace(self, changed=tuple(found))
        except BaseException:
            self.close()
            raise

    def _describe(self, recipe_yaml: str | None, overrides: Sequence[str]) -> None:
        texts = {
            "recipe.yaml": recipe_yaml,
            "overrides.txt": "".join(f"{override}\n" for override in overrides),
            "environment.json": _json(environment()),
            "git.json": _json(git_state(Path.cwd())),
        }
        for file, text in texts.items():
            if text is not None:
                _write_keeping_old(self.path / file, text)

    @property
    def finished(self) -> bool:
        return self.summary.is_file()

    @property
    def lock(self) -> Path:
        return self.path / "lock.json"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def sample_images(self) -> Path:
        return self.path / "sample_images"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def rows(self) -> Path:
        return self.path / "rows.txt"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def write_summary(self, values: Mapping[str, Any], markdown: str) -> None:
        """`summary.json` for programs and `summary.md` for people."""
        _replace(self.path / "summary.md", markdown.rstrip("\n") + "\n")
        _replace(self.summary, _json(finite(values)))  # last: it says that the run is finished

    def close(self) -> None:
        """Give the lock back. A process that dies without it leaves a lock the next one takes over."""
        lock.unlock(self.lock)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------
# Which folder: `name`, `name-2`, `name-3`, …


def _claim(root: Path, name: str, recipe: str | None, *, reuse: bool) -> tuple[Path, bool]:
    """(folder, whether it had been there)."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output.root is {str(root)!r}, which cannot be made a folder: {error.strerror or error}. "
            "Choose another with root=…"
        ) from error
    while True:
        if reuse and (found := _to_resume(root, name, recipe)):
            return found, True
        free = (root / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
        path = next(path for path in free if not os.path.lexists(path))
        try:
            path.mkdir()  # decides between processes: only one of them can make it
        except FileExistsError:
            continue  # the other's is looked at like any other
        return path, False


def _to_resume(root: Path, name: str, recipe: str | None) -> Path | None:
    """The newest unfinished folder; else the newest finished one of this recipe."""
    folders = [path for path in _numbered(root, name) if path.name == name or _same_name(path, recipe)]
    for path in folders:
        if not RunFolder(path).finished:
            return path
    # Without a recipe on both sides nothing says that it is the same run.
    same = [path for path in folders if not changes(RunFolder(path).recipe, recipe)]
    if folders and not same:
        log.info(
            "%s is finished with other settings, so a new run begins; resume=PATH of it goes on with it if "
            "it is given more steps",
            folders[0],
        )
    return next(iter(same), None)


def _numbered(root: Path, name: str) -> list[Path]:
    """The folders that exist, the highest number first."""
    found = {}
    for path in root.iterdir():
        match = re.fullmatch(re.escape(name) + r"(?:-([2-9]|[1-9]\d+))?", path.name)
        if match and path.is_dir():
            found[int(match[1] or 1)] = path
    return [found[number] for number in sorted(found, reverse=True)]


def _same_name(folder: Path, recipe: str | None) -> bool:
    """False for `a-2` if it is no second run of `a` but one that is named `a-2`."""
    return not any(one.key in ("name", "variant") for one in changes(RunFolder(folder).recipe, recipe))


# ---------------------------------------------------------------------------------------------
# Writing


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _write_keeping_old(path: Path, text: str) -> None:
    """A run resumed with another `output` keeps both: the earlier one as `recipe.1.yaml`."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        os.replace(path, _free(path))
    _replace(path, text)


def _free(path: Path) -> Path:
    """The first of `name.1.suffix`, `name.2.suffix`, … that is not there."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())
