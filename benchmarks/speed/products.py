"""How fast linear layers are through PyTorch's own choice and through oneDNN, on this machine.

    OMP_NUM_THREADS=1 python benchmarks/speed/products.py

Float32, forwards and backwards, `models/products.py` off and on; sizes are those of the tiny policy, of the
model of `compare.py` and of its head. Medians in turns. Results go to benchmarks/results/products.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from driving import ROOT, about
from torch import Tensor
from torch.nn import functional as F

from reflectvlm.models.products import LEAST, available, fast_linear

SIZES = [
    (16, 128, 128),
    (64, 128, 128),
    (128, 128, 384),
    (128, 384, 128),
    (6000, 128, 384),
    (800, 256, 1024),
    (256, 256, 4096),
]
"""Rows, inputs, outputs."""


def seconds(linear: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    """There and back once."""
    start = time.perf_counter()
    made = linear(x, weight)
    torch.autograd.grad(made, (x, weight), torch.ones_like(made))
    return time.perf_counter() - start


def measured(rows: int, inputs: int, outputs: int, repeats: int) -> dict[str, float]:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    x.requires_grad_()
    weight.requires_grad_()
    found: dict[str, list[float]] = {"own": [], "oneDNN": []}
    for number in range(repeats + 3):
        for name, linear in (("own", F.linear), ("oneDNN", fast_linear)):
            took = seconds(linear, x, weight)
            if number >= 3:  # the first ones warm up
                found[name].append(took)
    return {name: statistics.median(values) * 1e3 for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    if not available():
        raise SystemExit("No AVX-512 here, or PyTorch without oneDNN: linear layers keep PyTorch's choice.")
    rows = [{"size": size, **measured(*size, args.repeats)} for size in SIZES]
    command = "python benchmarks/speed/products.py"
    told = about("", []) | {
        "command": command,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    results = ROOT / "benchmarks" / "results"
    (results / "products.json").write_text(json.dumps({"about": told, "sizes": rows}, indent=1) + "\n")
    (results / "products.md").write_text(page(told, rows))
    print(page(told, rows))


def page(told: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    where = f"{told['machine']}, {told['threads']} threads, torch {told['torch']}, commit {told['commit']}"
    what = "Milliseconds there and back, float32, medians in turns. Below"
    table = ["| rows x inputs x outputs | own | oneDNN | times faster |", "|---|---:|---:|---:|"]
    for row in rows:
        size, gain = " x ".join(map(str, row["size"])), row["own"] / row["oneDNN"]
        table.append(f"| {size} | {row['own']:.3f} | {row['oneDNN']:.3f} | {gain:.2f} |")
    head = "# Linear layers, PyTorch's own choice and oneDNN"
    rule = f"{what} {LEAST:,} multiplications a product keeps PyTorch's choice."
    return "\n\n".join([head, f"`{told['command']}`, {where}.", rule, "\n".join(table)]) + "\n"


if __name__ == "__main__":
    main()
