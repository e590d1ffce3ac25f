"""Logits and what stands around them: tiles of the vocabulary, as in `head.py`; for an exact KL those of the
reference beside the policy's.

Of up to `chunk` trained tokens the logits are kept for the way back, of more they are made twice, so that
only a tile exists at one time.
"""

from __future__ import annotations

from reflectvlm.planning.job import Job
from reflectvlm.planning.passes import Pass
from reflectvlm.planning.states import counts
from reflectvlm.tiles import CPU_ELEMENTS, CPU_TILE, GPU_ELEMENTS

FLOAT = 4


def kept(job: Job, one: Pass) -> float:
    """Between the way there and the way back: logits, and the hidden states that they came from."""
    text, training = job.shape.text, job.training
    sides = 1 + training.exact_kl
    logits = one.trained * text.vocabulary * FLOAT * sides if one.trained <= training.chunk else 0
    return logits + one.trained * text.width * (training.w + training.exact_kl * training.c)


def forward(job: Job, one: Pass, *, way_back: bool) -> float:
    """Beside what is kept: a tile, its exponentials, the cast weights of its columns, and the hidden states
    of the whole pass, of which the trained ones are taken."""
    training, text = job.training, job.shape.text
    columns, rows = _tile(job, one)
    tiles = (1 if way_back and one.trained <= training.chunk else 2) + training.exact_kl
    return columns * rows * FLOAT * tiles + _cast(job, columns) + one.tokens * text.width * training.w


def backward(job: Job, one: Pass) -> float:
    """A tile and its slopes, the gradient of the hidden states, and a product on its way into one. The
    gradient of the head itself is `own`."""
    training, text = job.training, job.shape.text
    columns, rows = _tile(job, one)
    tile = columns * rows * (FLOAT * (one.trained > training.chunk) + training.c * (training.c < FLOAT))
    product = max(columns, rows) if head_trains(job) else rows
    return tile + _cast(job, columns) + text.width * (one.trained * training.w + product * training.c)


def own(job: Job) -> float:
    """Gradient of the head's matrix in one pass."""
    return job.shape.text.embedding * job.training.w if head_trains(job) else 0.0


def head_trains(job: Job) -> bool:
    found = counts(job).trained
    return bool(found["embedding"] if job.shape.text.tied else found["head"])


def drawing(job: Job) -> float:
    """The logits of a decoding step, and what drawing from them takes."""
    rows = job.load.slots * job.shape.text.vocabulary
    return rows * (FLOAT * 4 + (FLOAT * 5 if job.load.cuts else 0))


def _tile(job: Job, one: Pass) -> tuple[int, int]:
    training, vocabulary = job.training, job.shape.text.vocabulary
    columns = vocabulary if training.gpu else min(vocabulary, CPU_TILE)
    rows = max(1, (GPU_ELEMENTS if training.gpu else CPU_ELEMENTS) // columns)
    return columns, min(rows, training.chunk, max(1, one.trained))


def _cast(job: Job, columns: int) -> float:
    training = job.training
    return columns * job.shape.text.width * training.c if training.casts else 0.0
