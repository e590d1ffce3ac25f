"""One folder a run: what was asked for, on which machine and code, and all that came of it.

    runs/<name>/  recipe.yaml overrides.txt environment.json git.json
                  metrics.jsonl samples.jsonl tensorboard/ checkpoints/ model/
                  curves.png summary.json summary.md

No environment variable and no remote address is recorded: both may hold secrets. The lock works
between processes of one POSIX machine; across machines that share a disk it can only refuse.
A run is finished once its `summary.json` is there.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from reflectvlm.train.trackers import finite

PACKAGES = (
    "reflectvlm",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "deepspeed",
    "flash-attn",
    "hydra-core",
    "math-verify",
    "numpy",
    "pillow",
    "safetensors",
    "torchvision",
    "trl",
    "vllm",
)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, locked for this process until `close`."""

    path: Path
    resumed: bool = False
    """True: the folder existed and is taken up again."""

    @classmethod
    def create(
        cls,
        root: Path | str,
        name: str,
        *,
        recipe_yaml: str | None,
        overrides: Sequence[str],
        resume: str = "never",
    ) -> RunFolder:
        """Make and lock a folder for a run: `root/name`, or `name-2`, `name-3`, … if there is one.

        `resume="auto"` takes up the newest unfinished one of them instead, which must have been
        started with the same recipe; if all are finished, the newest of this recipe, if any.
        """
        if not re.fullmatch(r"[^./\\\0][^/\\\0]*", name):
            raise ValueError(f"Run name {name!r} is no plain folder name. Use letters, digits, _ and -.")
        if resume not in ("auto", "never"):
            raise ValueError(f"resume is {resume!r}. It must be 'auto' or 'never'.")
        path, resumed = _claim(Path(root), name, recipe_yaml, reuse=resume == "auto")
        return cls(path, resumed)._taken(recipe_yaml, overrides)

    @classmethod
    def reopen(cls, path: Path, *, recipe_yaml: str | None, overrides: Sequence[str]) -> RunFolder:
        """Lock this very folder and take it up again."""
        return cls(path, resumed=True)._taken(recipe_yaml, overrides)

    def _taken(self, recipe_yaml: str | None, overrides: Sequence[str]) -> RunFolder:
        """Locked, and described unless it is finished: then its files tell how it was made."""
        _lock(self.lock)
        try:
            if not self.finished:
                _refuse_another_recipe(self.recipe, recipe_yaml)
                self._describe(recipe_yaml, overrides)
        except BaseException:
            self.close()
            raise
        return self

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
        _unlock(self.lock)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def environment() -> dict[str, Any]:
    """Python, platform, processors, package versions and GPUs; no environment variables."""
    import torch

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    properties = [torch.cuda.get_device_properties(device) for device in devices]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "packages": versions,
        "cuda": torch.version.cuda,
        "devices": [{"name": one.name, "memory_bytes": one.total_memory} for one in properties],
    }


def git_state(folder: Path) -> dict[str, Any]:
    """Revision of the repository around `folder` and whether it has changes; None where unknown."""
    revision = _git(folder, "rev-parse", "--verify", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    return {"revision": revision, "dirty": None if changes is None else changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ---------------------------------------------------------------------------------------------
# Which folder: `name`, `name-2`, `name-3`, …


def _claim(root: Path, name: str, recipe: str | None, *, reuse: bool) -> tuple[Path, bool]:
    """(folder, whether it had been there)."""
    root.mkdir(parents=True, exist_ok=True)
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
    return next((path for path in folders if not _differences(RunFolder(path).recipe, recipe)), None)


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
    return not any(key in ("name", "variant") for key, *_ in _differences(RunFolder(folder).recipe, recipe))


def _refuse_another_recipe(recorded: Path, recipe: str | None) -> None:
    differences = _differences(recorded, recipe)
    if not differences:
        return
    shown = ", ".join(f"{key} {_cut(old)} → {_cut(new)}" for key, old, new in differences[:8])
    more = f" and {len(differences) - 8} more" if len(differences) > 8 else ""
    raise ValueError(
        f"{recorded.parent} is unfinished and was started with another recipe: {shown}{more}. "
        "Go on with the old values, start anew with resume=never, or delete that folder."
    )


def _differences(recorded: Path, recipe: str | None) -> list[tuple[str, str, str]]:
    """(key, old, new) of every setting outside of `output` that differs. Nothing is compared where
    one of the two has no recipe."""
    if recipe is None or not recorded.is_file():
        return []
    old, new = _settings(recorded.read_text(encoding="utf-8")), _settings(recipe)
    absent = "(not given)"
    pairs = [(key, old.get(key, absent), new.get(key, absent)) for key in [*old, *(new.keys() - old.keys())]]
    return sorted(pair for pair in pairs if pair[1] != pair[2])


def _settings(text: str) -> dict[str, str]:
    """Dotted key -> value as text, so that a NaN equals itself."""
    import yaml

    values = yaml.safe_load(text)
    if isinstance(values, Mapping):
        values = {key: value for key, value in values.items() if key != "output"}
    return dict(_flat(values, ""))


def _flat(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, repr(node)


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


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
        number = 1
        while (old := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        os.replace(path, old)
    _replace(path, text)


# ---------------------------------------------------------------------------------------------
# The lock: a file that names its holder, read and changed only under `flock`.


def _lock(path: Path) -> None:
    import fcntl

    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = _holder(file.read())
        if holder is not None and holder["pid"] != os.getpid() and _alive(holder):
            raise RuntimeError(
                f"{path.parent} is in use by process {holder['pid']} on {holder['host']}. Two processes "
                "must not write to one run: wait for it, stop it, or choose another name. "
                f"If that process is surely gone, delete {path}."
            )
        file.seek(0)
        file.truncate()
        pid = os.getpid()
        file.write(_json({"pid": pid, "host": socket.gethostname(), "born": _born(pid)}))


def _unlock(path: Path) -> None:
    import fcntl

    if not path.exists():
        return
    with path.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = _holder(file.read())
        # Emptied, not deleted: another process may already wait on this very file.
        if holder is not None and holder["pid"] == os.getpid():
            file.truncate(0)


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
