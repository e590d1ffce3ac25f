"""The stages of the scale run; each is started by `scale.py` in a process of its own.

What they ask stands in the files beside this one: `small.py` (recipes, settings of compute, adapters,
moments), `oracles.py` (equalities), `seven_b.py` (steps of 7B). `scale.py` puts their folders on the path.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_stages import FULL, TINY, Job
from scale import ALONE
from workload import SEVEN_B, SMALL

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "bitsandbytes",
    "flash-attn",
    "triton",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not args.tiny:
        raise SystemExit("No GPU is visible to torch. Use --device cpu --tiny to try the stages on a CPU.")
    # Else a float32 convolution has the digits of TF32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    job = Job(
        out=args.out,
        stage=args.stage,
        shape=SMALL if args.tiny else SEVEN_B,
        work=TINY if args.tiny else FULL,
        device=torch.device("cuda" if gpu else "cpu"),
        dtype=torch.bfloat16,
    )
    STAGES[args.stage](job)


def machine(job: Job) -> None:
    """What the numbers belong to."""
    from driving import about

    told = about("", ())
    properties = torch.cuda.get_device_properties(0) if job.device.type == "cuda" else None
    job.say(
        "device",
        name=properties.name if properties else "CPU",
        memory=properties.total_memory if properties else None,
        cuda=torch.version.cuda,
        host=told["machine"],
        commit=told["commit"],
        python=platform.python_version(),
        versions={name: version_of(name) for name in PACKAGES},
        tiny=job.work == TINY,
    )


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def attempt(job: Job, what: str, name: str, call: Callable[[], dict[str, Any]]) -> None:
    """One result, or why there is none; the next is tried either way."""
    started = time.perf_counter()
    try:
        found: dict[str, Any] = {"ok": True, **call()}
    except Exception:  # noqa: BLE001 - one that fails must not hide the others
        found = {"ok": False, "error": traceback.format_exc()[-1500:]}
    job.say(what, name=name, took=round(time.perf_counter() - started, 1), **found)


def recipes(job: Job) -> None:
    from small import each_recipe

    for name, call in each_recipe(job.device):
        attempt(job, "recipe", name, call)


def oracles(job: Job) -> None:
    from oracles import test_suite

    for name, call in test_suite(job.device, job.work == TINY):
        attempt(job, "oracle", name, call)


def rounding(job: Job) -> None:
    from gpu_checks import say_whether
    from oracles import rounded

    for name, check in rounded(job.device, job.work == TINY):
        say_whether(name, check, job.say)


def compute(job: Job) -> None:
    from small import each_setting

    for name, call in each_setting(job.device):
        attempt(job, "setting", name, call)


def seven_b(job: Job, *, case: str) -> None:
    from seven_b import steps

    attempt(job, "7B", case, partial(steps, job, case))


STAGES: dict[str, Callable[[Job], None]] = {
    "machine": machine,
    "recipes": recipes,
    "oracles": oracles,
    "rounding": rounding,
    "compute": compute,
} | {name: partial(seven_b, case=name) for name in ALONE}


if __name__ == "__main__":
    main()
