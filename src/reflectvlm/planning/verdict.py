"""Whether a job fits, and if not, which setting would make it fit: the first of a list that goes from what
costs little time to what changes the run or the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from reflectvlm.planning.job import Adapter, Compute, Job
from reflectvlm.planning.memory import Moment, peak, predict

Changed: TypeAlias = tuple[tuple[str, ...], Job]
"""Settings as they are written on the command line, and the job with them."""

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
        if _refused(changed):
            continue
        if (found := fullest(changed)).total <= memory:
            yield Remedy(settings=settings, job=changed, peak=found)


def _refused(job: Job) -> bool:
    """What a start would refuse."""
    quantised = job.training.adapter is not None and job.training.adapter.bits is not None
    return bool(job.compute.stage and job.training.moments == 8) or (job.compute.stage == 3 and quantised)


def _alone(job: Job) -> Iterator[Changed]:
    for change in CHANGES:
        yield from change(job)


def _together(job: Job) -> Iterator[Changed]:
    """One change after another, each at its strongest, from the mildest on."""
    settings: tuple[str, ...] = ()
    for change in CHANGES:
        for said, changed in tuple(change(job))[-1:]:
            job = changed
            if change is _adapter:  # which needs no shares of what hardly anything is left of
                settings = tuple(one for one in settings if not one.startswith("compute"))
            settings = _joined(settings, said)
            yield settings, job


def _more_gpus(job: Job) -> Iterator[Changed]:
    """zero3 on twice, four times, … as many, then with checkpointing and in smaller passes too."""
    world = job.compute.world * 2
    while world <= MOST_GPUS and job.load.kind != "distill":
        said: tuple[str, ...] = (f"gpus={world}", "compute=zero3")
        wider = _spread(job, world, "zero3")
        yield said, wider
        for change in (_checkpointing, _passes, _slots, _half):
            for more, changed in tuple(change(wider))[-1:]:
                said, wider = _joined(said, more), changed
                yield said, wider
        world *= 2


def _joined(settings: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    """A later setting of a key stands in the place of an earlier one."""
    return tuple({setting.partition("=")[0]: setting for setting in (*settings, *more)}.values())


def _checkpointing(job: Job) -> Iterator[Changed]:
    if not job.training.checkpointing and job.load.kind != "distill":
        yield ("policy.gradient_checkpointing=true",), _trained(job, checkpointing=True)


def _passes(job: Job) -> Iterator[Changed]:
    """Halves of it, down to a single row."""
    tokens = job.load.micro_tokens // 2
    while job.load.kind != "distill" and tokens >= job.load.row:
        yield (f"micro_tokens={tokens}",), _loaded(job, micro_tokens=tokens)
        tokens //= 2


def _slots(job: Job) -> Iterator[Changed]:
    rows = job.load.slots // 2
    while job.load.kind != "sft" and rows >= max(FEWEST_SLOTS, job.load.group):
        yield (f"engine.max_rows={rows}",), _loaded(job, max_rows=rows)
        rows //= 2


def _zero(job: Job) -> Iterator[Changed]:
    for kind in ("zero2", "zero3"):
        if job.load.kind != "distill" and job.compute.world > 1 and job.compute.stage < int(kind[-1]):
            yield (f"compute={kind}",), _spread(job, job.compute.world, kind)


def _half(job: Job) -> Iterator[Changed]:
    """bfloat16 weights, where they take no small steps themselves: under ZeRO, which has float32 ones beside
    the moments, or where nothing trains."""
    if job.training.w == 2 or job.training.adapter is not None:
        return
    dtypes = ("policy.dtype=bfloat16", "policy.compute=bfloat16")
    changed = _trained(job, weights="bfloat16", products="bfloat16")
    if job.load.kind == "distill" or job.compute.stage == 3:
        yield dtypes, changed
        return
    for kind in ("zero2", "zero3"):
        if job.compute.world > 1:
            yield (f"compute={kind}", *dtypes), _spread(changed, job.compute.world, kind)


def _offload(job: Job) -> Iterator[Changed]:
    """Of moments, then of weights as well, which a rollout still needs whole."""
    compute = job.compute
    if job.load.kind == "distill" or compute.offload_parameters:
        return
    if not compute.offload_optimizer:
        kind = compute.kind if compute.stage >= 2 else "zero2"
        changed = dataclasses.replace(compute, kind=kind, offload_optimizer=True)
        fewer = (f"compute={kind}", "compute.offload_optimizer=true")
        yield fewer, dataclasses.replace(job, compute=changed)
    changed = dataclasses.replace(compute, kind="zero3", offload_optimizer=True, offload_parameters=True)
    said = ("compute=zero3", "compute.offload_optimizer=true", "compute.offload_parameters=true")
    yield said, dataclasses.replace(job, compute=changed)


def _adapter(job: Job) -> Iterator[Changed]:
    """Low rank instead of all weights, which then are bfloat16, alike on every GPU."""
    if job.load.kind == "distill" or job.training.adapter is not None:
        return
    world = job.compute.world
    kind: Literal["single", "ddp"] = "ddp" if world > 1 else "single"
    changed = _trained(job, adapter=Adapter(rank=RANK), weights="bfloat16", products="bfloat16")
    said = (
        f"+policy.lora={{_target_: reflectvlm.models.lora.LoRA, rank: {RANK}}}",
        "policy.dtype=bfloat16",
        "policy.compute=bfloat16",
    )
    shares = (f"compute={kind}",) if job.compute.stage else ()
    yield (*said, *shares), dataclasses.replace(changed, compute=Compute(kind=kind, world=world))


CHANGES = (_checkpointing, _passes, _slots, _zero, _half, _offload, _adapter)
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
