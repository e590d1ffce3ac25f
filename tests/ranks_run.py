"""One process of runs that several share; started by test_ranks.py and test_launch.py.

    python ranks_run.py FOLDER RUN ...

RUN is `trainer:kind` with trainer sft, grpo, brpo (with COPY), lora or half, and kind as in `Compute`, and
perhaps `:key=value` for settings; `name:` in front of it does it with a mistake, one of MUTATIONS.
Environment as torchrun sets it; without it there is one process.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.ending import exit_with
from reflectvlm.models.lora import LoRA
from reflectvlm.models.qwen_vl import load_policy
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.train.compute import Compute
from reflectvlm.train.cursor import place_at
from reflectvlm.train.optim import AdamW
from reflectvlm.train.runtime import Runtime
from reflectvlm.train.update import Updater
from reflectvlm.train.weights import Shared
from training import small_brpo_copy, small_rl, small_sft

OUTPUT = ("save_every", "eval_every", "resume")
TAGS = ("<REFLECTION>", "</REFLECTION>")


def lora(root: Path, **settings: Any) -> Any:
    """GRPO of adapters and the rows of new tags, whose reference is the policy without them."""
    policy = load_policy("tiny", lora=LoRA(rank=4), new_tags=TAGS)
    return small_rl(root, policy=policy, **settings)


def half(root: Path, **settings: Any) -> Any:
    """Weights in bfloat16, which cannot take so small a step; float32 ones beside the moments do."""
    policy = load_policy("tiny", dtype="bfloat16")
    return small_sft(root, policy=policy, **settings | {"optimizer": AdamW(lr=1e-6, weight_decay=0.0)})


MAKERS = {"sft": small_sft, "grpo": small_rl, "brpo": small_brpo_copy, "lora": lora, "half": half}


def trainer(root: Path, which: str, kind: str, **given: Any) -> Any:
    """A small trainer whose rows at odd positions show no image: with two processes all rows of one."""
    supervised = which in ("sft", "half")
    data: Any = DigitTraces(data=Digits(size=12)) if supervised else Digits(size=12)
    rows = [data[place] for place in range(12)]
    for position in range(1, 12, 2):
        at = place_at(12, position, 0)
        rows[at] = dataclasses.replace(rows[at], images=())
    chosen: dict[str, Any] = {
        "data": rows,
        "compute": Compute(kind=kind, offload_optimizer=bool(given.pop("offload", 0))),  # type: ignore[arg-type]
        "steps": 3,
        # A large eps makes a step a smooth function of the gradient: rounding stays rounding.
        "optimizer": AdamW(lr=1e-3, eps=1e-3),
        "micro_tokens": 150,
    }
    chosen |= {"rows_per_step": 4} if supervised else {"prompts_per_step": 4, "updates_per_step": 1}
    output = {name: given.pop(name) for name in OUTPUT if name in given}
    return MAKERS[which](root, output=output, **chosen | given)


def averaged(patch: pytest.MonkeyPatch) -> None:
    """Gradients are averaged over processes, as a library does by itself."""
    real = Shared.step

    def step(self: Shared) -> float:
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad /= self.ranks.world
        return real(self)

    patch.setattr(Shared, "step", step)


def own_counts(patch: pytest.MonkeyPatch) -> None:
    """A loss is divided by the counts of its own process."""
    plain = {"tokens": float, "sequences": float}
    patch.setattr(Runtime, "sum", lambda _, values: {name: plain[name](values[name]) for name in values})


def own_places(patch: pytest.MonkeyPatch) -> None:
    """A rollout's random numbers come of its place in its own process."""
    real = InProcessEngine.groups

    def groups(self: InProcessEngine, *asked: Any, **named: Any) -> Any:
        return real(self, *asked, **named | {"places": None})

    patch.setattr(InProcessEngine, "groups", groups)


def unopened(patch: pytest.MonkeyPatch) -> None:
    """No pass through all layers before those of an update."""
    real = Updater._touch

    def touch(self: Updater, images: bool, *, last: bool = False) -> bool:
        return real(self, images, last=True) if last else images

    patch.setattr(Updater, "_touch", touch)


MUTATIONS = {one.__name__: one for one in (averaged, own_counts, own_places, unopened)}


def main(folder: str, *runs: str) -> int:
    torch.set_num_threads(1)
    for run in runs:
        which, kind, *settings = run.split(":")
        if which in MUTATIONS:
            patch = pytest.MonkeyPatch()
            MUTATIONS[which](patch)
            try:
                main(str(Path(folder) / which), ":".join([kind, *settings]))
            finally:
                patch.undo()
            continue
        pairs = (one.split("=") for one in settings)
        given = {name: int(value) if value.isdigit() else value for name, value in pairs}
        made = trainer(Path(folder) / f"{which}-{kind}", which, kind, **given)
        if code := made.run().exit_code:
            return int(code)
        if made.runtime.device != torch.device("cpu"):  # cpu:0 is another one: what "moves" there is copied
            print(f"The device is {made.runtime.device}: weights left the memory that DeepSpeed shares.")
            return 1
    return 0


if __name__ == "__main__":
    exit_with(lambda: main(*sys.argv[1:]))
