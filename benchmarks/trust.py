"""What trust costs: the guards around a step, and a save, on the embedded default.

    OMP_NUM_THREADS=1 python benchmarks/trust.py

Steps of `lookback_rl` (tiny policy, 16 prompts x 8 rollouts) are timed three ways in turn: the trainer's
step alone; the same through the run's loop, which can give a step up, counts what is not finite and logs;
and the same just after a save was begun, while its thread writes. The difference of the first two is paid
at every step, that of the last two once a save. How long a save stops training is set against a plain copy
of the same tensors. Writes benchmarks/results/trust.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reflectvlm import load_recipe
from reflectvlm.train import keeping
from reflectvlm.train.checkpoint import CheckpointStore
from reflectvlm.train.keeper import Keeper
from reflectvlm.train.loop import _Loop
from reflectvlm.train.run_folder import RunFolder
from reflectvlm.train.saver import Saver
from reflectvlm.train.signals import StopRequest

RESULTS = Path(__file__).parent / "results"
SAVE_EVERY = 50  # the recipes' own


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    asked.add_argument("--repeats", type=int, default=7)
    asked.add_argument("--steps", type=int, default=4, help="steps of one measurement")
    given = asked.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    with tempfile.TemporaryDirectory() as root:
        found = measured(Path(root), given.repeats, given.steps)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "trust.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "trust.md").write_text(told(found))
    print(told(found))


def measured(root: Path, repeats: int, steps: int) -> dict[str, Any]:
    times, stops, copies, saves = of_a_run(root, repeats, steps)
    large = [_gigabyte(root / f"large-{number}", number % 2 == 0) for number in range(7)]
    alone, looped, saving = (statistics.median(times[name]) for name in times)
    each = [b / a - 1 for a, b in zip(times["alone"], times["in the loop"], strict=True)]
    save = steps * (saving - looped) + statistics.median(stops)
    return {
        "steps": steps,
        "repeats": repeats,
        "seconds of a step alone": alone,
        "seconds of a step in the loop": looped,
        "seconds of a step while saving": saving,
        "guards, share of a step": looped / alone - 1,
        "guards, share of a step, each": each,
        "seconds a save costs": save,
        "seconds training stops for a save": statistics.median(stops),
        "seconds of a plain copy": statistics.median(copies),
        "seconds until a save is on the disk": statistics.median(saves),
        "seconds training stops for a gigabyte": statistics.median(one for one, _ in large),
        "seconds of a plain copy of a gigabyte": statistics.median(one for _, one in large),
        "save every": SAVE_EVERY,
        "saves, share of a step": save / SAVE_EVERY / alone,
        "machine": _machine(),
    }


def of_a_run(
    root: Path, repeats: int, steps: int, *overrides: str
) -> tuple[dict[str, list[float]], list[float], list[float], list[float]]:
    """Seconds of steps in each way; for which a save stops training; of a plain copy; of a whole save."""
    fixed = ("start_from=null", "test=null", "eval_every=0", "steps=100000", f"root={root}")
    trainer = load_recipe("lookback_rl", *fixed, *overrides)
    output = trainer.output
    with RunFolder.open(trainer.name, output, "checkpoints") as folder, StopRequest() as stop:
        loop = _Loop(trainer, folder, stop, trainer.name)
        trainer.prepare()
        loop.keeper = Keeper(trainer, folder, loop.now, loop.jsonl.sizes)
        ways: dict[str, Callable[[], None]] = {
            "alone": lambda: _bare_step(trainer),
            "in the loop": lambda: _same_step(loop),
        }
        for way in ways.values():
            way()  # warm
        times: dict[str, list[float]] = {name: [] for name in (*ways, "while saving")}
        stops, copies, saves = [], [], []
        for repeat in range(repeats):
            for name in list(ways)[:: 1 if repeat % 2 else -1]:
                times[name].append(_timed(ways[name], steps))
            copies.append(_copy_seconds(loop))
            loop.keeper.saver.seconds = 0.0
            begun = time.perf_counter()
            loop.keeper.save()
            stops.append(time.perf_counter() - begun)
            times["while saving"].append(_timed(ways["in the loop"], steps))
            loop.keeper.saver.wait()
            saves.append(loop.keeper.saver.seconds)
        loop.trackers.close()
    return times, stops, copies, saves


def _machine() -> str:
    threads = f"{os.environ.get('OMP_NUM_THREADS', 'all')} thread(s)"
    return f"{platform.machine()}, {os.cpu_count()} cores, {threads}"


def _bare_step(trainer: Any) -> None:
    trainer.position = 48
    trainer.step(3)


def _same_step(loop: _Loop) -> None:
    """The loop's whole step, always of the same rows."""
    loop.now.done = 3
    loop.trainer.position = 48
    loop._step()


def _timed(work: Callable[[], None], steps: int) -> float:
    begun = time.perf_counter()
    for _ in range(steps):
        work()
    return (time.perf_counter() - begun) / steps


def _copy_seconds(loop: _Loop) -> float:
    """Of the same tensors, into memory."""
    tensors, _ = keeping.snapshot(loop.trainer, loop.keeper.about, {})
    begun = time.perf_counter()
    kept = [[tensor.clone() for tensor in part.values()] for part in tensors.values()]
    copied = time.perf_counter() - begun
    del kept  # not within the time
    return copied


def _gigabyte(folder: Path, save_first: bool) -> tuple[float, float]:
    """Seconds for which a save of 64 tensors of 16 MiB stops its caller, and seconds of a plain copy."""
    tensors = {f"w{number}": torch.rand(2**22) for number in range(64)}
    saver = Saver(CheckpointStore(folder))
    took = {}
    for name in ("save", "copy") if save_first else ("copy", "save"):
        begun = time.perf_counter()
        if name == "save":
            saver.save(1, tensors={"model": tensors}, state={})
        else:
            kept = [tensor.clone() for tensor in tensors.values()]
        took[name] = time.perf_counter() - begun
        saver.wait()
    del kept
    shutil.rmtree(folder)
    return took["save"], took["copy"]


def told(found: dict[str, Any]) -> str:
    spread = [f"{100 * one:+.1f}" for one in sorted(found["guards, share of a step, each"])]
    lines = [
        (
            "guards of a step (giving up, counting, logging)",
            f"{100 * found['guards, share of a step']:+.2f} %",
        ),
        (f"a save every {SAVE_EVERY} steps", f"{100 * found['saves, share of a step']:+.2f} %"),
        (
            "**both together**",
            f"**{100 * (found['guards, share of a step'] + found['saves, share of a step']):+.2f} %**",
        ),
        ("a save stops training for", f"{1000 * found['seconds training stops for a save']:.1f} ms"),
        ("a plain copy of the same tensors takes", f"{1000 * found['seconds of a plain copy']:.1f} ms"),
        (
            "the same two for a gigabyte of tensors",
            f"{1000 * found['seconds training stops for a gigabyte']:.0f} and "
            f"{1000 * found['seconds of a plain copy of a gigabyte']:.0f} ms",
        ),
        ("a save is on the disk after", f"{1000 * found['seconds until a save is on the disk']:.0f} ms"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in lines)
    return (
        "# What trust costs on the embedded default\n\n"
        f"`OMP_NUM_THREADS=1 python benchmarks/trust.py --repeats {found['repeats']} "
        f"--steps {found['steps']}`, {found['machine']}. Shares are of a step of `lookback_rl` alone, "
        f"{found['seconds of a step alone']:.2f} s; medians.\n\n"
        f"| | |\n|---|---:|\n{table}\n\n"
        f"The guards' share in each repeat, sorted: {', '.join(spread)} %.\n"
    )


if __name__ == "__main__":
    main()
