"""What tiny models are asked on this device: does every recipe take steps in bfloat16, does ZeRO with one
process equal no ZeRO, do adapters and 8-bit moments train.

Overrides under which a recipe is small, trainers and the comparison of two runs are the test suite's own.
"""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from reflectvlm.config import compose, load_recipe
from reflectvlm.models.lora import LoRA
from reflectvlm.models.qwen_vl import QwenVL, load_policy
from reflectvlm.models.tiny import random_tiny, tiny_folder
from reflectvlm.recipe_files import recipes
from reflectvlm.train.compute import Compute
from reflectvlm.train.distill import Distiller
from reflectvlm.train.optim import AdamW
from reflectvlm.types import SamplingParams

Found = dict[str, Any]
Attempt = tuple[str, Callable[[], Found]]
STEPS = 2
EQUAL = 1e-4
"""Largest difference of a weight or moment after three steps in float32. Processes of a CPU agree to 1e-6; a
GPU adds in no fixed order."""

LOUD = SamplingParams(max_tokens=8, temperature=2.0)
"""The trained tiny policy's answers differ, and so do their rewards."""


# -- recipes ------------------------------------------------------------------------------------------


def each_recipe(device: torch.device) -> Iterator[Attempt]:
    with tempfile.TemporaryDirectory() as folder:
        tiny_folder(Path(folder) / "tiny")
        for name in sorted(recipes()):
            yield name, partial(takes_steps, name, Path(folder), device)


def takes_steps(name: str, folder: Path, device: torch.device) -> Found:
    """Two steps; a distillation answers its rows."""
    from test_recipes import SMALL
    from training import rubric

    words, numbers = in_halves(name, SMALL[name], folder / "tiny")
    made = load_recipe(name, *words, f"root={folder / name}", f"seed={0}")
    if numbers == "bfloat16 products, set in Python":  # a policy without settings
        made = dataclasses.replace(made, policy=dataclasses.replace(made.policy, compute="bfloat16"))
    if isinstance(made, Distiller):
        asked = made.run().tally.asked
        assert asked == 3, f"{asked} of 3 rows were asked"
        found: Found = {"asked": asked}
    else:
        made = dataclasses.replace(made, rubric=rubric())  # a random policy earns no reward of its own
        made.prepare()
        losses = [made.step(number).metrics["loss"] for number in range(STEPS)]
        assert all(map(math.isfinite, losses)), f"losses {losses}"
        assert made.updates >= STEPS, f"{made.updates} updates in {STEPS} steps"
        found = {"losses": losses, "updates": made.updates}
    at, dtype = made.policy.device, str(made.policy.model.dtype).removeprefix("torch.")
    assert at.type == device.type, f"the policy is on {at}"
    assert dtype == "bfloat16" or made.policy.compute == "bfloat16", f"weights are {dtype}"
    return found | {"numbers": numbers}


def in_halves(name: str, words: tuple[str, ...], tiny: Path) -> tuple[tuple[str, ...], str]:
    """Overrides for bfloat16, and which they are: the tiny recipes with weights in it, those of 7B as their
    own policy says, with float32 weights and products in it."""
    if "policy=" not in words[0]:
        return words, "bfloat16 products, set in Python"
    words = (*words, f"policy.path='{tiny}'")
    if "dtype" in compose(name, words).values["policy"] and not name.endswith("_7b"):
        return (*words, "policy.dtype=bfloat16"), "bfloat16 weights"
    return (*words, "+policy.compute=bfloat16"), "bfloat16 products"


# -- settings of compute, adapters, moments ------------------------------------------------------------

SPREAD: Mapping[str, Compute] = {
    "zero1": Compute(kind="zero1"),
    "zero2": Compute(kind="zero2"),
    "zero3": Compute(kind="zero3"),
    "zero2, moments on the host": Compute(kind="zero2", offload_optimizer=True),
    "zero3, moments and weights on the host": Compute(
        kind="zero3", offload_optimizer=True, offload_parameters=True
    ),
}

HARDEST = ("zero3", "zero2, moments on the host")
"""Asked of every trainer; the others of GRPO alone."""


def each_setting(device: torch.device) -> Iterator[Attempt]:
    """With one process each."""
    alone_as_a_rank()
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        for which in ("grpo", "brpo", "sft", "lora"):
            if which == "lora" and find_spec("peft") is None:
                yield which, partial(absent, "peft")
                continue
            yield f"{which}: single", partial(ran, folder, which, "single", Compute(kind="single"), device)
            for name, compute in SPREAD.items():
                if which != "grpo" and name not in HARDEST:
                    continue
                if find_spec("deepspeed") is None:
                    yield f"{which}: {name}", partial(absent, "deepspeed")
                    continue
                yield f"{which}: {name}", partial(equals_single, folder, which, name, compute, device)
        for name, compute in SPREAD.items():
            if find_spec("deepspeed") is not None and "host" not in name:
                half = partial(ran, folder, "grpo", f"{name}, bfloat16", compute, device, half=True)
                yield f"grpo: {name}, bfloat16 weights", half
        for name, call in adapters(folder, device):
            yield name, call


def alone_as_a_rank() -> None:
    """What a launcher says in the environment, for a process that is the only one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= one | {"MASTER_PORT": str(port)}


def absent(package: str) -> Found:
    return {"ok": None, "skipped": f"{package} is not installed"}


def ran(
    folder: Path, which: str, name: str, compute: Compute, device: torch.device, *, half: bool = False
) -> Found:
    """Three steps of the trainer with which processes are compared."""
    from ranks_run import trainer

    given: Found = {"policy": in_bfloat16(random_tiny())} if half else {}
    made = trainer(folder / f"{which}-{name}", which, "single", compute=compute, save_every=3, **given)
    code = made.run().exit_code
    assert code == 0, f"exit code {code}"
    assert made.policy.device.type == device.type, f"the policy is on {made.policy.device}"
    return {"updates": made.updates}


def in_bfloat16(policy: QwenVL) -> QwenVL:
    policy.model.to(torch.bfloat16)
    return policy


def equals_single(folder: Path, which: str, name: str, compute: Compute, device: torch.device) -> Found:
    """Weights and moments of both runs' checkpoints."""
    from test_ranks import differences

    found = ran(folder, which, name, compute, device)
    one, other = folder / f"{which}-single", folder / f"{which}-{name}"
    gaps = {part: differences(one, other, part) for part in ("model", "optimizer")}
    return found | {"gaps": gaps, "ok": max(gaps.values()) < EQUAL}


def adapters(folder: Path, device: torch.device) -> Iterator[Attempt]:
    """Adapters on a bfloat16 base, on one in 4 and in 8 bits, and moments in 8 bits."""
    from training import small_rl

    def trained(name: str, needs: str, **changes: Any) -> Found:
        if find_spec(needs) is None:
            return absent(needs)
        settings = changes.pop("policy_settings", {})
        policy = load_policy("tiny", **settings)
        changes |= {"policy": policy, "steps": STEPS, "output": {"checks": False}, "sampling": LOUD}
        made = small_rl(folder / name, **changes)
        trains = {key: p for key, p in policy.module.named_parameters() if p.requires_grad}
        before = {key: p.detach().to(device, copy=True) for key, p in trains.items()}
        code = made.run().exit_code
        assert code == 0, f"exit code {code}"
        moved = sum(not torch.equal(p, before[key]) for key, p in trains.items())
        assert moved, "no weight has moved"
        return {"updates": made.updates, "moved": moved}

    lora: Found = {"dtype": "bfloat16", "compute": "bfloat16", "lora": LoRA(rank=8)}
    yield "LoRA", partial(trained, "lora", "peft", policy_settings=lora)
    for bits in ("nf4", "int8"):
        quantized = partial(trained, bits, "bitsandbytes", policy_settings=lora | {"quantize": bits})
        yield f"LoRA on {bits}", quantized
    eight = AdamW(lr=1e-3, bits=8)
    yield "AdamW, moments in 8 bits", partial(trained, "bits", "bitsandbytes", optimizer=eight)
