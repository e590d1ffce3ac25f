"""What is held from step to step: weights, gradients, moments, the reference, and their division over
processes (ZeRO, arXiv 1910.02054). Bytes on one GPU; `offloaded` is what lies on the host instead.

DeepSpeed's optimisers keep a master copy of the weights and two moments in float32, 12 bytes a trained
number, whatever dtype the weights have. Without it AdamW's moments have the weights' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from reflectvlm.planning.job import Compute, Job

PART = ("vision", "projector", "layers", "embedding", "head")
SCALES = 0.02
"""Bytes a quantised number takes for its block's scale."""
EIGHT_BIT = 1 + 4 / 256
"""Bytes of an 8-bit moment, with the scale of its block of 256."""
MASTER = 4


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters by part: all, and those that train. `adapter` has those of LoRA."""

    all: dict[str, int]
    trained: dict[str, int]
    adapter: int

    @property
    def trains(self) -> int:
        return sum(self.trained.values()) + self.adapter


def counts(job: Job) -> Counts:
    text, vision, training = job.shape.text, job.shape.vision, job.training
    sizes = (vision.tower, vision.merger, text.linear + text.small, text.embedding, text.lm_head)
    every = dict(zip(PART, sizes, strict=True))
    adapter = training.adapter

    def trains(part: str) -> bool:
        if part in ("embedding", "head") and training.rows_only:
            return True
        of = "language" if part in ("layers", "embedding", "head") else part
        return adapter is None and of not in training.frozen

    added = 0 if adapter is None else text.layers * adapter.rank * sum(i + o for i, o in text.products)
    trained = {part: size if trains(part) else 0 for part, size in every.items()}
    return Counts(all=every, trained=trained, adapter=added)


def weights(job: Job) -> float:
    """Whole, on one device."""
    training, text = job.training, job.shape.text
    total = float(sum(counts(job).all.values()) * training.w + counts(job).adapter * 4)
    if training.adapter is not None and training.adapter.bits is not None:
        total -= text.linear * (training.w - training.adapter.bits / 8 - SCALES)
    return total


def gradients(job: Job) -> float:
    """Whole, on one device. A gradient has its weight's dtype."""
    found = counts(job)
    return sum(found.trained.values()) * job.training.w + found.adapter * 4


def moments(job: Job) -> float:
    """Of one process: AdamW's two, and with ZeRO the master weights."""
    found, training, compute = counts(job), job.training, job.compute
    if training.moments == 8:
        own = 2 * EIGHT_BIT * found.trains
    elif compute.stage:
        own = 8.0 * found.trains
    else:
        own = 2.0 * (sum(found.trained.values()) * training.w + found.adapter * 4)
    return (own + MASTER * found.trains * (compute.stage > 0)) / compute.shared(1)


def reference(job: Job) -> float:
    """The frozen copy of the KL term, in the dtype of the products."""
    training = job.training
    if not training.reference or training.adapter is not None:
        return 0.0
    return sum(counts(job).all.values()) * training.c / job.compute.shared(3)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one process between two passes."""

    weights: float
    gathered: float
    """zero3: the parameters that are whole for the layer at hand."""
    gradients: float
    optimiser: float
    reference: float
    buckets: float
    offloaded: float
    """On the host."""


def held(job: Job) -> Held:
    compute, training = job.compute, job.training
    kept, own = weights(job) / compute.shared(3), moments(job)
    adrift = own * compute.offload_optimizer + kept * compute.offload_parameters
    return Held(
        weights=0.0 if compute.offload_parameters else kept,
        gathered=live(job) if compute.stage == 3 else 0.0,
        gradients=_accumulated(job) / compute.shared(2),
        optimiser=0.0 if compute.offload_optimizer else own,
        reference=reference(job),
        buckets=buckets(compute, counts(job).trains) * training.w,
        offloaded=adrift,
    )


def _accumulated(job: Job) -> float:
    """DeepSpeed adds gradients up in float32."""
    return MASTER * counts(job).trains if job.compute.stage else gradients(job)


def live(job: Job) -> float:
    """Bytes of the parameters that are whole at one time under zero3."""
    total = sum(counts(job).all.values())
    return min(job.compute.live, total) / max(total, 1) * weights(job)


def buckets(compute: Compute, trained: int) -> float:
    """Numbers on their way between processes: DeepSpeed makes its buffer whole, whatever the model."""
    if compute.stage:
        return float(compute.bucket)
    return float(min(compute.bucket, trained)) if compute.world > 1 else 0.0
