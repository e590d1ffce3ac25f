"""Does RL raise held-out accuracy over its own cold start? Several seeds, mean and spread.

    python benchmarks/learning.py --jobs 2            # seeds 0 1 2 of recipe lookback_rl, two at a time
    python benchmarks/learning.py --recipe grpo --seeds 0

Each seed has its own cold start, made in the run. All figures are greedy answers to the 400 test
pages, which are made of scans that no training step has seen. Results go to benchmarks/results/<recipe>.json
and .md, with the machine and the seconds they took.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from reflectvlm import (
    Accuracy,
    Digits,
    Evaluation,
    Implicit,
    InProcessEngine,
    Rubric,
    load_policy,
    load_recipe,
)
from reflectvlm.data.instructions import instruction

HERE = Path(__file__).parent
SHOWN = ("accuracy", "back_rate", "layout_rate", "length/mean")


def base_accuracy() -> float:
    """The shipped base on the same pages, asked for a boxed answer and nothing else."""
    policy = load_policy("tiny")
    rubric = Rubric(rewards={"accuracy": Accuracy()}, weights={"accuracy": 1.0})
    evaluation = Evaluation(data=Digits(split="test", size=400), max_tokens=96)
    values, _ = evaluation(policy, InProcessEngine(policy=policy), rubric, instruction("boxed"), Implicit())
    return values["accuracy"]


def run(recipe: str, seed: int, overrides: list[str], root: str) -> dict[str, object]:
    started = time.perf_counter()
    trainer = load_recipe(recipe, f"seed={seed}", f"output.root={root}/seed{seed}", *overrides)
    cold = time.perf_counter() - started
    result = trainer.run()
    total = time.perf_counter() - started
    return {
        "seed": seed,
        "before": {name: result.before[name] for name in SHOWN},
        "after": {name: result.after[name] for name in SHOWN},
        "seconds_before_rl": round(cold),
        "seconds": round(total),
    }


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def table(recipe: str, rows: list[dict], about: dict) -> str:
    lines = [f"# {recipe}: {len(rows)} seeds", "", f"`{about['command']}`, {about['machine']}", ""]
    lines += [f"Base, held out: {about['base_accuracy']:.3f}", ""]
    lines += [
        "| seed | accuracy before | after | change | `<back>` rate after | valid layout after | seconds |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        before, after = row["before"], row["after"]
        lines.append(
            f"| {row['seed']} | {before['accuracy']:.3f} | {after['accuracy']:.3f} "
            f"| {after['accuracy'] - before['accuracy']:+.3f} | {after['back_rate']:.3f} "
            f"| {after['layout_rate']:.3f} | {row['seconds']} |"
        )
    columns = [spread([row[when]["accuracy"] for row in rows]) for when in ("before", "after")] + [
        spread([row["after"]["accuracy"] - row["before"]["accuracy"] for row in rows])
    ]
    columns += [spread([row["after"][name] for row in rows]) for name in ("back_rate", "layout_rate")]
    lines.append(f"| mean ± sd | {' | '.join(columns)} | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="lookback_rl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds run at one time, each on one thread")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as for `reflectvlm train`"
    )
    options = parser.parse_args()
    about = {
        "command": shlex.join(["python", "benchmarks/learning.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a seed",
        "torch": torch.__version__,
        "base_accuracy": base_accuracy(),
    }
    with tempfile.TemporaryDirectory() as root:
        os.environ["REFLECTVLM_CACHE"] = f"{root}/cache"  # every cold start is made anew
        os.environ["OMP_NUM_THREADS"] = "1"
        with ProcessPoolExecutor(options.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
            jobs = [pool.submit(run, options.recipe, seed, options.set, root) for seed in options.seeds]
            rows = [job.result() for job in jobs]
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    name = "-".join([options.recipe, *(override.replace("=", "-") for override in options.set)])
    (folder / f"{name}.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    text = table(options.recipe, rows, about)
    (folder / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
