"""Whether a job fits, and if not, which setting would make it fit: the first of a list that goes from what
costs little time to what changes the run or the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from reflectvlm.planning.job import Adapter, Compute, Job
from reflectvlm.planning.memory import Moment, peak, predict

Change: TypeAlias = Callable[[Job], Job | None]
"""A job with one setting changed; None where it has it already or it would not help."""

FEWEST_SLOTS, MOST_GPUS = 4, 64
RANK = 16


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Settings, as they are written on the command line, under which the job fits."""

    settings: tuple[str, ...]
    job: Job
    peak: Moment


def fullest(job: Job) -> Moment:
    return peak(predict(job))


def remedy(job: Job, memory: float) -> Remedy | None:
    """The first change alone that makes it fit, else the fewest in their order; None if nothing does."""
    return next(_fitting(job, memory), None)


def _fitting(job: Job, memory: float) -> Iterator[Remedy]:
    for settings, changed in (*_alone(job), *_together(job), *_more_gpus(job)):
        if (found := fullest(changed)).total <= memory:
            yield Remedy(settings=settings, job=changed, peak=found)


def _alone(job: Job) -> Iterator[tuple[tuple[str, ...], Job]]:
    for change in CHANGES:
        for said, changed in change(job):
            yield (said,), changed


def _together(job: Job) -> Iterator[tuple[tuple[str, ...], Job]]:
    """One change after another, each at its strongest, from the mildest on."""
    settings: dict[str, str] = {}
    for change in CHANGES:
        *_, last = (None, *change(job))
        if last is None:
            continue
        said, job = last
        for setting in said.split():
            settings[setting.partition("=")[0]] = setting
        yield tuple(settings.values()), job


def _more_gpus(job: Job) -> Iterator[tuple[tuple[str, ...], Job]]:
    """zero3 on twice, four times, … as many, with and without checkpointing."""
    world = job.compute.world * 2
    while world <= MOST_GPUS:
        spread = _spread(job, world, "zero3")
        yield (f"gpus={world}", "compute=zero3"), spread
        for said, changed in _checkpointing(spread):
            yield (f"gpus={world}", "compute=zero3", said), changed
            for fewer, smaller in _passes(changed):
                yield (f"gpus={world}", "compute=zero3", said, fewer), smaller
        world *= 2


def _checkpointing(job: Job) -> Iterator[tuple[str, Job]]:
    if not job.training.checkpointing:
        yield "policy.gradient_checkpointing=true", _trained(job, checkpointing=True)


def _passes(job: Job) -> Iterator[tuple[str, Job]]:
    """Halves of it, down to a single row."""
    tokens = job.load.micro_tokens // 2
    while job.load.kind != "distill" and tokens >= job.load.row:
        yield f"micro_tokens={tokens}", _loaded(job, micro_tokens=tokens)
        tokens //= 2


def _slots(job: Job) -> Iterator[tuple[str, Job]]:
    rows = job.load.slots // 2
    while job.load.kind != "sft" and rows >= max(FEWEST_SLOTS, job.load.group):
        yield f"engine.max_rows={rows}", _loaded(job, max_rows=rows)
        rows //= 2


def _zero(job: Job) -> Iterator[tuple[str, Job]]:
    for kind in ("zero2", "zero3"):
        if job.load.kind != "distill" and job.compute.world > 1 and job.compute.stage < int(kind[-1]):
            yield f"compute={kind}", _spread(job, job.compute.world, kind)


def _offload(job: Job) -> Iterator[tuple[str, Job]]:
    """Of moments, then of weights as well, in which the rollout still needs them whole."""
    compute = job.compute
    if job.load.kind == "distill" or compute.offload_parameters:
        return
    kind = compute.kind if compute.stage >= 2 else "zero2"
    if not compute.offload_optimizer:
        changed = dataclasses.replace(compute, kind=kind, offload_optimizer=True)
        yield f"compute={kind} compute.offload_optimizer=true", dataclasses.replace(job, compute=changed)
    changed = dataclasses.replace(compute, kind="zero3", offload_optimizer=True, offload_parameters=True)
    said = "compute=zero3 compute.offload_optimizer=true compute.offload_parameters=true"
    yield said, dataclasses.replace(job, compute=changed)


def _adapter(job: Job) -> Iterator[tuple[str, Job]]:
    """Low rank instead of all weights, which then are bfloat16, alike on every GPU."""
    if job.load.kind == "distill" or job.training.adapter is not None:
        return
    compute = Compute(kind="ddp" if job.compute.world > 1 else "single", world=job.compute.world)
    changed = _trained(job, adapter=Adapter(rank=RANK), weights="bfloat16", products=None)
    said = f"+policy.lora={{_target_: reflectvlm.models.lora.LoRA, rank: {RANK}}}"
    yield said, dataclasses.replace(changed, compute=compute)


CHANGES = (_checkpointing, _passes, _slots, _zero, _offload, _adapter)
"""In the order in which they are tried."""


def _trained(job: Job, **changes: object) -> Job:
    return dataclasses.replace(job, training=dataclasses.replace(job.training, **changes))  # type: ignore[arg-type]


def _loaded(job: Job, **changes: int) -> Job:
    return dataclasses.replace(job, load=dataclasses.replace(job.load, **changes))  # type: ignore[arg-type]


def _spread(job: Job, world: int, kind: str) -> Job:
    """The same work on so many GPUs."""
    times = world / job.compute.world
    prompts = max(1, round(job.load.prompts / times))
    load = dataclasses.replace(job.load, prompts=prompts)
    compute = dataclasses.replace(job.compute, world=world, kind=kind)  # type: ignore[arg-type]
    return dataclasses.replace(job, load=load, compute=compute)
