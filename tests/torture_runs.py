"""Runs that are cut off again and again, and the unbroken one that each of them has to equal."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import load_file

from training import logged

HERE = Path(__file__).parent
KINDS = {"small_sft": "sft", "small_rl": "rl", "small_brpo_copy": "brpo"}
"""A function of `training`, and what it calls its folder."""
KILLED = -9


class Forks:
    """Starts runs as children of a process that has imported everything already (`torture_server.py`)."""

    def __init__(self) -> None:
        source = HERE.parent / "src"
        paths = [str(HERE), os.environ.get("PYTHONPATH") or str(source)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "torture_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self._answer() == {"ready": True, "threads": 1}

    def run(self, kind: str, root: Path, steps: int, **request: Any) -> dict[str, Any]:
        """Its exit code (-9 if killed, 3 if it crashed where it should) and its seconds."""
        assert self.process.stdin is not None
        line = json.dumps({"kind": kind, "root": str(root), "steps": steps, **request})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def finish(self, kind: str, root: Path, steps: int, **request: Any) -> float:
        """A run that has to come to its end. Its seconds."""
        found = self.run(kind, root, steps, **request)
        assert found["code"] == 0, (root / "log.txt").read_text()[-4000:]
        return float(found["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server has died"
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate(timeout=60)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves but times: metrics, samples, results, weights bit by bit."""
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "metrics": logged(folder),
        "samples": (folder / "samples.jsonl").read_text(),
        "summary": {key: summary[key] for key in ("before", "after", "steps")},
        "weights": {
            name: value.numpy().tobytes()
            for name, value in load_file(folder / "model" / "model.safetensors").items()
        },
    }


def assert_same(cut: Path, whole: Path) -> None:
    one, two = outcome(cut), outcome(whole)
    for part, value in two.items():
        assert one[part] == value, f"{part} of {cut} differs from {whole}"
    odd = set(files(cut)) ^ set(files(whole))
    assert not odd, f"in only one of {cut} and {whole}: {sorted(odd)}"


def files(folder: Path) -> list[str]:
    """What is in a run's folder, without event files, of which every start makes one."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if "events.out.tfevents" not in name)


def kill_and_compare(
    forks: Forks, kind: str, folder: Path, *, steps: int, kills: int, seed: int
) -> dict[str, Any]:
    """Kills runs of `kind` at random times, from start-up to the last file of the end, until `kills` have
    met a living process. A run is started again until it ends; each end is compared with the unbroken one."""
    dice, done, ends = random.Random(f"{seed} {kind}"), 0, 0
    whole = folder / "whole"
    length = forks.finish(kind, whole, steps)
    while done < kills:
        cut = folder / f"cut-{ends}"
        here = min(kills - done, dice.randint(1, 5))
        """Kills of this one run."""
        while here:
            found = forks.run(kind, cut, steps, kill_after=dice.uniform(0.0, length))
            assert found["code"] in (0, KILLED), (cut / "log.txt").read_text()[-4000:]
            if found["code"] == 0:
                break
            here, done = here - 1, done + 1
        forks.finish(kind, cut, steps)
        assert_same(cut / KINDS[kind], whole / KINDS[kind])
        ends += 1
    return {"kills": done, "runs": ends, "seed": seed, "seconds of one run": round(length, 2)}
