"""Is this the first of its kind? The one filter that remembers what it kept.

What is kept depends on the traces that were kept before, in their order, and on nothing else: `seen` puts
back those of an earlier run, and the rest is then judged as if it had never stopped. Memory holds hashes,
no texts and no images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from reflectvlm.curate.hashes import (
    Hashes,
    ImageHash,
    bands,
    hashed,
    minhash,
    row_hashes,
    shingles,
    significant,
    similarity,
    sketch,
    words,
)
from reflectvlm.curate.near import Keyed, Pictures
from reflectvlm.curate.types import Trace
from reflectvlm.data.fetch import BadImage, ImageLimits

_CHOICES = {"of": ("question", "trace"), "needs": ("both", "text", "images")}
_ANY = 0


class _Print(NamedTuple):
    """What is compared of a trace."""

    row: str
    exact: int
    significant: int
    sketch: bytes
    signature: Hashes
    images: tuple[ImageHash, ...]
    repeat: int
    """Of the id and the trace: the same row twice."""


class _Seen:
    """What was kept."""

    def __init__(self, distance: int | None, tint: int) -> None:
        self.rows: list[str] = []
        self.exact: list[int] = []
        self.sketches: list[bytes] = []
        self.texts = Keyed()
        self.pictures = Pictures(distance, tint)
        self.first: dict[int, str] = {}
        """The first row with images of a group."""
        self.repeats: set[int] = set()


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """A trace is a duplicate of one that was kept if the texts are the same or nearly the same, and the
    images are, too.

    Texts are the same if their words are. They are nearly the same if the Jaccard similarity of their runs
    of three words is at least `similarity`, and numbers, signs of arithmetic and names of points are equal
    and in the same order: "AB = 3" and "AB = 4" ask for different things. Images: see `near.Pictures`. Rows
    without images are compared by their texts.

    Several traces of one question (the same id) are no duplicates of each other unless the whole trace is
    the same."""

    of: Literal["question", "trace"] = "question"
    """Which text is compared."""
    needs: Literal["both", "text", "images"] = "both"
    """What must be alike. Many questions are asked about one image, and one question of many images: `both`
    allows either."""
    similarity: float = 0.8
    """1 for the same words only."""
    distance: int | None = 4
    """Most bits of 64 in which the structures of near images differ; None: only the very same pixels."""
    tint: int = 3
    """The same for their colours."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    name: ClassVar[str] = "duplicates"
    _seen: _Seen = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for what, allowed in _CHOICES.items():
            if getattr(self, what) not in allowed:
                raise ValueError(
                    f"Duplicates.{what} is {getattr(self, what)!r}. It must be one of {allowed}."
                )
        if not 0.6 <= self.similarity <= 1:
            raise ValueError(
                f"Duplicates.similarity is {self.similarity}. It must be from 0.6 to 1: what is less "
                "alike is not found reliably."
            )
        if self.distance is not None and not 0 <= self.distance <= 15:
            raise ValueError(
                f"Duplicates.distance is {self.distance}. It must be from 0 to 15 bits, or None."
            )
        if not 0 <= self.tint <= 64:
            raise ValueError(f"Duplicates.tint is {self.tint}. It must be from 0 to 64 bits.")
        object.__setattr__(self, "_seen", _Seen(self.distance, self.tint))

    def __call__(self, trace: Trace, /) -> str | None:
        try:
            new = self._print(trace)
        except BadImage as bad:
            return f"an image cannot be read ({bad.reason})"
        why = self._objection(new)
        if why is None:
            self._keep(new)
        return why

    def many(self, traces: Sequence[Trace], /) -> list[str | None]:
        """One after the other: the first of a kind is the first in order."""
        return [self(trace) for trace in traces]

    def seen(self, trace: Trace, /) -> None:
        """Remembers a trace that an earlier run kept, without judging it. Give them in their order."""
        self._keep(self._print(trace))

    def _print(self, trace: Trace) -> _Print:
        question = trace.question
        text = question.question if self.of == "question" else trace.text
        parts = words(text) if self.needs != "images" else []
        runs = shingles(parts, 3)
        return _Print(
            row=question.id,
            exact=hashed(" ".join(parts)),
            significant=significant(text) if parts else 0,
            sketch=sketch(runs),
            signature=minhash(runs),
            images=() if self.needs == "text" else row_hashes(question.images, question.root, self.limits),
            repeat=hashed(f"{question.id}\n{trace.text}"),
        )

    def _objection(self, new: _Print) -> str | None:
        if new.repeat in self._seen.repeats:
            return f"the same trace of row {new.row} again"
        if self.needs == "images":
            return self._same_images(new)
        groups = [(_ANY, 0)] if self.needs == "text" else self._seen.pictures.near(new.images)
        pictures = "" if self.needs == "text" or not new.images else " and images"
        return self._same_text(new, groups, pictures)

    def _same_images(self, new: _Print) -> str | None:
        for group, apart in self._seen.pictures.near(new.images) if new.images else ():
            if (first := self._seen.first[group]) != new.row or self.of == "trace":
                return f"{'nearly ' if apart else ''}the same images as row {first}"
        return None

    def _same_text(self, new: _Print, groups: Sequence[tuple[int, int]], pictures: str) -> str | None:
        best: tuple[float, int] | None = None
        for row in self._seen.texts.find(self._keys(new, [group for group, _ in groups])):
            if self.of == "question" and self._seen.rows[row] == new.row:
                continue
            alike = (
                1.0
                if self._seen.exact[row] == new.exact
                else similarity(self._seen.sketches[row], new.sketch)
            )
            same = self._seen.exact[row] == new.exact
            if same:
                return f"the same {self.of}{pictures} as row {self._seen.rows[row]}"
            if self.similarity < 1 and alike >= self.similarity and (best is None or alike > best[0]):
                best = alike, row
        if best is None:
            return None
        return f"nearly the same {self.of}{pictures} as row {self._seen.rows[best[1]]} ({best[0]:.2f} of 1)"

    def _keys(self, new: _Print, groups: Sequence[int]) -> Hashes:
        """Texts that may be alike share a key only if numbers are equal and images near."""
        if not groups:
            return np.zeros(0, dtype=np.uint64)
        return np.concatenate(
            [bands(new.signature, hashed(f"{group} {new.significant}")) for group in groups]
        )

    def _keep(self, new: _Print) -> None:
        seen = self._seen
        group = _ANY if self.needs == "text" else seen.pictures.add(new.images)
        seen.first.setdefault(group, new.row)
        seen.repeats.add(new.repeat)
        if self.needs == "images":
            return
        seen.texts.add(self._keys(new, [group]), len(seen.rows))
        seen.rows.append(new.row)
        seen.exact.append(new.exact)
        seen.sketches.append(new.sketch)
