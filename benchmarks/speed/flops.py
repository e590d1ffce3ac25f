"""How much work a step is: useful floating-point operations of an update, bytes of a decoding step.

Useful is what the result needs at least once: a prompt once for its group, the vision tower once an image,
logits only where a token is trained, causal attention only below the diagonal. What is computed again for
memory's sake (checkpointing, chunks of logits) does not count, nor does what a side computes G times. A
multiplication with its addition is two operations; norms, activations and rotations are left out (below
one percent at 7B).

Shapes: P tokens of a prompt, A of an answer, G answers, V visual tokens.
"""

from __future__ import annotations

from workload import Shape, Work

PATCH_VALUES = 3 * 2 * 14 * 14
"""Numbers of one patch: three colours, two frames."""
MERGED = 4
"""Patches that become one visual token."""


def language_weights(shape: Shape) -> int:
    """Weights that a token is multiplied with in the decoder layers."""
    attention = 2 * shape.width * shape.width + 2 * shape.width * shape.kv_heads * shape.head
    return shape.layers * (attention + 3 * shape.width * shape.mlp)


def head_weights(shape: Shape) -> int:
    return shape.width * shape.vocabulary


def vision_weights(shape: Shape) -> int:
    """Weights that a patch is multiplied with: embedding, layers, and its share of the merger."""
    wide = shape.vision_width
    layers = shape.vision_layers * (4 * wide * wide + 3 * wide * shape.vision_mlp)
    merged = MERGED * wide
    merger = merged * merged + merged * shape.width
    return PATCH_VALUES * wide + layers + merger // MERGED


def language_flops(shape: Shape, work: Work, prompt: int) -> float:
    """Of one forward pass of the language model over a step's rollouts."""
    tokens = work.prompts * (prompt + work.group * work.tokens)
    answer = work.tokens * prompt + work.tokens * (work.tokens + 1) / 2
    seen = work.prompts * (prompt * (prompt + 1) / 2 + work.group * answer)
    attention = 4 * shape.layers * shape.width * seen
    return 2.0 * language_weights(shape) * tokens + attention + 2.0 * head_weights(shape) * work.sampled


def vision_flops(shape: Shape, work: Work) -> float:
    """Of one forward pass of the tower over a step's images. Its attention, mostly within windows, counts
    as nothing."""
    return 2.0 * vision_weights(shape) * work.prompts * work.visual_tokens * MERGED


def update_flops(shape: Shape, work: Work, prompt: int, *, frozen_vision: bool = False) -> float:
    """Forward and backward of the policy (three times a forward), and the reference's forward if there is a
    KL term. A frozen tower, which policy and reference share, is needed once."""
    passes = 4 if work.kl else 3
    tower = vision_flops(shape, work) * (1 if frozen_vision else passes)
    return passes * language_flops(shape, work, prompt) + tower


def decode_bytes(shape: Shape, rows: int, context: float, size: int = 2) -> float:
    """Read by one decoding step: weights of decoder and head once, and each row's own cache of `context`
    tokens, also where rows share a prompt. `size` is the bytes of a number."""
    cache = 2 * shape.layers * shape.kv_heads * shape.head * context
    return size * (language_weights(shape) + head_weights(shape) + rows * cache)
