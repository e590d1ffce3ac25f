"""How much faster the recipes' own steps have become: this tree against an older commit, in turns.

    python benchmarks/speed/recipes.py --before 008840d

Every measurement is a fresh process that takes the first steps of a recipe, both trees with the same rows
and random numbers; lookback_rl from its cold start, which each tree makes once, qwen_la_brpo from the base,
because its stages take minutes. Median seconds of a step after the first, and the ratio in each round. As on
the command line, threads that wait sleep (GOMP_SPINCOUNT=0). Results go to
benchmarks/results/speed_recipes.{json,md}.
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
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        before = archived(args.before, Path(folder))
        for recipe in args.recipes:
            row: dict[str, Any] = {"recipe": recipe, "before": [], "now": []}
            for _ in range(args.rounds):
                row["before"].append(step_seconds(before, recipe, args.steps))
                row["now"].append(step_seconds(ROOT, recipe, args.steps))
            rows.append(row)
            print(line(row), flush=True)
    command = " ".join(["python benchmarks/speed/recipes.py", *sys.argv[1:]])
    told = about("The tiny policy", []) | {"command": command, "before": args.before}
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


def step_seconds(tree: Path, recipe: str, steps: int) -> float:
    """Median of a fresh process's steps."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    environment.setdefault("GOMP_SPINCOUNT", "0")
    overrides = ["start_from=null"] if recipe in FROM_BASE else []
    command = [sys.executable, "-c", STEPS, recipe, str(steps), *overrides]
    made = subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    return statistics.median(json.loads(made.stdout.splitlines()[-1]))


def line(row: dict[str, Any]) -> str:
    ratios = [old / new for old, new in zip(row["before"], row["now"], strict=True)]
    old, new = statistics.median(row["before"]), statistics.median(row["now"])
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"| {row['recipe']} | {old:.3f} | {new:.3f} | {old / new:.2f} ({spread}) |"


def page(found: dict[str, Any]) -> str:
    told = found["about"]
    made = f"`{told['command']}`, {told['machine']}, commit {told['commit']}; before is {told['before']}."
    what = "Median seconds of a step; ratio of the medians, in brackets the lowest and highest of the rounds."
    table = ["| recipe | before, s | now, s | times faster |", "|---|---:|---:|---:|"]
    table += [line(row) for row in found["recipes"]]
    return "\n\n".join(["# The recipes' steps, before and now", made, what, "\n".join(table)]) + "\n"


if __name__ == "__main__":
    main()
