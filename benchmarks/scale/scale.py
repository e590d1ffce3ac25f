"""Scale on one GPU, unattended: one command, under eight minutes, nothing lost if a part of it dies.

    bash benchmarks/scale/gpu_scale.sh                        # on the GPU
    bash benchmarks/scale/gpu_scale.sh --device cpu --tiny    # all stages at sizes of seconds

README.md in this folder says what is asked and what the machine must have.
Every stage is a process of its own with a time limit, and writes each result into gpu.jsonl in --out as soon
as it has it. What is asked of tiny models runs side by side; then 7B steps, one case after the other, alone
on the device. At the end (or by --summary) scale.md has the page and scale.json all results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
FOLDERS = [str(HERE), str(HERE.parent), str(HERE.parent / "speed"), str(HERE.parent.parent / "tests")]
"""Where the stages find what they share with other benchmarks, and the test suite's oracles."""
sys.path += FOLDERS

TOGETHER = {"machine": 60, "recipes": 170, "oracles": 170, "rounding": 170, "compute": 170}
"""Seconds each may take. Tiny models: whether they are right is asked, not how long they take."""
ALONE = {
    "lora": 90,
    "lora_checkpointing": 60,
    "whole_checkpointing": 75,
    "whole": 60,
    "whole_8bit": 75,
    "whole_zero": 110,
}
"""7B, in the order of what is missed most if time runs out (`seven_b.CASES`)."""
STAGES = TOGETHER | ALONE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "gpu_scale")
    parser.add_argument("--seconds", type=float, default=440, help="for all stages together")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--summary", action="store_true", help="only write the page from gpu.jsonl")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        if not args.tiny:
            parser.error("--device cpu takes --tiny: 7B steps are for a GPU.")
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "REFLECTVLM_CPU": "1"}
    if not args.summary:
        run_all(args)
    from scale_table import page

    told = (args.out / "gpu.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in told]
    (args.out / "scale.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    (args.out / "scale.md").write_text(page(lines), encoding="utf-8")
    print(page(lines))


def run_all(args: argparse.Namespace) -> None:
    """Those side by side, then the others."""
    from gpu import run

    begun = time.monotonic()
    os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])
    (args.out / "gpu.jsonl").unlink(missing_ok=True)

    def one(stage: str) -> None:
        left = args.seconds - (time.monotonic() - begun)
        limit, script = min(STAGES[stage], left), HERE / "scale_stages.py"
        run(stage, limit, args.out, args.tiny, script=script, log=f"{stage}.log")

    # On a CPU they would take the cores from one another.
    with ThreadPoolExecutor(len(TOGETHER) if args.device == "cuda" else 1) as pool:
        list(pool.map(one, [stage for stage in args.stages if stage in TOGETHER]))
    for stage in (stage for stage in args.stages if stage in ALONE):
        one(stage)
    logs = [file for stage in args.stages if (file := args.out / f"{stage}.log").exists()]
    (args.out / "gpu.log").write_text("".join(file.read_text(errors="replace") for file in logs))
    for file in logs:
        file.unlink()


if __name__ == "__main__":
    main()
