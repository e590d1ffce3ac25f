"""Speed side by side on this machine: ours, TRL's GRPOTrainer, plain transformers generate.

    python benchmarks/speed/compare.py                  # the comparison: speed.{json,md,png}
    python benchmarks/speed/compare.py --tune           # what was tried for each side: speed_tuning.{json,md}
    python benchmarks/speed/compare.py --sweep          # how cost grows: speed_scaling.{json,md,png}
    python benchmarks/speed/compare.py --without trl    # what runs here without several gigabytes more

The files go to benchmarks/results/, or to --out.
All sides load the same random weights and get the same pages, question, lengths, group size and dtype; a
step of each samples the same number of tokens, and the comparison fails if one did not. They take turns in
fresh processes. TRL lives in an environment of its own, which is made once in .bench/ (several gigabytes);
--trl-python names one that exists. If our library can be imported there, it is also measured on TRL's
torch. The comparison uses for TRL what --tune found fastest, if that was run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import plots
import tables
from driving import ROOT, Bounds, Side, about, can_run_ours, run, trl_python
from sweep import sweep
from tune import fastest, tune
from workload import SMALL, Shape, Work, write_model

RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    args = arguments().parse_args()
    shape = SMALL if args.tiny else Shape()
    if args.tiny:
        args.work = Work(pixels=112, group=4, tokens=8)
    model = made_model(args.cache, shape)
    python = None if "trl" in args.without else trl_python(args.trl_python, args.cache)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tune:
        tune(args, model, python, model_line(shape))
    elif args.sweep:
        sweep(args, model, python, model_line(shape))
    else:
        compare(args, model, python, model_line(shape))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tune", action="store_true", help="try settings of each side")
    what.add_argument("--sweep", action="store_true", help="one quantity at a time, ours and TRL")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of one process")
    parser.add_argument("--threads", type=int, default=0, help="0 is torch's own choice")
    parser.add_argument("--work", type=Work.read, default=Work(), help="JSON of what is not as usual")
    parser.add_argument("--without", nargs="*", default=[], choices=["trl", "transformers"])
    parser.add_argument("--trl-python", type=Path, help="python of an environment with trl and torchvision")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench", help="for environments and models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="a model and a work of seconds, to try this out")
    return parser


def made_model(cache: Path, shape: Shape) -> Path:
    from reflectvlm.models.tiny import pretrained_tiny

    return write_model(cache / f"model-{shape.width}-{shape.vocabulary}", shape, pretrained_tiny())


def model_line(shape: Shape) -> str:
    return (
        f"A random Qwen2.5-VL, language {shape.layers} x {shape.width}, vision {shape.vision_layers} x "
        f"{shape.vision_width}, vocabulary {shape.vocabulary:,}, float32"
    )


def compare(args: argparse.Namespace, model: Path, python: Path | None, line: str) -> None:
    sides, notes = the_sides(args, python)
    bounds = Bounds(repeats=args.repeats)
    runs: list[dict[str, Any]] = []
    for number in range(args.rounds):
        for side in sides:
            runs.append(run(side, model, args.work, bounds) | {"round": number})
            print(f"round {number + 1}: {side.name}: {told(runs[-1])}", flush=True)
            tables.check_same_work(runs, args.work.sampled)
    left_out = {"trl": tables.YARDSTICK, "transformers": "transformers generate"}
    found = {
        "about": about(line, sys.argv[1:])
        | {
            "work": args.work.told(),
            "rounds": args.rounds,
            "repeats": args.repeats,
            "without": [left_out[name] for name in args.without],
            "notes": notes,
        },
        "summary": tables.summary(runs),
        "runs": runs,
    }
    (args.out / "speed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (args.out / "speed.md").write_text(tables.comparison(found), encoding="utf-8")
    plots.comparison(found, args.out / "speed.png")
    print(tables.comparison(found))


def the_sides(args: argparse.Namespace, python: Path | None) -> tuple[list[Side], list[str]]:
    """Who takes part, and what is to be said about who does not."""
    sides = [Side(name=tables.BASE, script="ours.py", threads=args.threads)]
    notes = []
    if python is not None:
        settings = fastest(args.out / "speed_tuning.json")
        sides.append(
            Side(
                name=tables.YARDSTICK,
                script="trl_side.py",
                python=python,
                settings=settings,
                threads=args.threads,
            )
        )
        if can_run_ours(python):
            sides.append(Side(name=tables.SAME_TORCH, script="ours.py", python=python, threads=args.threads))
        else:
            notes.append("Our library cannot be imported in TRL's environment, so its torch was not tried.")
    if "transformers" not in args.without:
        sides.append(Side(name="transformers generate", script="transformers_side.py", threads=args.threads))
    return sides, notes


def told(found: dict[str, Any]) -> str:
    values = next(iter(tables.summary([found]).values()))
    parts = [f"{name} {values[name][0]:.3f} s" for name in ("rollout", "update") if name in values]
    return ", ".join([*parts, f"peak {found['peak']:.0f} MB"])


if __name__ == "__main__":
    main()
