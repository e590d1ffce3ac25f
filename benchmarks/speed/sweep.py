"""How cost grows with visual tokens, group size, answer length and prompts a step: ours and TRL.

One quantity varies at a time around a base that is small enough for the whole sweep to end in less than
half an hour. Where TRL runs out of memory with all rows in one pass it gets fewer rows a pass, and the
table says so; where nothing helps, the table says that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plots
import tables
from driving import Bounds, Side, SideFailed, about, memory_of_machine, run
from tune import fastest
from workload import Work

BASE = Work(pixels=224, group=4, tokens=64)
AXES: dict[str, list[Work]] = {
    "visual tokens": [dataclasses.replace(BASE, pixels=pixels) for pixels in (224, 336, 448, 672, 1008)],
    "G": [dataclasses.replace(BASE, group=group) for group in (2, 4, 8, 16)],
    "answer tokens": [dataclasses.replace(BASE, tokens=tokens) for tokens in (64, 128, 256, 512, 1024)],
    "prompts a step": [dataclasses.replace(BASE, prompts=prompts) for prompts in (1, 2, 4)],
}


def value(axis: str, work: Work) -> int:
    return {
        "visual tokens": work.visual_tokens,
        "G": work.group,
        "answer tokens": work.tokens,
        "prompts a step": work.prompts,
    }[axis]


def planned(tiny: bool) -> Iterator[tuple[str, Work]]:
    for axis, works in AXES.items():
        for work in works[:2] if tiny else works:
            yield axis, dataclasses.replace(work, tokens=work.tokens // 16) if tiny else work


def sweep(args: argparse.Namespace, model: Path, python: Path | None, line: str) -> None:
    """Measures all points and writes them down after each, so that a stop loses nothing."""
    # A step of a minute need not be repeated: its noise is far below what the curves show.
    bounds = Bounds(repeats=args.repeats, seconds=15, memory=int(0.95 * memory_of_machine("MemAvailable")))
    points: list[dict[str, Any]] = []
    found = {
        "about": about(line, sys.argv[1:])
        | {
            "base": BASE.told(),
            "repeats": args.repeats,
            "memory limit, MB": bounds.memory,
        },
        "points": points,
    }
    done: dict[Work, dict[str, Any]] = {}
    for axis, work in planned(args.tiny):
        if work not in done:
            done[work] = point(args, model, python, work, bounds)
        points.append({"axis": axis, "value": value(axis, work)} | done[work])
        print(f"{axis}: " + tables.scaling(found).splitlines()[-1], flush=True)
        (args.out / "speed_scaling.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (args.out / "speed_scaling.md").write_text(tables.scaling(found), encoding="utf-8")
    plots.scaling(found, args.out / "speed_scaling.png")


def point(
    args: argparse.Namespace, model: Path, python: Path | None, work: Work, bounds: Bounds
) -> dict[str, Any]:
    """Both sides at one work: what they measured, or why they did not."""
    made: dict[str, Any] = {"work": dataclasses.asdict(work), "runs": {}, "failed": {}, "note": ""}
    ours = Side(name=tables.BASE, script="ours.py", threads=args.threads)
    try:
        made["runs"][tables.BASE] = run(ours, model, work, bounds)
    except SideFailed as error:
        made["failed"][tables.BASE] = said(error, bounds)
    if python is None:
        made["failed"][tables.YARDSTICK] = "left out"
        return made
    settings = fastest(args.out / "speed_tuning.json")
    rows = min(int(settings.get("rows") or work.rollouts), work.rollouts)
    while rows >= 1:
        trl = Side(
            name=tables.YARDSTICK,
            script="trl_side.py",
            python=python,
            settings=settings | {"rows": rows},
            threads=args.threads,
        )
        try:
            made["runs"][tables.YARDSTICK] = run(trl, model, work, bounds)
            break
        except SideFailed as error:
            made["failed"][tables.YARDSTICK] = said(error, bounds)
            if not error.memory:
                break
        rows //= 2
        made["note"] = f"TRL with {rows} of {work.rollouts} rows a pass: more need too much memory"
    else:
        made["note"] = ""
    tables.check_same_work(list(made["runs"].values()), work.sampled)
    return made


def said(error: SideFailed, bounds: Bounds) -> str:
    return f"needs more than {bounds.memory} MB" if error.memory else error.why
