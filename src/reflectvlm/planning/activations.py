"""What the layers keep for the way back, and what they need while they run.

Derived from the stock layers as they are called here, counting the tensors that autograd holds (each storage
once). T tokens of a pass; s bytes of the residual stream, c of what products take and give.

    a norm      its input in float32, the normed input (if its weight trains), its result as the products
                take it: one tensor for all of them, or one each where autocast casts
    attention   rotated queries, keys, values, what it gives, a float32 per query and head; with a dense mask
                keys and values repeated for all heads; along a tree gathered copies of all three
    MLP         gate, silu(gate), up, and their product (the input of the last matrix)

With gradient checkpointing a layer keeps its input alone, and one layer at a time is as above.
Left out: what is smaller than a number a token, and kernels' own workspace.
"""

from __future__ import annotations

from reflectvlm.planning.job import Job
from reflectvlm.planning.passes import Pass
from reflectvlm.planning.states import counts

FLOAT = 4


def language_graph(job: Job) -> bool:
    """Whether anything goes back through the language model's layers."""
    found = counts(job)
    below = ("vision", "projector", "layers", "embedding")
    return found.adapter > 0 or any(found.trained[part] for part in below)


def stream(job: Job, part: str = "layers") -> int:
    """Bytes of a number between two layers. The tower's first product is cast, and its stream with it."""
    return job.training.c if part == "vision" else job.training.w


def layer(job: Job, one: Pass) -> float:
    """Kept by one decoder layer."""
    text = job.shape.text
    per_token = _norm(job, text.width, readers=3) + _norm(job, text.width, readers=2)
    per_token += _head_norms(job) + _mlp(job, text.mlp)
    return one.tokens * per_token + _attention(job, one)


def layers(job: Job, one: Pass) -> float:
    """Kept by all decoder layers and by the rotation; with checkpointing without the one that is computed
    again."""
    if not language_graph(job):
        return 0.0
    text = job.shape.text
    rotation = 2 * text.head * stream(job) * one.tokens
    inside = _input(job, one) if job.training.checkpointing else layer(job, one)
    return text.layers * inside + rotation


def last_norm(job: Job, one: Pass) -> float:
    """Kept by the norm behind the layers, and gone when they go back."""
    return one.tokens * _norm(job, job.shape.text.width, readers=0) * language_graph(job)


def again(job: Job, one: Pass) -> float:
    """The layer that is computed again on the way back, but for its input."""
    if not job.training.checkpointing or not language_graph(job):
        return 0.0
    return layer(job, one) - _input(job, one)


def backward(job: Job, tokens: int) -> float:
    """Gradients of the layer at hand: of its output, of gate and up; the product's goes as its own input
    does."""
    text = job.shape.text
    return tokens * (text.width * stream(job) + 2 * text.mlp * job.training.c)


def _input(job: Job, one: Pass) -> float:
    return float(one.tokens * job.shape.text.width * stream(job))


def forward(job: Job, tokens: int) -> float:
    """What a pass without gradients has at one time: in the MLP its input, residual, and three wide ones."""
    text = job.shape.text
    return tokens * (text.width * (2 * stream(job) + job.training.c) + 3 * text.mlp * job.training.c)


def _norm(job: Job, width: int, *, readers: int, layer_norm: bool = False, part: str = "layers") -> float:
    """Bytes a token that a norm keeps, and the products that read its result."""
    trained = bool(counts(job).trained[part])
    size = stream(job, part)
    kept = float(width * size if layer_norm else width * (FLOAT + size * trained) + FLOAT)
    if _reads(job, part) and readers:
        kept += width * _read(job, part) * (readers if _each(job, part) else 1)
    return kept


def _reads(job: Job, part: str) -> bool:
    """Products keep their inputs: those of weights that train, or of adapters."""
    adapted = job.training.adapter is not None and part == "layers"
    return adapted or bool(counts(job).trained[part])


def _each(job: Job, part: str) -> bool:
    """Each product has a copy of its own of what it reads."""
    training = job.training
    adapted = training.adapter is not None and part == "layers"
    return training.casts or (adapted and training.w != FLOAT)


def _read(job: Job, part: str) -> int:
    """Bytes of a number that a product keeps. Adapters are float32."""
    training = job.training
    adapted = training.adapter is not None and part == "layers"
    return FLOAT if adapted and training.products is None else training.c


def _head_norms(job: Job) -> float:
    """Of Qwen3's queries and keys."""
    text = job.shape.text
    if not text.head_norms:
        return 0.0
    trained = bool(counts(job).trained["layers"])
    return (text.queries + text.keys) * (FLOAT + job.training.c * trained)


def _mlp(job: Job, mlp: int) -> float:
    """Gate, silu(gate), up; their product, if the last matrix or its adapter trains."""
    training = job.training
    adapter = training.adapter
    kept = 3.0 * mlp * training.c
    if counts(job).trained["layers"]:
        kept += mlp * training.c
    if adapter is not None:
        kept += mlp * _read(job, "layers") + 7 * adapter.rank * _read(job, "layers")
    return kept


def _attention(job: Job, one: Pass) -> float:
    text, training = job.shape.text, job.training
    queries, keys, c = text.queries, text.keys, training.c
    tokens = one.tokens
    kept = float(tokens * FLOAT * text.heads)
    match one.kind:
        case "dense":
            kept += tokens * c * 4 * queries + one.mask * c
        case "eager":
            kept += tokens * c * 4 * queries + one.mask * text.heads * (FLOAT + 2 * c)
        case "split":
            joined = queries * _reads(job, "layers")  # one behind the other, for the last matrix
            kept += c * (tokens * (2 * queries + joined) + one.gathered * 2 * keys + one.mask)
        case "varlen":
            kept += c * (tokens * 2 * queries + one.gathered * 2 * keys)
        case _:
            kept += tokens * c * (2 * queries + 2 * keys)
    return kept
