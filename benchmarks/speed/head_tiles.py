"""How large a tile of logits should be: the head alone, forwards and backwards, against the plain way.

    python benchmarks/speed/head_tiles.py                          # results/head_tiles.{json,md}
    python benchmarks/speed/head_tiles.py --tokens 512 --width 256

Time of log-probs and entropies of some tokens over a whole vocabulary with their gradients: by tiles of so
many columns, as the library chooses, and by `ops.token_scores`, which holds all logits of a chunk. Repeats
take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from compare import RESULTS
from driving import about
from measure import timed
from tables import number

from reflectvlm import ops
from reflectvlm.head import fused_token_scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(args.tokens, args.width, device=device, requires_grad=True)
    weight = (0.05 * torch.randn(args.vocabulary, args.width, device=device)).requires_grad_()
    targets = torch.randint(args.vocabulary, (args.tokens,), device=device)
    ways: dict[str, Callable[..., Any]] = {"plain": ops.token_scores, "by device": fused_token_scores}
    for tile in (1024, 2048, 4096, 8192, 16_384, 32_768, args.vocabulary):
        ways[f"{tile:,}"] = partial(fused_token_scores, tile=tile)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(args.repeats + 1):  # the first one warms up
        for name, way in ways.items():
            taken = timed(lambda way=way: there_and_back(way, hidden, weight, targets))  # type: ignore[misc]
            if repeat:
                seconds[name].append(taken)
    told(args, seconds, device)


def there_and_back(way: Callable[..., Any], hidden: Any, weight: Any, targets: Any) -> None:
    logprobs, _ = way(hidden, weight, targets)
    torch.autograd.grad(logprobs.sum(), (hidden, weight))


def told(args: argparse.Namespace, seconds: dict[str, list[float]], device: str) -> None:
    found = about("", sys.argv[1:]) | {"seconds": seconds}
    found["command"] = found["command"].replace("compare.py", "head_tiles.py")
    lines = [
        "# Tiles of the head",
        "",
        f"`{found['command']}`, {found['machine']}, {device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, commit {found['commit']}.",
        "",
        f"{args.tokens} tokens, width {args.width}, vocabulary {args.vocabulary:,}, float32, forwards and "
        f"backwards; medians of {args.repeats} repeats that took turns.",
        "",
        "| columns of a tile | ms | lowest | highest |",
        "|---|---:|---:|---:|",
    ]
    for name, each in seconds.items():
        values = [1000 * one for one in (statistics.median(each), min(each), max(each))]
        lines.append(f"| {name} | " + " | ".join(number(value) for value in values) + " |")
    (RESULTS / "head_tiles.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "head_tiles.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
