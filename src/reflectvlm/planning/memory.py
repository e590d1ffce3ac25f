"""Bytes by part at each instant of a step that can be the fullest, for one process.

    rollout     prefill, and a decoding step
    reference   a pass of the reference model
    update      of its largest pass: the end of the way there; the head, the top layer and the embedding on
                the way back; then the vision tower on the way back
    step        the optimiser

The steady state, from the second step on: moments exist, and the last update's gradients are held until the
next one begins (DeepSpeed frees them earlier). Which instant is the fullest depends on the model: the
activations of a tiny one, the gradient of a large vocabulary, the rollout's whole weights under zero3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reflectvlm.planning import activations, head_memory, rollout_memory, vision_memory
from reflectvlm.planning.job import Job
from reflectvlm.planning.passes import Pass, largest_pass, number_of_passes, second_pass
from reflectvlm.planning.states import MASTER, counts, gradients, held, live, weights

CONTEXT = 0.8 * 2**30
"""What a process takes of a GPU before its first tensor: context, kernels, libraries' workspaces."""
FRAGMENTS = 0.04
"""Share of all tensors that an allocator loses between them."""
BATCH = 90
"""Bytes of a token in the batch and in the part of it at hand: ids, positions, masks, log-probs."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    phase: str
    """rollout, reference, update or step."""
    name: str
    parts: Mapping[str, float]
    """Bytes by part; parts of 0 are left out."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        return max(self.parts, key=lambda part: self.parts[part])


def predict(job: Job) -> list[Moment]:
    """The moments of one step, in their order."""
    found: list[Moment] = []
    if job.load.kind != "sft":
        found += _rollout(job)
    if job.load.kind != "distill":
        if job.training.reference:
            found.append(_reference(job))
        found += _update(job)
    return found


def peak(moments: Sequence[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.total)


def _moment(job: Job, phase: str, name: str, gradient: float, **parts: float) -> Moment:
    """A moment with what is always held."""
    always = held(job)
    distill = job.load.kind == "distill"
    base = {
        "weights": always.weights,
        "gathered weights": always.gathered,
        "gradients": gradient,
        "optimiser": 0.0 if distill else always.optimiser,
        "reference": always.reference,
        "buckets": always.buckets if phase == "update" or job.compute.stage == 3 else 0.0,
    }
    if job.training.gpu and job.load.kind != "sft":  # graphs keep both between rollouts
        parts = {
            "KV cache": rollout_memory.cache(job),
            "decoder's copies": rollout_memory.copies(job),
        } | parts
    named = {name.replace("_", " "): value for name, value in parts.items()}
    for part, value in named.items():
        base[part] = base.get(part, 0.0) + value
    base["other"] = base.get("other", 0.0) + _batch(job) * (phase != "rollout")
    if job.training.gpu and not job.training.bare:
        base["other"] += CONTEXT + FRAGMENTS * sum(base.values())
    return Moment(phase=phase, name=name, parts={part: value for part, value in base.items() if value > 0})


def _batch(job: Job) -> float:
    load = job.load
    return load.prompts * load.group * load.row * BATCH / load.updates


# -- rollout and reference ----------------------------------------------------------------------------


def _rollout(job: Job) -> list[Moment]:
    old = 0.0 if job.compute.stage or job.load.kind == "distill" else gradients(job)
    whole = weights(job) - held(job).gathered if job.compute.stage == 3 else 0.0
    pictures = _moment(
        job,
        "rollout",
        "images",
        old,
        gathered_weights=whole,
        activations=rollout_memory.images(job),
        cast_weights=vision_memory.cast(job),
    )
    first = _moment(
        job,
        "rollout",
        "prefill",
        old,
        gathered_weights=whole,
        activations=rollout_memory.prefill(job) + rollout_memory.rows(job),
        cast_weights=_cast(job, kept=False),
        **_cache(job, prefilled=True),
    )
    then = _moment(
        job,
        "rollout",
        "decoding",
        old,
        gathered_weights=whole,
        activations=rollout_memory.rows(job),
        logits=head_memory.drawing(job),
        **_cache(job),
    )
    return [pictures, first, then] if job.load.visual else [first, then]


def _cache(job: Job, *, prefilled: bool = False) -> dict[str, float]:
    """What a CPU has for the time of a rollout, and a GPU always."""
    if job.training.gpu:
        return {}
    cache = rollout_memory.cache(job, prefilled=prefilled)
    return {"KV_cache": cache, "decoder's_copies": rollout_memory.copies(job)}


def _reference(job: Job) -> Moment:
    one = largest_pass(job)
    layers = activations.forward(job, one.tokens)
    tower = vision_memory.forward(job, vision_memory.patches(job))
    gathered = live(job) * job.training.c / job.training.w if job.compute.stage == 3 else 0.0
    return _moment(
        job,
        "reference",
        "layers",
        0.0 if job.compute.stage else gradients(job),
        gathered_weights=gathered,
        activations=max(layers, tower, head_memory.forward(job, one, way_back=False))
        + _features(job, back=False),
    )


# -- update -------------------------------------------------------------------------------------------


def _update(job: Job) -> list[Moment]:
    """Of the first pass, which is the largest, and of a second one, in which all gradients exist already:
    at each instant the fuller one."""
    whole = held(job).gradients
    # DeepSpeed's gradients are made by a pass without rows.
    found = _pass(job, largest_pass(job), whole if job.compute.stage else 0.0)
    if (second := second_pass(job)) is not None:
        later = _pass(job, second, whole)
        found = [max(pair, key=lambda moment: moment.total) for pair in zip(found, later, strict=True)]
    return [*found, *_ends(job, whole)]


def _pass(job: Job, one: Pass, before: float) -> list[Moment]:
    """`before`: gradients that are there when it begins."""
    layers = activations.layers(job, one)
    norm = activations.last_norm(job, one)
    tower = _tower(job)
    own = head_memory.own(job)
    logits = head_memory.kept(job, one)
    head = _moment(
        job,
        "update",
        "end of the way there",
        before,
        activations=layers + norm + tower,
        logits=logits + head_memory.forward(job, one, way_back=True),
        cast_weights=_cast(job, kept=True),
    )
    back = _moment(
        job,
        "update",
        "head on the way back",
        before + own,
        activations=layers + norm + tower,
        logits=logits + head_memory.backward(job, one),
        cast_weights=_cast(job, kept=True, inside=False),
    )
    top = _moment(
        job,
        "update",
        "top layer on the way back",
        before + _after_head(job, own, before) + _largest_matrix(job) * (before > 0),
        activations=layers + tower + activations.again(job, one) + activations.backward(job, one.tokens),
        cast_weights=_cast(job, kept=True, inside=False),
    )
    return [head, back, top]


def _ends(job: Job, whole: float) -> list[Moment]:
    """The bottom of the layers, the tower, and the optimiser; all gradients are there."""
    one, tower = largest_pass(job), _tower(job)
    text, training = job.shape.text, job.training
    trains = counts(job).trained["embedding"] > 0
    matrix = text.embedding * training.w * trains
    # The gradient of a matrix used twice is added up in a buffer of its own before it arrives.
    waiting = matrix * (2 if text.tied else 1) - (0.0 if number_of_passes(job) > 1 else matrix)
    found = [
        _moment(
            job,
            "update",
            "embedding on the way back",
            whole + max(0.0, waiting),
            activations=tower + one.tokens * text.width * training.w,
        )
    ]
    if vision_memory.tower_trains(job):
        going = vision_memory.blocks(job) + vision_memory.again(job) + vision_memory.backward(job)
        going += _features(job, back=True)
        found.append(_moment(job, "update", "vision tower on the way back", whole, activations=going))
    found.append(_moment(job, "step", "optimiser", whole, buckets=_share(job)))
    return found


def _tower(job: Job) -> float:
    """What the tower keeps while the passes run, and the features with their gradient. With ZeRO it keeps
    nothing and is run once more in the end."""
    features = _features(job, back=vision_memory.tower_trains(job))
    return (
        features if job.compute.stage else vision_memory.blocks(job) + vision_memory.mergers(job) + features
    )


def _share(job: Job) -> float:
    """DeepSpeed's first two stages step on float32 copies of the gradients of their share."""
    return MASTER * counts(job).trains / job.compute.world if job.compute.stage in (1, 2) else 0.0


def _after_head(job: Job, own: float, before: float) -> float:
    """Of the head's gradient what is still beside the others when the layers go back."""
    return own if job.shape.text.tied or not before else 0.0


def _largest_matrix(job: Job) -> float:
    """A layer's gradient on its way into the sum."""
    text, trained = job.shape.text, counts(job).trained["layers"]
    return text.width * text.mlp * job.training.w if trained else 0.0


def _features(job: Job, *, back: bool) -> float:
    load = job.load
    return vision_memory.features(job, max(1, load.prompts // load.updates)) * (2 if back else 1)


def _cast(job: Job, *, kept: bool, inside: bool = True) -> float:
    """Weights in the dtype of the products. Autocast keeps those of trained weights while it is on, and what
    is not computed again keeps them for the way back."""
    text, training = job.shape.text, job.training
    if not training.casts:
        return 0.0
    every = float(text.linear * training.c)
    stays = kept and not training.checkpointing
    cached = inside and counts(job).trained["layers"] > 0
    return every if stays or cached else every / text.layers
