"""Re-attention: when, and with what, a row looks at its image again. See `protocols.Reattention`.

    Implicit      Look-Back (arXiv 2507.03019): the model is taught to look back, nothing is inserted
    VisualCopy    Qwen-LA (arXiv 2505.23558): all visual tokens of the image again
    VisualRoute   Qwen-LA: the m percent of them that the answer has attended to most

Each is a few settings and one decision per trigger; engines and trainers do the rest. What is put in
are the vision encoder's own features, between vision-start and vision-end, as a new image block.

Ablations of the Qwen-LA paper: `VisualRoute(m=…)` from 0 (nothing) to 100 (COPY), `Implicit` for
text-only reflection, `close="</REFLECTION>"` for vision-only: the block, then the closing tag at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch

from reflectvlm.protocols import DecodeState
from reflectvlm.spans import count_tokens
from reflectvlm.types import AttentionProbe, Insertion, Text, Visual

Place: TypeAlias = Literal["auto", "before", "after"]
Images: TypeAlias = Literal["all"] | Sequence[int]


@dataclass(frozen=True)
class Implicit:
    """Inserts nothing (Look-Back, arXiv 2507.03019)."""

    @property
    def trigger(self) -> None:
        return None

    @property
    def probe(self) -> None:
        return None

    def __call__(self, state: DecodeState, /) -> None:
        del state


@dataclass(frozen=True, kw_only=True)
class VisualCopy:
    """Visual Token COPY (Qwen-LA): all visual tokens of the image, whenever the trigger is produced.

    Examples:
        VisualCopy()                                       the paper's
        VisualCopy(trigger="<back>", limit=1)              COPY for Look-Back, once per answer
    """

    trigger: str = "<REFLECTION>"
    """A special token, or a tag in plain text, which is known only when its last piece is sampled."""
    place: Place = "auto"
    """Where the block goes. auto: before a special token, as in the paper, and behind a plain-text tag.
    "before" a plain-text tag takes its pieces back and puts them in again behind the block; those after
    the first then enter no loss, because they were sampled without the block in front of them."""
    images: Images = "all"
    """Which images of the prompt are shown, in this order; all of them in theirs by default."""
    limit: int | None = None
    """Most insertions per answer."""
    budget: int | None = None
    """Most inserted visual tokens per answer, the two around each block counted; an insertion that
    would exceed it is left out."""
    close: str | None = None
    """Vision-only: this text is forced right behind the trigger, so that no words are written there."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def probe(self) -> None:
        return None

    def __call__(self, state: DecodeState, /) -> Insertion | None:
        return _insertion(self, state, [Visual(image=image) for image in _chosen(self, state)])


@dataclass(frozen=True, kw_only=True)
class VisualRoute:
    """Visual Token ROUTE (Qwen-LA): only the top m percent of the visual tokens, by

        attn_j = mean over the tokens generated so far of their attention to visual token j

    The paper does not say over which layers and heads: here the mean over all unless told otherwise.
    What counts is the attention to an image's place in the prompt, where each of its tokens stands
    once; blocks shown later do not count, or what was chosen once would be chosen again. With several
    images the m percent are taken of all their tokens together. An answer that begins with the trigger
    has attended to nothing yet: then all tokens are shown.
    """

    m: float = 50.0
    """Percent of the visual tokens, rounded up. 0 inserts nothing, 100 is COPY."""
    layers: Sequence[int] | None = None
    """Decoder layers whose attention counts, negative numbers from the end; None for all."""
    heads: Literal["mean", "max"] = "mean"
    trigger: str = "<REFLECTION>"
    place: Place = "auto"
    images: Images = "all"
    limit: int | None = None
    budget: int | None = None
    close: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.m <= 100:
            raise ValueError(f"VisualRoute.m is {self.m}. It is a percentage, from 0 to 100.")
        self._probe()
        _check(self)

    @property
    def probe(self) -> AttentionProbe | None:
        return self._probe() if 0 < self.m < 100 else None

    def __call__(self, state: DecodeState, /) -> Insertion | None:
        if self.m == 0:
            return None
        images = _chosen(self, state)
        if self.m == 100:
            return _insertion(self, state, [Visual(image=image) for image in images])
        scores = [state.attention(image) for image in images]
        if not any(bool(score.any()) for score in scores):
            return _insertion(self, state, [Visual(image=image) for image in images])
        kept = top_percent(scores, self.m)
        blocks = [Visual(image=image, keep=keep) for image, keep in zip(images, kept, strict=True) if keep]
        return _insertion(self, state, blocks)

    def _probe(self) -> AttentionProbe:
        return AttentionProbe(layers=None if self.layers is None else tuple(self.layers), heads=self.heads)


def check_reattention(given: object) -> None:
    """Raises ValueError for what is no `Reattention`."""
    lacks = [name for name in ("trigger", "probe", "__call__") if not hasattr(given, name)]
    if isinstance(given, type) or lacks:
        what = "is a class" if isinstance(given, type) else f"has no {', '.join(lacks)}"
        raise ValueError(
            f"reattention is {given!r}, which {what}. Give an object with trigger, probe and __call__, e.g. "
            "VisualCopy(); in a recipe {_target_: reflectvlm.reattention.VisualCopy}."
        )


def top_percent(scores: Sequence[torch.Tensor], m: float) -> list[tuple[int, ...]]:
    """Numbers of the top `m` percent of all scores together, per tensor and ascending. Of equal scores
    the first wins."""
    joined = torch.cat(list(scores))
    wanted = math.ceil(len(joined) * m / 100)
    best = joined.sort(descending=True, stable=True).indices[:wanted]
    chosen = torch.zeros(len(joined), dtype=torch.bool)
    chosen[best.cpu()] = True
    parts = chosen.split([len(score) for score in scores])
    return [tuple(part.nonzero().flatten().tolist()) for part in parts]


class _Settings(Protocol):
    """What COPY and ROUTE have in common."""

    @property
    def trigger(self) -> str: ...
    @property
    def place(self) -> Place: ...
    @property
    def images(self) -> Images: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def budget(self) -> int | None: ...
    @property
    def close(self) -> str | None: ...


def _chosen(settings: _Settings, state: DecodeState) -> list[int]:
    """The images to show."""
    count = len(state.prompt.patches)
    if settings.images == "all":
        return list(range(count))
    if missing := [image for image in settings.images if not 0 <= int(image) < count]:
        raise ValueError(
            f"images={list(settings.images)} names image {missing[0]}, but sample "
            f"{state.prompt.sample.id!r} has {count}. Use images='all', or numbers that every row has."
        )
    return [int(image) for image in settings.images]


def _insertion(settings: _Settings, state: DecodeState, blocks: list[Visual]) -> Insertion | None:
    """The blocks around the trigger, or None where a limit or the budget forbids them."""
    made = [span for insertion in state.insertions for span in (*insertion.before, *insertion.after)]
    if not blocks or (settings.limit is not None and len(state.insertions) >= settings.limit):
        return None
    visual = tuple(span for span in (*made, *blocks) if isinstance(span, Visual))
    if settings.budget is not None and count_tokens(visual, state.prompt.grids) > settings.budget:
        return None
    forced = (Text(ids=state.ids(settings.close)),) if settings.close else ()
    before = settings.place == "before" or (settings.place == "auto" and state.special)
    if before:
        return Insertion(before=tuple(blocks), after=forced)
    return Insertion(after=(*blocks, *forced))


def _check(settings: _Settings) -> None:
    name = type(settings).__name__
    if not settings.trigger:
        raise ValueError(f"{name}.trigger is empty. Name the tag that asks for the image, e.g. '<back>'.")
    if settings.place not in ("auto", "before", "after"):
        raise ValueError(f"{name}.place is {settings.place!r}. It must be 'auto', 'before' or 'after'.")
    if settings.images != "all" and not _are_numbers(settings.images):
        raise ValueError(f"{name}.images is {settings.images!r}. Write 'all' or numbers, e.g. [0].")
    for key, value in (("limit", settings.limit), ("budget", settings.budget)):
        if value is not None and value < 0:
            raise ValueError(f"{name}.{key} is {value}. It must be 0 or more, or null for no {key}.")
    if settings.close is not None and settings.trigger in settings.close:
        raise ValueError(
            f"{name}.close is {settings.close!r}, which holds the trigger {settings.trigger!r} and would ask "
            "for the image without end. Give the closing tag alone."
        )


def _are_numbers(images: object) -> bool:
    if not isinstance(images, Sequence) or isinstance(images, str) or not images:
        return False
    return all(isinstance(image, int) and not isinstance(image, bool) for image in images)
