"""What the vision tower keeps for the way back, and what it needs while it runs.

A patch of a block: two norms, queries, keys and values joined (values are a part of the joined tensor, so
all of it stays), rotated queries and keys, what attention gives by windows and joined, and the MLP.
"""

from __future__ import annotations

from reflectvlm.planning.activations import FLOAT, _norm
from reflectvlm.planning.job import Job
from reflectvlm.planning.states import counts


def tower_trains(job: Job) -> bool:
    found = counts(job).trained
    return bool(found["vision"] or found["projector"])


def patches(job: Job) -> int:
    """Of the images that go through the tower at one time: at most `micro_tokens` visual tokens."""
    load = job.load
    if not load.visual:
        return 0
    images = max(1, min(load.prompts // load.updates, load.micro_tokens // load.visual))
    return images * load.visual * job.shape.vision.cells


def parts(job: Job) -> int:
    """How often the tower is run for all images of an update."""
    load = job.load
    whole = max(1, load.prompts // load.updates) * load.visual * job.shape.vision.cells
    return -(-whole // patches(job)) if load.visual else 0


def block(job: Job) -> float:
    """Bytes a patch."""
    vision, training = job.shape.vision, job.training
    gated, width, c = vision.gated, vision.width, training.c
    norms = _norm(job, width, readers=1, layer_norm=not gated, part="vision")
    norms += _norm(job, width, readers=2 if gated else 1, layer_norm=not gated, part="vision")
    attention = width * c * (3 + 2 + 1 + 1) + FLOAT * vision.heads
    feed = {"silu": 4, "quick_gelu": 3, "gelu": 2}[vision.activation] * vision.mlp * c
    return norms + attention + feed


def blocks(job: Job) -> float:
    """Kept by the patch embedding and the blocks between the way there and the way back, for one part."""
    vision, training = job.shape.vision, job.training
    if not counts(job).trained["vision"]:
        return 0.0
    one = vision.width * training.c if training.checkpointing else block(job)
    kept = patches(job) * (vision.layers * one + vision.patch_values * training.c)
    return kept + (0.0 if training.checkpointing else cast(job))


def cast(job: Job) -> float:
    """The tower's weights in the dtype of the products."""
    return float(job.shape.vision.tower * job.training.c) if job.training.casts else 0.0


def mergers(job: Job) -> float:
    """Kept by the mergers: a norm, its result, what the first matrix gives and its activation."""
    vision, training = job.shape.vision, job.training
    kept = patches(job) * vision.width * (FLOAT + 4 * training.c) * (1 + vision.deep)
    return kept if tower_trains(job) else 0.0


def again(job: Job) -> float:
    """The block that is computed again on the way back, but for its input."""
    if not job.training.checkpointing or not counts(job).trained["vision"]:
        return 0.0
    return patches(job) * (block(job) - job.shape.vision.width * job.training.c)


def backward(job: Job) -> float:
    vision, training = job.shape.vision, job.training
    return patches(job) * (vision.width + 2 * vision.mlp) * training.c * tower_trains(job)


def forward(job: Job, count: int) -> float:
    """What a pass of so many patches without gradients has at one time: the pixels, and the larger of the
    MLP with three wide ones and of the rotation, which is in float32."""
    vision, c = job.shape.vision, job.training.c
    feed = 3 * vision.width + 3 * vision.mlp
    rotation = 5 * vision.width * c + vision.width * FLOAT * (4 if c == FLOAT else 6)
    return count * (FLOAT * vision.patch_values + max(feed * c, rotation))


def features(job: Job, images: int) -> float:
    """Bytes of the features of so many prompts' images."""
    return images * job.load.visual * job.shape.text.width * job.training.w * (1 + job.shape.vision.deep)
