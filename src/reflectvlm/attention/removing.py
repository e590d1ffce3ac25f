"""Region removal: how much less probable an answer becomes when what it is about is greyed.

Attention says where a model looks, not whether it uses what it sees. So the model's own answer, token by
token, is scored again with the asked region of the image in grey, and with another region of the same size
in grey, which tells what damage to an image does in any case. What is left over by the difference is due to
what the region shows.

The tokens inside `<back>` are the test of looking back. They stand behind a first reading that says the same,
so a model that copies its own words keeps their probability when the image no longer shows it. All copies of
the image are greyed, inserted blocks too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from reflectvlm.attention.boxes import Box, objects_of
from reflectvlm.attention.places import PARTS, TAGS, part_of, places, regions
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.tags import find_boxes
from reflectvlm.types import Instruction, Prompt, Rollout, Sample, Spans, Text

WHERE = ("answer", *PARTS, "box")
"""The whole answer, its parts, and the content of its last `\\boxed{}`."""


@dataclass(frozen=True, kw_only=True)
class Removed:
    """Fall of an answer's log-probability, in nats, summed over the tokens of each of `WHERE`."""

    id: str
    asked: dict[str, float]
    other: dict[str, float]
    tokens: dict[str, int]
    region: str
    """Which other region was greyed: an object's name, or its place."""


def removal(
    policy: QwenVL,
    rollouts: Iterable[Rollout],
    instruction: Instruction,
    *,
    tags: Sequence[str] = TAGS,
    skipped: Callable[[Rollout, str], None] | None = None,
) -> Iterator[Removed]:
    """For every answer whose row knows its boxes and has room for another region of the same size; of the
    others `skipped` is told why not. Three rows of one forward each."""
    for rollout in rollouts:
        try:
            pair = regions_to_grey(rollout.prompt.sample)
        except ValueError as error:
            if skipped is not None:
                skipped(rollout, str(error))
            continue
        yield _removed(policy, rollout, instruction, pair, tags)


@dataclass(frozen=True, kw_only=True)
class Pair:
    asked: tuple[Box, ...]
    other: tuple[Box, ...]
    name: str


def regions_to_grey(sample: Sample) -> Pair:
    """The boxes asked about, and as many others of the same sizes that meet none of them.

    Another object's box is taken where one has the size, those that hold a digit first; else a place on a
    grid of eight by eight, the farthest from what is asked about. Raises ValueError where there is neither.
    """
    objects = objects_of(sample)
    if objects is None:
        raise ValueError(
            f"Row {sample.id!r} does not say where its objects are: add the columns boxes and asked."
        )
    taken: list[Box] = []
    names: list[str] = []
    free = _ordered(sample, objects.others)
    for box in objects.wanted:
        near = (*objects.wanted, *taken)
        fitting = [
            name
            for name, other in free.items()
            if _same_size(box, other) and not any(other.overlaps(one) for one in near)
        ]
        if fitting:
            taken.append(free[fitting[0]])
            names.append(fitting[0])
        else:
            taken.append(_elsewhere(box, near, sample.id))
            names.append("elsewhere")
    return Pair(asked=objects.wanted, other=tuple(taken), name=", ".join(names))


def greyed(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy with the boxes filled by the image's mean colour."""
    made = image.convert("RGB")
    made = made.copy()
    colour = tuple(round(float(c)) for c in np.asarray(made).reshape(-1, 3).mean(0))
    draw = ImageDraw.Draw(made)
    for box in boxes:
        left, right = round(box.left * made.width), round(box.right * made.width)
        top, bottom = round(box.top * made.height), round(box.bottom * made.height)
        draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
    return made


def _removed(
    policy: QwenVL, rollout: Rollout, instruction: Instruction, pair: Pair, tags: Sequence[str]
) -> Removed:
    sample = rollout.prompt.sample
    prompts = [rollout.prompt]
    for boxes in (pair.asked, pair.other):
        images = (greyed(sample.images[0], boxes), *sample.images[1:])
        changed = policy.prompt(dataclasses.replace(sample, images=images), instruction)
        # A prompt may have been given words of the answer; only its images change.
        prompts.append(dataclasses.replace(changed, spans=rollout.prompt.spans))
    whole, asked, other = logprobs(policy, prompts, rollout.spans)
    where = _where(policy, rollout, tags)
    return Removed(
        id=sample.id,
        asked={name: float((whole - asked)[chosen].sum()) for name, chosen in where.items()},
        other={name: float((whole - other)[chosen].sum()) for name, chosen in where.items()},
        tokens={name: int(chosen.sum()) for name, chosen in where.items()},
        region=pair.name,
    )


def logprobs(policy: QwenVL, prompts: Sequence[Prompt], spans: Spans) -> Float[Tensor, "N Q"]:
    """Log-prob of each sampled token of the same answer to these prompts, at temperature 1."""
    own = tuple(
        dataclasses.replace(span, trained=bool(span.trained or span.logprobs))
        if isinstance(span, Text)
        else span
        for span in spans
    )
    batch = policy.batch([(prompt, own) for prompt in prompts])
    with torch.no_grad():
        scores = policy.score(batch, policy.features(batch.images), entropy=False).logprobs
    return scores[batch.trained].view(len(prompts), -1).double().cpu()


def _where(policy: QwenVL, rollout: Rollout, tags: Sequence[str]) -> dict[str, np.ndarray]:
    """Which of the sampled tokens belong to each of `WHERE`; those without any are left out."""
    found = places(policy, rollout)
    count = len(found.sampled)
    part = part_of(count, regions(found, rollout.text, tags))
    chosen = {"answer": np.ones(count, bool)} | {name: part == n for n, name in enumerate(PARTS)}
    if boxes := find_boxes(rollout.text):
        ends = np.append(found.starts[1:], len(rollout.text))
        chosen["box"] = (ends > boxes[-1].inner) & (found.starts < boxes[-1].end - 1)
    return {name: one for name, one in chosen.items() if one.any()}


def _ordered(sample: Sample, others: dict[str, Box]) -> dict[str, Box]:
    """Other objects, empty places of a page of digits last."""
    digits = sample.columns.get("digits")
    if not isinstance(digits, Sequence) or "boxes" in sample.columns:
        return others
    from reflectvlm.data.digits import PLACES

    return dict(sorted(others.items(), key=lambda one: digits[PLACES.index(one[0])] is None))


def _same_size(one: Box, other: Box, tolerance: float = 1e-6) -> bool:
    sides = [(box.right - box.left, box.bottom - box.top) for box in (one, other)]
    return all(abs(a - b) < tolerance for a, b in zip(*sides, strict=True))


def _elsewhere(box: Box, near: Sequence[Box], row: str) -> Box:
    wide, high = box.right - box.left, box.bottom - box.top
    places_ = [
        Box(x, y, x + wide, y + high)
        for x in np.linspace(0, 1 - wide, 8).tolist()
        for y in np.linspace(0, 1 - high, 8).tolist()
    ]
    free = [one for one in places_ if not any(one.overlaps(other) for other in near)]
    if not free:
        raise ValueError(
            f"Row {row!r} asks about so much of its image that no other region of the same size is left: "
            f"it says "
            "nothing about removal."
        )
    return max(free, key=lambda one: (one.left - box.left) ** 2 + (one.top - box.top) ** 2)
