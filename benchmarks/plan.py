"""`reflectvlm plan` against what steps really take: peak bytes of live tensors, measured and predicted.

    python benchmarks/plan.py                            # all cases, some minutes; benchmarks/results/plan.md
    python benchmarks/plan.py --only tiny                # those of one model
    python benchmarks/plan.py --compute zero2 --processes 2 --only tiny

Each case runs two real steps in a process of its own. On a CPU PyTorch's profiler reports every allocation
of tensors, on a GPU its allocator counts them; what Python and libraries hold is in neither, and the
prediction leaves it out too (context and fragments are for a card's whole memory). With several processes the
first one is measured, over whole steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plan_cases import Case, cases, measured, policy_of

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.planning import Compute, Moment, peak, predict
from reflectvlm.planning.measured import Watch
from reflectvlm.train.compute import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CACHE = HERE.parent / ".bench"
MARK = "MEASURED "
MB = 1e6
ALLOWED = 0.15
BUCKET = 100_000
"""Of several processes: the usual one would be larger than the tiny model and hide what is shared."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose model or name holds this")
    parser.add_argument("--compute", choices=KINDS, default="single")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results/plan, with the setting's name unless it is single")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    compute = None
    if args.compute != "single":
        compute = Compute(kind=args.compute, world=args.processes, bucket=BUCKET)
    if args.case is not None:
        print(MARK + json.dumps(one(cases()[args.case], compute)))
        return 0
    chosen = [i for i, case in enumerate(cases()) if args.only in f"{case.model} {case.name}"]
    found = []
    for number in chosen:
        found.append(fresh(number, args.compute, args.processes))
        print(line(found[-1]), flush=True)
    out = args.out or RESULTS / ("plan" if compute is None else f"plan_{args.compute}")
    text = page(found, args.compute, args.processes)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(abs(error(row)) > ALLOWED for row in found))


def one(case: Case, compute: Compute | None) -> dict[str, Any]:
    """Measured and predicted bytes of a case, in this process."""
    torch.manual_seed(0)
    return compared(case, partial(policy_of, case, CACHE), compute, Watch())


def compared(case: Case, make: Callable[[], QwenVL], compute: Compute | None, watch: Watch) -> dict[str, Any]:
    """The same of the policy that `make` makes, as `watch` sees it."""
    job, real = measured(case, make, compute, watch)
    without = dataclasses.replace(job, training=dataclasses.replace(job.training, bare=True))
    moments = predict(without)
    return {
        "model": case.model,
        "case": case.name,
        "measured": max(real.values()),
        "predicted": peak(moments).total,
        "at": peak(moments).name,
        "parts": dict(peak(moments).parts),
        "phases": {
            phase: {"measured": value, "predicted": of_phase(moments, phase)} for phase, value in real.items()
        },
    }


def of_phase(moments: Sequence[Moment], phase: str) -> float:
    """The optimiser's step is a part of an update."""
    names = {"update": ("update", "step"), "step": tuple({moment.phase for moment in moments})}
    return max((m.total for m in moments if m.phase in names.get(phase, (phase,))), default=0.0)


def error(row: Mapping[str, Any]) -> float:
    return float(row["predicted"] / row["measured"] - 1)


# -- processes ----------------------------------------------------------------------------------------


def fresh(number: int, kind: str, processes: int) -> dict[str, Any]:
    """What a process of its own measured, or the first of several."""
    with socket.socket() as one_port:
        one_port.bind(("127.0.0.1", 0))
        port = one_port.getsockname()[1]
    started = []
    for rank in range(processes):
        joined = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        words = ["--case", str(number), "--compute", kind, "--processes", str(processes)]
        started.append(
            subprocess.Popen(
                [sys.executable, __file__, *words],
                env=os.environ | (joined if processes > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate() for process in started]
    out, err = said[0]
    for text in out.splitlines():
        if text.startswith(MARK):
            found: dict[str, Any] = json.loads(text.removeprefix(MARK))
            return found
    raise SystemExit(f"Case {number} of {cases()[number].model} failed:\n{err[-3000:]}")


# -- the page -----------------------------------------------------------------------------------------


def line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['model']:5} {row['case']:40} measured {row['measured'] / MB:8.1f} MB, "
        f"predicted {row['predicted'] / MB:8.1f} ({100 * error(row):+.1f} %)"
    )


def page(rows: Sequence[Mapping[str, Any]], kind: str, processes: int) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    words = "" if kind == "single" else f" --compute {kind} --processes {processes}"
    worst = max((abs(error(row)) for row in rows), default=0.0)
    head = (
        "# `reflectvlm plan`: predicted and measured memory\n\n"
        f"`python benchmarks/plan.py{words}`, {device}, torch {torch.__version__}, "
        f"python {platform.python_version()}.\n\n"
        "Peak MB of live tensors over two steps, the rows of each as long as the prediction is told. "
        f"The largest error of a total is {100 * worst:.1f} %.\n\n"
    )
    columns = "| model | step | measured | predicted | error | fullest at | by phase |\n"
    rule = "|---|---|---:|---:|---:|---|---|\n"
    return head + columns + rule + "".join(map(_row, rows))


def _row(row: Mapping[str, Any]) -> str:
    phases = ", ".join(
        f"{phase} {100 * (each['predicted'] / each['measured'] - 1):+.0f} %"
        for phase, each in row["phases"].items()
        if each["predicted"]
    )
    return (
        f"| {row['model']} | {row['case']} | {row['measured'] / MB:.1f} | {row['predicted'] / MB:.1f} | "
        f"{100 * error(row):+.1f} % | {row['at']} | {phases} |\n"
    )


if __name__ == "__main__":
    sys.exit(main())
