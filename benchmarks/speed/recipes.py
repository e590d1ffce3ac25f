"""How much faster the recipes' own steps have become: this tree against an older commit, in turns.

    python benchmarks/speed/recipes.py --before 008840d

Every measurement is a fresh process that takes the first steps of a recipe, both trees with the same rows
and random numbers; lookback_rl from its cold start, which each tree makes once, qwen_la_brpo from the base,
because its stages take minutes. Median seconds of a step after the first, and the ratio in each round. With
`--processes 2` this tree is also measured as `train … processes=2` runs it. As on the command line, threads
that wait sleep (GOMP_SPINCOUNT=0). Results go to benchmarks/results/speed_recipes.{json,md}.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from driving import ROOT, about

RECIPES = ("lookback_rl", "grpo", "qwen_la_brpo", "lookback_sft", "qwen_la_coldstart", "tiny_base")
FROM_BASE = ("qwen_la_brpo",)
STEPS = """
import sys, time
from reflectvlm.config import load_recipe
recipe, steps, *overrides = sys.argv[1:]
trainer = load_recipe(recipe, *overrides)
trainer.prepare()
seconds = []
for step in range(int(steps) + 1):
    start = time.perf_counter()
    trainer.step(step)
    seconds.append(time.perf_counter() - start)
if trainer.ranks.first if hasattr(trainer, "ranks") else True:
    print(seconds[1:])
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, help="commit to compare with")
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="measure this tree with so many as well")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        before = archived(args.before, Path(folder))
        for recipe in args.recipes:
            row: dict[str, Any] = {"recipe": recipe, "before": [], "now": [], "several": []}
            for _ in range(args.rounds):
                row["before"].append(step_seconds(before, recipe, args.steps))
                row["now"].append(step_seconds(ROOT, recipe, args.steps))
                if args.processes > 1:
                    row["several"].append(step_seconds(ROOT, recipe, args.steps, args.processes))
            rows.append(row)
            print(line(row), flush=True)
    command = " ".join(["python benchmarks/speed/recipes.py", *sys.argv[1:]])
    told = about("The tiny policy", []) | {
        "command": command,
        "before": args.before,
        "processes": args.processes,
    }
    found = {"about": told, "recipes": rows}
    results = ROOT / "benchmarks" / "results"
    (results / "speed_recipes.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (results / "speed_recipes.md").write_text(page(found), encoding="utf-8")


def archived(commit: str, folder: Path) -> Path:
    """The tree of a commit, in a folder."""
    command = ["git", "archive", commit]
    made = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def step_seconds(tree: Path, recipe: str, steps: int, processes: int = 1) -> float:
    """Median of the steps of one fresh process, or of several that share them."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    environment.setdefault("GOMP_SPINCOUNT", "0")
    overrides = ["start_from=null"] if recipe in FROM_BASE else []
    command = [sys.executable, "-c", STEPS, recipe, str(steps), *overrides]
    started = [
        subprocess.Popen(
            command,
            cwd=tree,
            env=environment | (_rank(rank, processes) if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(processes)
    ]
    told = [one.communicate()[0] for one in started]
    assert all(one.returncode == 0 for one in started), f"{recipe}: {told}"
    return statistics.median(json.loads(told[0].splitlines()[-1]))


def _rank(rank: int, processes: int) -> dict[str, str]:
    """What the launcher says to each process."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29631",
        "REFLECTVLM_CPU": "1",
        "OMP_NUM_THREADS": str(threads),
    }


def line(row: dict[str, Any]) -> str:
    told = f"| {row['recipe']} | {statistics.median(row['before']):.3f} |"
    for name in ("now", "several"):
        if row[name]:
            told += f" {statistics.median(row[name]):.3f} | {_faster(row['before'], row[name])} |"
    return told


def _faster(before: list[float], now: list[float]) -> str:
    ratios = [old / new for old, new in zip(before, now, strict=True)]
    ratio = statistics.median(before) / statistics.median(now)
    return f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def page(found: dict[str, Any]) -> str:
    told = found["about"]
    made = f"`{told['command']}`, {told['machine']}, commit {told['commit']}; before is {told['before']}."
    what = "Median seconds of a step; ratio of the medians, in brackets the lowest and highest of the rounds."
    head = "| recipe | before, s | now, s | times faster |"
    if told["processes"] > 1:
        head += f" now, {told['processes']} processes, s | times faster |"
    table = [head, "|---" + "|---:" * (head.count("|") - 2) + "|"]
    table += [line(row) for row in found["recipes"]]
    return "\n\n".join(["# The recipes' steps, before and now", made, what, "\n".join(table)]) + "\n"


if __name__ == "__main__":
    main()
