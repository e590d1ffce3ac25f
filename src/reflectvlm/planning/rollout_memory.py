"""What a rollout takes beside the training state: the cache of keys and values, the prefill of the prompts
that come together, logits, and the decoder's own copies of weights (`rollout/`, `models/decoder.py`)."""

from __future__ import annotations

from reflectvlm.planning import activations, vision_memory
from reflectvlm.planning.job import Job
from reflectvlm.rollout.stepping import padded_rows, padded_width

SHARED_FROM = 16
"""Common columns from which on a CPU keeps them once more for its group (`models/decoder.py`)."""


def per_column(job: Job) -> float:
    """Bytes of one token in the cache."""
    text = job.shape.text
    return 2.0 * text.layers * text.keys * job.training.c


def cache(job: Job, *, prefilled: bool = False) -> float:
    """On a GPU reserved for all rows at their longest and kept. On a CPU as wide as the prompts at first,
    and then it grows by half at a time, a layer after the other."""
    load = job.load
    if job.training.gpu:
        needed = load.prompt + load.answer + (load.visual if load.inserted else 0)
        return padded_rows(load.slots) * padded_width(needed) * per_column(job)
    before = columns = load.prompt
    while not prefilled and columns < load.row:
        before, columns = columns, max(columns + 1, columns * 3 // 2)
    growing = 0.0 if prefilled else before / job.shape.text.layers
    held = load.slots * (columns + growing) * per_column(job)
    return held + (0.0 if prefilled else _siblings(job))


def _siblings(job: Job) -> float:
    load = job.load
    if load.group < 2 or load.prompt < SHARED_FROM or job.training.c < 4:
        return 0.0
    return load.slots // load.group * load.prompt * per_column(job)


def copies(job: Job) -> float:
    """Weights that the decode step holds cast or, on a CPU, joined. On a GPU it keeps them."""
    text, training = job.shape.text, job.training
    if training.adapter is not None:
        return 0.0
    if training.casts:
        return float(text.linear * training.c)
    if training.gpu:
        return 0.0
    joined = text.width * (text.queries + 2 * text.keys + 2 * text.mlp)
    return float(text.layers * joined * training.w)


def images(job: Job) -> float:
    """The images of all prompts that come together, through the tower."""
    count = _prompts(job)
    patches = count * job.load.visual * job.shape.vision.cells
    return vision_memory.forward(job, patches) + vision_memory.features(job, count)


def prefill(job: Job) -> float:
    """Their tokens through the layers, in attention (keys and values gathered from the cache and repeated,
    the mask in numbers) or in the MLP."""
    load, text, c = job.load, job.shape.text, job.training.c
    tokens = _prompts(job) * load.prompt
    own = text.width * 2 * activations.stream(job) + 2 * (text.queries + text.keys) * c
    attention = tokens * (own + 2 * (text.queries + text.keys) * c + load.prompt * c)
    mask = tokens * load.prompt
    return (
        max(attention, activations.forward(job, tokens)) + mask + vision_memory.features(job, _prompts(job))
    )


def _prompts(job: Job) -> int:
    return max(1, job.load.slots // job.load.group)


def rows(job: Job) -> float:
    """Drawn ids, log-probs and random numbers of the live rows."""
    return float(job.load.slots * job.load.answer * 16)
