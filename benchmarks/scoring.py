"""How long it takes to score a file of 10,000 predictions, hostile rows among them: results/scoring.md.

    python benchmarks/scoring.py            # 10,000 rows, of which 1 in 50 is hostile

Rows are made, not collected: numbers, options, formulas that need sympy, words, replies without a box, and
texts that are meant to hang a grader. Every row is another question, so that no verdict is remembered from
a row before. The clock runs around `reflectvlm score FILE`, a process of its own: reading, both graders,
intervals and table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
LIMIT = 60.0
"""Seconds that 10,000 rows may take on two cores."""
HOSTILE: Sequence[Callable[[int], str]] = (
    lambda n: f"{n}**9**9**9",
    lambda n: f"{n}^{{9^{{9^{{9}}}}}}",
    lambda n: f"{n}999999!",
    lambda n: f"9**{n}9999999",
    lambda n: "(" * (100_000 + n),
    lambda n: "{" * (1_000 + n) + "}" * (1_000 + n),
    lambda n: "[" * (50_000 + n) + "]" * (50_000 + n),
    lambda n: "\\frac{" * 300 + str(n),
    lambda n: f"__import__('os').system('echo {n}')",
    lambda n: "\\boxed{" * 20_000 + str(n),
    lambda n: "x" * 1_500 + str(n),
    lambda n: "9" * 1_900 + str(n),
)


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """The same rows for the same seed."""
    rng = random.Random(seed)
    return [_row(n, rng) for n in range(count)]


def _row(n: int, rng: random.Random) -> dict[str, Any]:
    if n % 50 == 7:
        gold = f"{n}\\sqrt{{3}}"
        text = f"so \\boxed{{{HOSTILE[n // 50 % len(HOSTILE)](n)}}}"
    else:
        gold, reply = _KINDS[n % len(_KINDS)](n, rng)
        text = f"<think>{'It says so. ' * rng.randrange(5, 60)}</think> {reply}"
    return {"id": str(n), "number": 0, "question": f"Question {n}?", "answer": gold, "text": text}


def _number(n: int, rng: random.Random) -> tuple[str, str]:
    return str(n), f"\\boxed{{{n + rng.choice((0, 0, 1))}}}"


def _decimal(n: int, rng: random.Random) -> tuple[str, str]:
    return f"{n}.5", f"\\boxed{{\\frac{{{2 * n + rng.choice((1, 2))}}}{{2}}}}"


def _option(n: int, rng: random.Random) -> tuple[str, str]:
    return "ABCDE"[n // 7 % 5], f"\\boxed{{{rng.choice('ABCDE')}}}"


def _unboxed(n: int, rng: random.Random) -> tuple[str, str]:
    return "ABCDE"[n // 7 % 5], f"I think it is {rng.choice('ABCDE')}."


def _root(n: int, rng: random.Random) -> tuple[str, str]:
    return f"{n}\\sqrt{{3}}", f"\\boxed{{\\frac{{{2 * n}\\sqrt{{{rng.choice((3, 5))}}}}}{{2}}}}"


def _formula(n: int, rng: random.Random) -> tuple[str, str]:
    return f"{n}x+1", f"\\boxed{{1+{n}{rng.choice('xy')}}}"


def _word(n: int, rng: random.Random) -> tuple[str, str]:
    return f"the {n}th house", f"\\boxed{{The {n + rng.choice((0, 1))}th house.}}"


_KINDS = (_number, _decimal, _option, _unboxed, _root, _formula, _word)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    asked.add_argument("--rows", type=int, default=10_000)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--keep", type=Path, help="write the file of predictions here too")
    given = asked.parse_args()
    made = rows(given.rows, given.seed)
    with tempfile.TemporaryDirectory() as folder:
        file = given.keep or Path(folder) / "predictions-made.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        found = timed(file, Path(folder) / "out")
    text = told(made, found, given.seed)
    print(text)
    if given.rows >= 10_000:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "scoring.md").write_text(text)


def timed(file: Path, out: Path) -> dict[str, Any]:
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        sys.executable,
        "-m",
        "reflectvlm",
        "score",
        str(file),
        "scorers=lookback,strict",
        f"out={out}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    scores = json.loads(next(out.glob("scores-*.json")).read_text())
    return {"seconds": seconds, "cpu": cpu, "scores": scores, "bytes": file.stat().st_size}


def told(made: Sequence[dict[str, Any]], found: dict[str, Any], seed: int) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hostile = len(range(7, len(made), 50))
    lines = [
        "# Scoring a file of predictions",
        "",
        f"`python benchmarks/scoring.py --rows {len(made)} --seed {seed}` on {cores} cores: {len(made):,} "
        f"replies ({found['bytes'] / 2**20:.0f} MiB), {hostile} of them hostile, by "
        "`reflectvlm score FILE scorers=lookback,strict` from start to exit.",
        "",
        "| what | |",
        "| --- | ---: |",
        f"| seconds | {found['seconds']:.1f} |",
        f"| seconds of CPU, all processes | {found['cpu']:.1f} |",
        f"| limit | {LIMIT:.0f} |",
        f"| rows on which the two differ | {found['scores']['differing']:,} |",
    ]
    for name, figures in found["scores"]["scorers"].items():
        value = figures["values"]["accuracy"]
        lines.append(f"| {name}: accuracy in per cent | {100 * value:.2f} |")
        lines.append(f"| {name}: not scored, its grader was killed | {figures['unscored']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
