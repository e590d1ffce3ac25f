"""Every long test at once, with a table of what was run, how often, from which seed, and what came of it.

    python benchmarks/torture.py                              # what `make torture` does
    python benchmarks/torture.py --kills 6 --examples 20000 --name try   # a short one

Runs `pytest -m torture`: kills at every call of a save, random kills over SFT, GRPO and BRPO with COPY, runs
cut off at every step, a hundred resumes, readers beside a writer, and the fuzzing of tags, answers and rows.
The table goes to benchmarks/results/torture.json and .md, with machine, versions and commit, also when a test
fails; the exit code is pytest's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

RAW = argparse.RawDescriptionHelpFormatter  # the text above as it is written
HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pillow", "hypothesis", "pytest")
PLAIN = ("number", "seed")
"""Properties of a test with a column of their own."""


def run(options: argparse.Namespace, report: Path) -> int:
    """pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "-m", "torture", *options.rest]
    # The other form of the report warns of a test's properties, and a warning is an error here.
    command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
    command += ["-n", str(options.jobs), "--dist", "worksteal"] if options.jobs > 1 else []
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "REFLECTVLM_KILLS": str(options.kills),
        "REFLECTVLM_FUZZ_EXAMPLES": str(options.examples),
    }
    return subprocess.run(command, cwd=HERE.parent, env=environment, check=False).returncode


def rows_of(report: Path) -> list[dict[str, Any]]:
    """One row a test, in the order of their names."""
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  pytest has just written it
        found = {one.get("name", ""): one.get("value", "") for one in case.iter("property")}
        failed = [one.tag for one in case if one.tag in ("failure", "error", "skipped")]
        file = case.get("classname", "").rpartition(".")[2]
        rows.append(
            {
                "case": f"{file}::{case.get('name')}",
                **{name: found.pop(name, "") for name in PLAIN},
                "seconds": round(float(case.get("time", 0)), 1),
                "result": failed[0] if failed else "passed",
                "details": found,
            }
        )
    return sorted(rows, key=lambda row: row["case"])


def about(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    words = [f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]
    return {
        "command": shlex.join(["python", *words]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.jobs} processes",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "minutes": round(seconds / 60, 1),
    }


def commit() -> str:
    """The revision, and whether files differ from it; a run before a commit can only name the one before."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "../src", "../tests", "../recipes")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" and later changes" if changed else "")


def table(rows: list[dict[str, Any]], said: dict[str, Any]) -> str:
    passed = sum(row["result"] == "passed" for row in rows)
    versions = ", ".join(f"{name} {number}" for name, number in said["versions"].items())
    lines = [f"# The long tests: {passed} of {len(rows)} passed in {said['minutes']} minutes", ""]
    lines += [
        f"`{said['command']}`, {said['date']}, commit {said['commit']}, {said['machine']};",
        f"{versions}.",
    ]
    lines += ["", "| case | number | seed | seconds | result | |", "|---|---:|---:|---:|---|---|"]
    for row in rows:
        details = ", ".join(f"{name}: {value}" for name, value in row["details"].items())
        number = f"{int(row['number']):,}" if row["number"] else ""
        cells = (f"`{row['case']}`", number, row["seed"], row["seconds"], row["result"], details)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    examples = sum(
        int(row["number"]) for row in rows if "test_a_million_examples" in row["case"] and row["number"]
    )
    kills = sum(int(row["number"]) for row in rows if "random_kills" in row["case"] and row["number"])
    return "\n".join([*lines, "", f"Together {kills:,} random kills and {examples:,} fuzzed examples.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--kills", type=int, default=200, help="random kills, over the three kinds of runs")
    parser.add_argument("--examples", type=int, default=1_000_000, help="fuzzed examples, over all targets")
    parser.add_argument("--jobs", type=int, default=2, help="processes at one time, each on one thread")
    parser.add_argument("--name", default="torture")
    parser.add_argument("rest", nargs="*", help="further arguments of pytest, behind --")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = run(options, report)
        rows = rows_of(report)
    said = about(options, time.monotonic() - started)
    results = HERE / "results"
    (results / f"{options.name}.json").write_text(json.dumps({**said, "rows": rows}, indent=1) + "\n")
    text = table(rows, said)
    (results / f"{options.name}.md").write_text(text)
    print(text)
    sys.exit(code)


if __name__ == "__main__":
    main()
