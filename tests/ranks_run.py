"""One process of runs that several share; started by test_ranks.py and test_launch.py.

    python ranks_run.py FOLDER RUN ...

RUN is `trainer:kind` with trainer sft, grpo or brpo (with COPY) and kind as in `Compute`, and perhaps
`:key=value` for settings. Environment as torchrun sets it; without it there is one process.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.train.compute import Compute
from reflectvlm.train.cursor import place_at
from reflectvlm.train.optim import AdamW
from training import small_brpo_copy, small_rl, small_sft

MAKERS = {"sft": small_sft, "grpo": small_rl, "brpo": small_brpo_copy}
OUTPUT = ("save_every", "eval_every", "resume")


def trainer(root: Path, which: str, kind: str, **given: Any) -> Any:
    """A small trainer whose rows at odd positions show no image: with two processes all rows of one."""
    data: Any = Digits(size=12) if which != "sft" else DigitTraces(data=Digits(size=12))
    rows = [data[place] for place in range(12)]
    for position in range(1, 12, 2):
        at = place_at(12, position, 0)
        rows[at] = dataclasses.replace(rows[at], images=())
    chosen: dict[str, Any] = {
        "data": rows,
        "compute": Compute(kind=kind),  # type: ignore[arg-type]
        "steps": 3,
        # A large eps makes a step a smooth function of the gradient: rounding stays rounding.
        "optimizer": AdamW(lr=1e-3, eps=1e-3),
        "micro_tokens": 150,
    }
    chosen |= {"rows_per_step": 4} if which == "sft" else {"prompts_per_step": 4, "updates_per_step": 1}
    output = {name: given.pop(name) for name in OUTPUT if name in given}
    return MAKERS[which](root, output=output, **chosen | given)


def main(folder: str, *runs: str) -> int:
    torch.set_num_threads(1)
    for run in runs:
        which, kind, *settings = run.split(":")
        pairs = (one.split("=") for one in settings)
        given = {name: int(value) if value.isdigit() else value for name, value in pairs}
        code = trainer(Path(folder) / f"{which}-{kind}", which, kind, **given).run().exit_code
        if code:
            return int(code)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
