"""Speed on one GPU, unattended: one command, under ten minutes, nothing lost if a part of it dies.

    bash benchmarks/speed/gpu.sh              # 7B sizes, random weights made on the GPU
    bash benchmarks/speed/gpu.sh --tiny       # all stages at sizes of seconds, on a CPU too

README.md in this folder says what is measured and what the machine must have.
Every stage is a process of its own with a time limit, and writes each result into gpu.jsonl in --out as soon
as it has it. What stages print goes to gpu.log. At the end (or by --summary) gpu.md sets results against
targets.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STAGES = {
    "machine": 60,
    "checks": 140,
    "decode": 120,
    "update": 130,
    "transformers": 110,
    "trl": 170,
}
"""Seconds each may take, in the order of what is missed most if time runs out."""
LEAST = 20
"""With fewer seconds left no stage begins."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "gpu")
    parser.add_argument("--seconds", type=float, default=560, help="for all stages together")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--summary", action="store_true", help="only write gpu.md from gpu.jsonl")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.summary:
        begun = time.monotonic()
        (args.out / "gpu.jsonl").unlink(missing_ok=True)
        for stage in args.stages:
            left = args.seconds - (time.monotonic() - begun)
            run(stage, min(STAGES[stage], left), args.out, args.tiny)
    from gpu_table import page

    lines = (args.out / "gpu.jsonl").read_text(encoding="utf-8").splitlines()
    text = page([json.loads(line) for line in lines])
    (args.out / "gpu.md").write_text(text, encoding="utf-8")
    print(text)


def run(
    stage: str, limit: float, out: Path, tiny: bool, *, script: Path | None = None, log: str = "gpu.log"
) -> None:
    """One stage with all that it starts; how it ended is a result too."""
    if limit < LEAST:
        say(out, stage, "end", skipped=f"{limit:.0f} s left")
        return
    command = [sys.executable, str(script or HERE / "gpu_stages.py"), stage, "--out", str(out)]
    started = time.monotonic()
    with (out / log).open("a", encoding="utf-8") as file:
        file.write(f"== {stage}\n")
        file.flush()
        process = subprocess.Popen(
            [*command, *(["--tiny"] if tiny else [])], stdout=file, stderr=file, start_new_session=True
        )
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "time limit"
    taken = round(time.monotonic() - started, 1)
    say(out, stage, "end", status=code, seconds=taken)
    print(f"{stage}: {code}, {taken} s", flush=True)


def say(out: Path, stage: str, what: str, **values: Any) -> None:
    """One result, on the disk when this returns."""
    with (out / "gpu.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, "what": what} | values) + "\n")
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
