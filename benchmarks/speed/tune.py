"""What was tried to make each side fast: one setting at a time, each in a fresh process, all written down.

Not tried, because it would change the work: `steps_per_generation` above the accumulation (several updates
on one set of rollouts), shorter dtypes. Nor vLLM and kernels from the hub: they need a GPU, or a network
during the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tables
from driving import Bounds, Side, SideFailed, about, run

PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""glibc gives freed memory back to the system and gets it again, zeroed, a page at a time."""

TRL: Mapping[str, Mapping[str, Any]] = {
    "as shipped but without gradient checkpointing, fused optimiser": {},
    "gradient checkpointing (TRL's default)": {"checkpointing": True},
    "half the rows a pass, accumulated": {"rows": "half"},
    "a quarter of the rows a pass, accumulated": {"rows": "quarter"},
    "one row a pass, accumulated": {"rows": 1},
    "optimiser not fused": {"optim": "adamw_torch"},
    "eager attention": {"attention": "eager"},
    "static cache": {"cache": "static"},
    "transformers' continuous batching": {"continuous_batching": True},
    "Liger's kernels": {"liger": True},
    "torch.compile": {"compile": True},
    "two dataloader workers": {"workers": 2},
}
TRANSFORMERS: Mapping[str, Mapping[str, Any]] = {
    "as shipped": {},
    "static cache": {"cache": "static"},
    "eager attention": {"attention": "eager"},
}


def tune(args: argparse.Namespace, model: Path, python: Path | None, line: str) -> None:
    """Runs all tries and writes them down after each, so that a stop loses nothing."""
    bounds = Bounds(repeats=args.repeats, limit=900.0)
    tries: list[dict[str, Any]] = []
    found = {
        "about": about(line, sys.argv[1:]) | {"work": args.work.told(), "repeats": args.repeats},
        "tries": tries,
    }
    for side, changed in planned(args, python):
        one: dict[str, Any] = {"side": side.name, "changed": changed, "settings": dict(side.settings)}
        one["environment"] = dict(side.environment)
        try:
            one["run"] = run(side, model, args.work, bounds)
            tables.check_same_work([one["run"]], args.work.sampled)
        except SideFailed as error:
            one["failed"] = error.why
        tries.append(one)
        print(tables.tuning(found).splitlines()[-1], flush=True)
        (args.out / "speed_tuning.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (args.out / "speed_tuning.md").write_text(tables.tuning(found), encoding="utf-8")


def planned(args: argparse.Namespace, python: Path | None) -> Iterator[tuple[Side, str]]:
    """Sides and what is changed in them, each side's plain form first."""
    scripts: dict[str, tuple[str, Mapping[str, Mapping[str, Any]], Path]]
    scripts = {"ours": ("ours.py", {"as shipped": {}}, Path(sys.executable))}
    if python is not None:
        scripts["TRL"] = ("trl_side.py", TRL, python)
    if "transformers" not in args.without:
        scripts["transformers generate"] = ("transformers_side.py", TRANSFORMERS, Path(sys.executable))
    for name, (script, settings, program) in scripts.items():
        common: dict[str, Any] = {"name": name, "script": script, "python": program}
        for changed, chosen in settings.items():
            if (meant := _rows(chosen, args.work.rollouts)) is not None:
                yield Side(**common, settings=meant, threads=args.threads), changed
        yield Side(**common, threads=1), "one thread"
        yield Side(**common, threads=args.threads, environment=PAGES), "huge pages (THP_MEM_ALLOC_ENABLE=1)"
        yield (
            Side(**common, threads=args.threads, environment=KEEP),
            "freed memory kept (MALLOC_MMAP_MAX_=0)",
        )


def _rows(settings: Mapping[str, Any], rollouts: int) -> dict[str, Any] | None:
    """Settings with "half" as a number; None where the work has too few rows for it."""
    made = dict(settings)
    share = {"half": 2, "quarter": 4}.get(made.get("rows", 0), 1)
    if rollouts % share:
        return None
    return made | ({"rows": rollouts // share} if share > 1 else {})


def fastest(file: Path) -> dict[str, Any]:
    """TRL's settings of the fastest step among the tries that need no change of the environment; none if
    nothing was tried."""
    if not file.exists():
        return {}
    tries = json.loads(file.read_text(encoding="utf-8"))["tries"]
    mine = [one for one in tries if one["side"] == "TRL" and "run" in one and not one["environment"]]
    if not mine:
        return {}
    best = min(mine, key=lambda one: tables.summary([one["run"]])["TRL"]["step"][0])
    settings: dict[str, Any] = best["settings"]
    return settings
