"""Attention over many answers: against the length generated so far, before, inside and after the tagged
block, and against the boxes of the objects that the question is about.

An answer becomes one `Reading`, numbers per token without any weights, so that a data set of any size fits.
Means over a part of an answer count each answer alike, however long the part is; those of `by_step` count
each token alike. The paper's diagnostic (Qwen-LA, arXiv 2505.23558) is the mean attention to visual tokens
over all layers as an answer grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int

from reflectvlm.attention.boxes import coverage, objects_of
from reflectvlm.attention.capture import Ask, attended
from reflectvlm.attention.places import IMAGE, INSERTED, KINDS, PARTS, TAGS, Places, part_of, places, regions
from reflectvlm.attention.spread import ratio_error, with_errors
from reflectvlm.attention.trends import published
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.types import Rollout

SHARES = ("image", "inserted", "visual", "published")
"""Plain shares of the prompt's visual tokens, of inserted ones, of both; the image's as Look-Back counts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """One answer's attention, mean over heads and layers. Q sampled tokens."""

    id: str
    text: str
    shares: Float[np.ndarray, "Q 4"]
    """Of `SHARES`."""
    part: Int[np.ndarray, " Q"]
    """Index into `PARTS`; -1 everywhere in an answer without a tagged region."""
    on_asked: Float[np.ndarray, " Q"] | None = None
    """Share of the attention to visual tokens that lies on the boxes asked about; None: no boxes are
    known."""
    chance: Float[np.ndarray, " Q"] | None = None
    """That share if all visual tokens that a token can see, inserted ones among them, had the same attention:
    cells that ROUTE has chosen are no merit of the attention."""
    blocks: int = 0
    columns: dict[str, float] = field(default_factory=dict)
    """What else is known of the answer, e.g. whether it is right."""


def read_answers(
    policy: QwenVL,
    rollouts: Iterable[Rollout],
    *,
    layers: Sequence[int] | None = None,
    tags: Sequence[str] = TAGS,
    query: str = "token",
    chunk: int = 64,
    skipped: Callable[[Rollout, str], None] | None = None,
) -> Iterator[Reading]:
    """One forward per answer. An answer that has no tokens, or whose prompt has no image, is left out;
    `skipped` is told."""
    for rollout in rollouts:
        try:
            found = places(policy, rollout)
        except ValueError as error:
            if skipped is not None:
                skipped(rollout, str(error))
            continue
        yield _reading(policy, rollout, found, layers, tags, query, chunk)


def _reading(
    policy: QwenVL,
    rollout: Rollout,
    found: Places,
    layers: Sequence[int] | None,
    tags: Sequence[str],
    query: str,
    chunk: int,
) -> Reading:
    queries = found.queries(query)
    readout, chance = [found.kinds()], None
    if (boxes := _asked_columns(rollout, found)) is not None:
        chance = _chance(boxes, found)[queries.numpy()]
        readout.append(torch.from_numpy(boxes).float()[:, None])
    ask = Ask(queries=queries, readout=torch.cat(readout, 1))
    (kept,) = attended(policy, rollout.prompt, rollout.spans, [ask], layers=layers, chunk=chunk)
    attention = kept.numpy()
    kinds = attention[..., : len(KINDS)]
    mean = kinds.mean(0)
    image, inserted = mean[:, IMAGE], mean[:, INSERTED]
    shares = np.stack([image, inserted, image + inserted, published(kinds)[:, 0]], 1)
    on_asked = None
    if chance is not None:
        on_asked = attention[..., len(KINDS)].mean(0) / np.maximum(shares[:, 2], 1e-12)
    return Reading(
        id=rollout.prompt.sample.id,
        text=rollout.text,
        shares=shares,
        part=part_of(len(shares), regions(found, rollout.text, tags)),
        on_asked=on_asked,
        chance=chance,
        blocks=len(rollout.insertions),
    )


def _asked_columns(rollout: Rollout, found: Places) -> Float[np.ndarray, " T"] | None:
    """How much of each column's visual token lies on what is asked about. Boxes are those of the first
    image."""
    objects = objects_of(rollout.prompt.sample)
    if objects is None:
        return None
    _, rows, columns = rollout.prompt.grids[0]
    covered = coverage(objects.wanted, rows, columns)
    weight = np.zeros(len(found.image))
    first = found.image == 0
    frames = found.cell[first] % covered.size  # of a still image the cell itself
    weight[first] = covered.flatten()[frames]
    return weight


def _chance(weight: Float[np.ndarray, " T"], found: Places) -> Float[np.ndarray, " T"]:
    """The mean of `weight` over the visual tokens up to each column, which are those that it attends to."""
    seen: Float[np.ndarray, " T"] = np.cumsum(weight) / np.maximum(np.cumsum(found.image >= 0), 1)
    return seen


def by_part(readings: Sequence[Reading]) -> dict[str, dict[str, float]]:
    """Means over answers for `all` of them, and for each of `PARTS` over those that have tokens in it: their
    number, the shares, the share on what is asked about (`on_asked`), what it would be by `chance`, and the
    one over the other (`lift`); with two answers or more also the standard error of each mean (`lift_se`)."""
    made = {"all": _mean_of(readings, None)}
    for number, part in enumerate(PARTS):
        if any((reading.part == number).any() for reading in readings):
            made[part] = _mean_of(readings, number)
    return made


def _mean_of(readings: Sequence[Reading], part: int | None) -> dict[str, float]:
    rows: list[dict[str, float]] = []
    for reading in readings:
        chosen = np.ones(len(reading.part), bool) if part is None else reading.part == part
        if not chosen.any():
            continue
        shares = reading.shares[chosen].mean(0)
        row = dict(zip(SHARES, map(float, shares), strict=True)) | {"tokens": float(chosen.sum())}
        if reading.on_asked is not None and reading.chance is not None:
            row["on_asked"] = float(reading.on_asked[chosen].mean())
            row["chance"] = float(reading.chance[chosen].mean())
            row["lift"] = row["on_asked"] / row["chance"]
        rows.append(row)
    names = (*SHARES, "tokens", "on_asked", "chance", "lift")
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {"answers": float(len(rows))} | with_errors(values)


def by_step(readings: Sequence[Reading], width: int = 8) -> list[dict[str, float]]:
    """Means over the tokens number [from, to) of all answers that are so long, and their standard errors over
    answers (`visual_se`)."""
    if width < 1:
        raise ValueError(f"width is {width}. A step of the length has at least 1 token.")
    longest = max((len(reading.shares) for reading in readings), default=0)
    made = []
    for first in range(0, longest, width):
        parts = [reading.shares[first : first + width] for reading in readings]
        parts = [part for part in parts if len(part)]
        tokens = np.concatenate(parts)
        row = {"from": float(first), "to": float(min(first + width, longest))}
        row |= {"answers": float(len(parts)), "tokens": float(len(tokens))}
        row |= dict(zip(SHARES, map(float, tokens.mean(0)), strict=True))
        counts = [len(part) for part in parts]
        for column, name in enumerate(SHARES):
            error = ratio_error([float(part[:, column].sum()) for part in parts], counts)
            row |= {} if error is None else {f"{name}_se": error}
        made.append(row)
    return made
