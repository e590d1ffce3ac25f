"""Two RL steps of a 7B model with random weights in one process: seconds and bytes, beside what
`reflectvlm plan` says.

Qwen2.5-VL-7B's own sizes, drawn on the device. 2 prompts x 8 rollouts, 1,024 visual tokens, 256 new tokens,
COPY and rewards left out; the KL term is on. Bytes are the peak of live tensors of each phase, which the plan
predicts "bare", and what the card holds in all at the end, beside the plan with context and fragments.
A case that cannot fit by the plan, or whose moments the host has no room for, is not run, and says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from driving import memory_of_machine
from gpu_stages import Job, made_model
from measure import now
from ours import never_ends
from plan import compared
from plan_cases import Case, job_of

from reflectvlm.models.loading import enable_checkpointing
from reflectvlm.models.lora import LoRA, choose_what_trains
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.planning import Adapter, Compute, Training, peak, predict
from reflectvlm.planning import Job as Planned
from reflectvlm.planning.cards import CARDS, Card, card
from reflectvlm.planning.measured import Watch
from reflectvlm.planning.seconds import seconds
from reflectvlm.planning.states import counts, held

HALF = Training(weights="bfloat16", gpu=False)
LOW_RANK = dataclasses.replace(HALF, adapter=Adapter(rank=64))
WIDE = Training(weights="float32", products="bfloat16", moments=8, checkpointing=True, gpu=False)
SHARED = Compute(kind="zero2", offload_optimizer=True)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to train 7B."""

    name: str
    training: Training
    compute: Compute | None = None
    needs: str | None = None


def again(training: Training) -> Training:
    return dataclasses.replace(training, checkpointing=True)


CASES = {
    "lora": Kind(name="LoRA of rank 64", training=LOW_RANK),
    "lora_checkpointing": Kind(name="LoRA of rank 64, checkpointing", training=again(LOW_RANK)),
    "whole_checkpointing": Kind(name="whole, bfloat16, checkpointing", training=again(HALF)),
    "whole": Kind(name="whole, bfloat16", training=HALF),
    "whole_8bit": Kind(
        name="whole, float32, 8-bit moments, checkpointing", training=WIDE, needs="bitsandbytes"
    ),
    "whole_zero": Kind(
        name="whole, zero2, moments on the host, checkpointing",
        training=again(HALF),
        compute=SHARED,
        needs="deepspeed",
    ),
}


def steps(job: Job, name: str) -> dict[str, Any]:
    """What a case took, or why it was not run."""
    from importlib.util import find_spec

    kind = CASES[name]
    if kind.needs and find_spec(kind.needs) is None:
        return {"ok": None, "case": kind.name, "skipped": f"{kind.needs} is not installed"}
    if kind.compute is not None:
        from small import alone_as_a_rank

        alone_as_a_rank()
    policy, case = policy_of(job, kind), case_of(job, kind)
    planned, on = job_of(case, policy, kind.compute), card_of(job)
    told = {"case": kind.name, "work": dataclasses.asdict(case) | {"training": None}} | said(planned, on)
    if why := hindrance(job, planned, on):
        return told | {"ok": None, "skipped": why}
    watch: Any = Timed(held=policy.module.parameters())
    started = now()
    found = compared(case, lambda: policy, kind.compute, watch)
    told |= {"measured": found["measured"], "phases": found["phases"], "predicted": found["predicted"]}
    told |= {"parts": found["parts"], "at": found["at"], "two_steps": now() - started}
    told["seconds"] = {phase: taken[-1] for phase, taken in watch.seconds.items()}
    if job.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        told |= {"reserved": torch.cuda.max_memory_reserved(), "card_used": total - free}
    return told


def case_of(job: Job, kind: Kind) -> Case:
    tiny = job.device.type == "cpu" or job.shape.layers < 28
    return Case(
        name=kind.name,
        model="7B",
        pixels=112 if tiny else 896,
        prompts=2,
        group=4 if tiny else 8,
        tokens=8 if tiny else 256,
        micro_tokens=4096,  # a whole group and its prompt
        training=kind.training,
    )


def policy_of(job: Job, kind: Kind) -> QwenVL:
    """Random weights on the device, with what trains and checkpointing as the case says."""
    training = kind.training
    drawn = dataclasses.replace(job, dtype=getattr(torch, training.weights))
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, images = made_model(drawn, Path(folder))
    lora = LoRA(rank=training.adapter.rank) if training.adapter else None
    choose_what_trains(model, (), lora=lora)
    if training.checkpointing:
        enable_checkpointing(model)
    gc.collect()
    made = QwenVL(
        model=model, tokenizer=tokenizer, image_processor=images, source="random", compute=training.products
    )
    return never_ends(made)


# -- the plan -------------------------------------------------------------------------------------------


def card_of(job: Job) -> Card:
    """By its name, with the memory that it really has."""
    if job.device.type == "cpu":
        return card("H200")
    properties = torch.cuda.get_device_properties(0)
    known = [one for key, one in CARDS.items() if key.split("-")[0].upper() in properties.name.upper()]
    like = known[-1] if known else card(f"{properties.total_memory / 2**30:.1f}GiB")
    return dataclasses.replace(like, memory=properties.total_memory)


def said(planned: Planned, on: Card) -> dict[str, Any]:
    """Of the whole card, context and fragments counted; and seconds of a step."""
    fullest = peak(predict(planned))
    return {
        "plan": fullest.total,
        "plan_parts": dict(fullest.parts),
        "plan_at": f"{fullest.phase}, {fullest.name}",
        "plan_seconds": dataclasses.asdict(seconds(planned, on)),
        "card": {"name": on.name, "memory": on.memory},
    }


def hindrance(job: Job, planned: Planned, on: Card) -> str | None:
    """Why it is not worth trying."""
    need = peak(predict(planned)).total
    if job.device.type == "cuda" and need > on.memory:
        return f"by the plan {need / 1e9:.0f} GB of the card's {on.memory / 1e9:.0f}"
    if planned.compute.offload_optimizer:
        # What the plan counts, and the gradients in float32, which go there too.
        host = held(planned).offloaded + 4.0 * counts(planned).trains
        there = 1e6 * memory_of_machine("MemAvailable")
        if host > there:
            return f"{host / 1e9:.0f} GB of host memory for the moments, of which {there / 1e9:.0f} are free"
    return None


# -- the clock ------------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class Timed:
    """A `Watch` that also takes the time of each phase."""

    watch: Watch = field(default_factory=Watch)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    held: Any = ()

    @property
    def peaks(self) -> dict[str, int]:
        return self.watch.peaks

    def __enter__(self) -> Timed:
        self.watch.held = self.held
        self.watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watch.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = now()
        with self.watch.phase(name):
            yield
            now()  # the device has done all of it
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
