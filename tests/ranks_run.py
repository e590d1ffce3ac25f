"""One process of a run that several share; started by test_ranks.py.

    python ranks_run.py TRAINER KIND FOLDER [KEY=NUMBER ...]

TRAINER is sft, grpo or brpo (with COPY). Environment as torchrun sets it; without it there is one process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.train.compute import Compute
from reflectvlm.train.optim import AdamW
from reflectvlm.types import Sample
from training import small_brpo_copy, small_rl, small_sft

MAKERS = {"sft": small_sft, "grpo": small_rl, "brpo": small_brpo_copy}


def settings(which: str, kind: str, **given: int) -> dict[str, Any]:
    """Four rows a step, of which those of odd positions show no image: with two processes all of one's."""
    rows = [Digits(size=12)[i] for i in range(12)]
    if which == "sft":
        rows = [DigitTraces(data=Digits(size=12))[i] for i in range(12)]
    chosen: dict[str, Any] = {
        "data": rows,
        "compute": Compute(kind=kind),  # type: ignore[arg-type]
        "steps": 3,
        # A large eps makes a step a smooth function of the gradient: rounding stays rounding.
        "optimizer": AdamW(lr=1e-3, eps=1e-3),
        "micro_tokens": 150,
    }
    chosen |= {"rows_per_step": 4} if which == "sft" else {"prompts_per_step": 4, "updates_per_step": 1}
    return chosen | given


def blind(sample: Sample) -> Sample:
    return Sample(id=sample.id, question=sample.question, answer=sample.answer, columns=sample.columns)


def main(which: str, kind: str, folder: str, *given: str) -> int:
    torch.set_num_threads(1)
    numbers = {name: int(value) for name, value in (one.split("=") for one in given)}
    output = {name: numbers.pop(name) for name in ("save_every", "eval_every") if name in numbers}
    output |= {"resume": "auto"} if numbers.pop("resume", 0) else {}
    blinded = numbers.pop("blind", 0)
    chosen = settings(which, kind, **numbers)
    if blinded:
        from reflectvlm.train.cursor import place_at

        rows = chosen["data"]
        for position in range(1, len(rows), 2):
            at = place_at(len(rows), position, 0)
            rows[at] = blind(rows[at])
    made = MAKERS[which](Path(folder), output=output, **chosen).run()
    return made.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
