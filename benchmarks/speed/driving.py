"""Starts sides in fresh processes and environments, and hears what they measured."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workload import Work

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NEEDS_MEMORY = ("can't allocate memory", "MemoryError", "out of memory", "bad_alloc")


class SideFailed(RuntimeError):
    """A side ended without a result."""

    def __init__(self, name: str, why: str, *, memory: bool = False) -> None:
        # Paths are this machine's alone.
        why = re.sub(r" \(/\S*", "", why)
        self.why, self.memory = why, memory
        super().__init__(f"{name}: {why}")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to do the work: a script, the Python that runs it, and the script's settings."""

    name: str
    script: str
    python: Path = Path(sys.executable)
    settings: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How long and how large a process may become."""

    repeats: int = 3
    seconds: float = 1e9
    """No further repeat begins once so many are spent."""
    limit: float = 1800.0
    """After so many seconds the process is ended."""
    memory: int = 0
    """MB of data beyond which allocations fail; 0 is no limit."""


def run(side: Side, model: Path, work: Work, bounds: Bounds) -> dict[str, Any]:
    """One process of a side, from its start to its result. Raises SideFailed with its last words."""
    command = [str(side.python), str(HERE / side.script), "--model", str(model), "--work", work.write()]
    command += ["--repeats", str(bounds.repeats), "--seconds", str(bounds.seconds)]
    command += ["--threads", str(side.threads), "--memory", str(bounds.memory)]
    command += ["--settings", json.dumps(dict(side.settings))]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")} | dict(side.environment)
    if side.threads:  # before the process starts, because some libraries look only then
        environment["OMP_NUM_THREADS"] = str(side.threads)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=bounds.limit, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SideFailed(side.name, f"no result within {bounds.limit:.0f} s") from error
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return result | {"name": side.name}
    said = [line for line in done.stderr.strip().splitlines() if line.strip()]
    words = said[-1:] or [f"exit status {done.returncode}, nothing said"]
    killed = done.returncode in (-9, 137)
    short = killed or any(word in done.stderr for word in NEEDS_MEMORY)
    raise SideFailed(side.name, " ".join(words)[-400:], memory=short)


def trl_python(given: Path | None, cache: Path) -> Path:
    """The Python of TRL's environment: the given one, else one that is made here once."""
    if given is not None:
        if not given.exists():
            raise SystemExit(f"--trl-python {given} does not exist. Name the python of an environment.")
        return given
    folder = cache / "trl"
    python, ready = folder / "bin" / "python", folder / ".ready"
    wanted = (HERE / "trl-requirements.txt").read_text(encoding="utf-8")
    if not ready.exists() or ready.read_text(encoding="utf-8") != wanted:
        print(f"making TRL's environment in {folder}: several gigabytes, once", flush=True)
        venv.create(folder, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, "-r", str(HERE / "trl-requirements.txt")], check=True)
        ready.write_text(wanted, encoding="utf-8")
    return python


def can_run_ours(python: Path) -> bool:
    """True if our library can be imported there."""
    names = "AdamW, InProcessEngine, KL, RLTrainer, load_policy"
    command = [str(python), "-c", f"from reflectvlm import {names}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return not subprocess.run(command, env=environment, capture_output=True, check=False).returncode


# -- where it was measured --------------------------------------------------------------------------


def about(model: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Who measured what and where. The command is without this machine's folders, which change nothing."""
    words = list(arguments)
    for name in ("--trl-python", "--cache", "--out"):
        if name in words:
            del words[words.index(name) : words.index(name) + 2]
    return {
        "command": shlex.join(["python", "benchmarks/speed/compare.py", *words]),
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {memory_of_machine() / 1000:.0f} GB",
        "commit": _commit(),
        "model": model,
    }


def memory_of_machine(kind: str = "MemTotal") -> float:
    """MB; "MemAvailable" is what could be had now."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def _commit() -> str:
    program = shutil.which("git")
    if program is None:
        return "unknown"

    def git(*words: str) -> str:
        done = subprocess.run([program, "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (" and changes" if git("status", "--porcelain") else "")
