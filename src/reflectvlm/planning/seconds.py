"""Seconds of a step from useful operations and bytes, and shares of what the card can do. Rough: a factor of
two either way, because lengths, images and the host decide as much as the card.

    prefill, reference, update    2 operations per weight and token forwards, 4 backwards, attention below the
                                  diagonal; a shared prompt once for its group; with checkpointing the
                                  forward once more
    decoding                      bytes: weights once for all rows, each row's own cache; or operations
    optimiser                     bytes of weights, gradients and moments
    communication                 gradients added up; zero3 also fetches the weights

Left out: rewards, reading rows, saving, and waiting for the longest of several processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from reflectvlm.planning.cards import Card
from reflectvlm.planning.job import Job
from reflectvlm.planning.passes import largest_pass, number_of_passes
from reflectvlm.planning.rollout_memory import per_column
from reflectvlm.planning.states import counts, gradients, moments, weights
from reflectvlm.planning.vision_memory import tower_trains

PRODUCTS = 0.4
"""Share of the card's operations that passes reach."""
BANDWIDTH = 0.6
"""Share of its bandwidth that decoding and the optimiser reach."""
LINK = 0.6
HOST = 20e9
"""Bytes a second between card and host, for what is offloaded."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    rollout: float
    reference: float
    update: float
    optimiser: float
    communication: float

    @property
    def step(self) -> float:
        return self.rollout + self.reference + self.update + self.optimiser + self.communication


def seconds(job: Job, card: Card) -> Seconds:
    load, training = job.load, job.training
    rate = PRODUCTS * (card.half if training.c == 2 else card.single)
    trains = load.kind != "distill"
    once = (_language(job) + _head(job)) / rate
    return Seconds(
        rollout=_rollout(job, card, rate) if load.kind != "sft" else 0.0,
        reference=(once + _vision(job) / rate) if training.reference else 0.0,
        update=_update(job) / rate if trains else 0.0,
        optimiser=_optimiser(job, card) if trains else 0.0,
        communication=_communication(job, card) if trains and job.compute.world > 1 else 0.0,
    )


def tokens(job: Job) -> int:
    """Sampled, or of gold answers, in a step of one process."""
    return job.load.prompts * job.load.group * job.load.answer


def _language(job: Job) -> float:
    """Operations of one forward pass of the layers over a step's rows."""
    load, text = job.load, job.shape.text
    shared = largest_pass(job).answers
    prompts = load.prompts * load.group / shared
    rows = prompts * load.prompt + load.prompts * load.group * load.behind
    seen = prompts * load.prompt**2 / 2
    seen += load.prompts * load.group * load.behind * (load.prompt + load.behind / 2)
    return 2.0 * text.linear * rows + 4.0 * text.layers * text.queries * seen


def _head(job: Job) -> float:
    return 2.0 * job.shape.text.embedding * tokens(job)


def _vision(job: Job) -> float:
    vision = job.shape.vision
    patch = vision.tower + vision.merger / vision.cells
    return 2.0 * patch * job.load.prompts * job.load.visual * vision.cells


def _update(job: Job) -> float:
    """Operations: forwards, backwards for what came in and for weights, and what is computed again."""
    training = job.training
    found = counts(job)
    again = 1.0 if training.checkpointing else 0.0
    own = 1.0 if found.trained["layers"] else 0.1 if found.adapter else 0.0
    tower = (3.0 + again if tower_trains(job) else 1.0) * _vision(job)
    return (2.0 + own + again) * _language(job) + 3.0 * _head(job) + tower


def _rollout(job: Job, card: Card, rate: float) -> float:
    load, text, training = job.load, job.shape.text, job.training
    prompt = load.prompts * (
        2.0 * text.linear * load.prompt + 2.0 * text.layers * text.queries * load.prompt**2
    )
    read = float((text.linear + text.embedding) * training.c)
    read += load.slots * (load.prompt + load.behind / 2) * per_column(job)
    work = 2.0 * (text.linear + text.embedding) * load.slots / rate
    turns = -(-load.prompts * load.group // load.slots) * load.answer
    return (prompt + _vision(job)) / rate + turns * max(read / (BANDWIDTH * card.bandwidth), work)


def _optimiser(job: Job, card: Card) -> float:
    shares = job.compute.shared(1)
    moved = (2 * moments(job) + (2 * _trained(job) + gradients(job)) / shares) * job.load.updates
    if job.compute.offload_optimizer:
        return moved / HOST
    return moved / (BANDWIDTH * card.bandwidth)


def _trained(job: Job) -> float:
    return counts(job).trains * job.training.w


def _communication(job: Job, card: Card) -> float:
    """Adding up is sending twice; under zero3 each pass fetches the weights there, back, and, where layers
    are computed again, once more; and each rollout once."""
    compute, load = job.compute, job.load
    others = (compute.world - 1) / compute.world
    sent = 2 * gradients(job) * load.updates
    if compute.stage >= 2:
        sent += gradients(job) * (number_of_passes(job) - 1) * load.updates
    if compute.stage == 3:
        fetched = 2 + job.training.checkpointing
        sent += weights(job) * (fetched * number_of_passes(job) * load.updates + (load.kind == "rl"))
    return sent * others / (LINK * card.link)
