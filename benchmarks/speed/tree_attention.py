"""How long one layer's attention over packed rows takes, forwards and backwards, for each kind there is.

    python benchmarks/speed/tree_attention.py              # this machine, one thread; minutes
    python benchmarks/speed/tree_attention.py --device cuda --dtype bfloat16 --heads 28 4 128 --large

Groups of G answers of A tokens behind a prompt of P, several groups at a time: what `prefix_attention=auto`
times on an accelerator, and what its rule on a CPU comes from (`models/tree_choice.py`). Random numbers;
medians of repeats, the kinds one after the other. `linear` is the share of tokens that the rows beside each
other (dense) have more than the line (all others), which every linear layer pays for too. Results go to
benchmarks/results/tree_attention.json and .md.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from reflectvlm.batch import Layout
from reflectvlm.models.prefix import mask_elements
from reflectvlm.models.tree import Line, lined
from reflectvlm.models.tree_attention import Kind
from reflectvlm.models.tree_choice import DENSE_ELEMENTS, Heads, accelerator_kinds, timed

RESULTS = Path(__file__).parents[1] / "results"
RAW = argparse.RawDescriptionHelpFormatter


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Answers have `answer` tokens on average, from half to one and a half times as many."""

    groups: int
    prompt: int
    answers: int
    answer: int

    def line(self) -> Line:
        rows = self.groups * self.answers
        own = np.random.default_rng(0).integers(self.answer // 2, self.answer + self.answer // 2 + 1, rows)
        layout = Layout(
            start=np.zeros(rows, dtype=np.int64),
            length=self.prompt + own,
            prompt=np.repeat(np.arange(self.groups), self.answers),
            prompt_tokens=np.full(rows, self.prompt),
        )
        line = lined(layout, int(layout.length.max()))
        assert line is not None
        return line


def shapes(*, large: bool) -> Iterator[Shape]:
    """From the tiny policy's to those of a 7B run."""
    for groups, prompt, answers, answer in (
        (1, 30, 2, 8),
        (1, 60, 3, 16),
        (1, 60, 4, 32),
        (1, 110, 4, 32),
        (4, 60, 4, 32),
        (1, 110, 8, 48),
        (8, 110, 8, 48),
        (1, 290, 2, 64),
        (1, 290, 8, 64),
        (4, 290, 8, 64),
        (1, 290, 16, 64),
        (1, 1024, 8, 128),
    ):
        yield Shape(groups=groups, prompt=prompt, answers=answers, answer=answer)
    if large:
        yield Shape(groups=1, prompt=1100, answers=8, answer=512)
        yield Shape(groups=2, prompt=1100, answers=8, answer=1024)
        yield Shape(groups=1, prompt=4096, answers=8, answer=1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--heads", type=int, nargs=3, default=[4, 2, 64], metavar=("QUERY", "KEY", "SIZE"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--large", action="store_true", help="shapes of a 7B run as well")
    parser.add_argument("--name", default="tree_attention", help="of the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    query, key, size = args.heads
    heads = Heads(
        query=query, key=key, size=size, dtype=getattr(torch, args.dtype), device=torch.device(args.device)
    )
    kinds: tuple[Kind, ...] = ("dense", "split") if args.device == "cpu" else accelerator_kinds(heads)
    rows = [measured(shape, heads, kinds) for shape in shapes(large=args.large)]
    machine = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name()
    setting = (
        f"{machine}, {args.threads} thread{'s' * (args.threads > 1)}, torch {torch.__version__}, "
        f"{query} heads ({key} of keys) of {size}, {args.dtype}"
    )
    report = {"setting": setting, "rule": DENSE_ELEMENTS, "rows": rows}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{args.name}.md").write_text(table(setting, rows, kinds), encoding="utf-8")


def measured(shape: Shape, heads: Heads, kinds: tuple[Kind, ...]) -> dict[str, object]:
    line = shape.line()
    padded = line.rows * int(line.widths.max())
    seconds = timed(heads, line, kinds)
    row = {**asdict(shape), "mask": mask_elements(line), "linear": padded / len(line) - 1, "seconds": seconds}
    print(row, flush=True)
    return row


def table(setting: str, rows: list[dict[str, object]], kinds: tuple[Kind, ...]) -> str:
    head = ["groups", "P", "G", "A", "mask elements", "linear", *(f"{kind}, ms" for kind in kinds), "fastest"]
    lines = [
        "# Attention over packed rows",
        "",
        f"`python benchmarks/speed/tree_attention.py`, {setting}",
        "",
        "One layer, forwards and backwards; P, G, A: tokens of the prompt, answers, tokens of an answer "
        "(mean). linear: tokens that dense rows have more than a line, in every linear layer. "
        f"On a CPU `auto` takes dense up to {DENSE_ELEMENTS:,} mask elements and split above.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---:|" * len(head),
    ]
    for row in sorted(rows, key=lambda row: str(row["mask"]).zfill(12)):
        seconds = row["seconds"]
        assert isinstance(seconds, dict)
        shown = [f"{seconds[kind] * 1e3:.2f}" if kind in seconds else "-" for kind in kinds]
        cells = [row["groups"], row["prompt"], row["answers"], row["answer"], f"{row['mask']:,}"]
        cells += [f"{row['linear']:.0%}", *shown, min(seconds, key=seconds.__getitem__)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
