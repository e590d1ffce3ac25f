"""Which rows are in an evaluation set already: by runs of words, and by hashes of images.

    held_in(rows, "mathvista", …)  -> Held…     rows of evaluation sets
    EvaluationIndex(held)          -> index     what they share with others
    index.hits(text, images)       -> Hit…      what a row shares with them

Evidence, the strongest first:

    text and image   as below, both
    text             at least `share` of the runs of 8 words of an evaluation question, those that more than
                     `common` questions of its set have left out, stand in the row's texts. A question of
                     fewer words counts only as a whole, and only where one side has no images: "What is the
                     area?" is asked of many.
    image            an image of the evaluation row is nearly the same as one of this row

Left out: questions in other words or another language, crops, images drawn anew.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reflectvlm.curate.hashes import Hashes, ImageHash, hashed, row_hashes, runs, words
from reflectvlm.curate.near import Pictures
from reflectvlm.data.fetch import BadImage, ImageLimits
from reflectvlm.eval.types import Task

Evidence = Literal["text and image", "text", "image"]
EVIDENCE: tuple[Evidence, ...] = ("text and image", "text", "image")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A row of an evaluation set; its images as hashes."""

    set: str
    id: str
    question: str
    answer: str = ""
    images: tuple[ImageHash, ...] = ()


class Hit(NamedTuple):
    """What a row shares with one of an evaluation set."""

    held: Held
    share: float | None
    """Of the evaluation question's runs of words; 1 for a whole short question; None: less than asked for."""
    apart: int | None
    """Bits in which the nearest images differ; None: none is near."""

    @property
    def evidence(self) -> Evidence:
        if self.share is None:
            return "image"
        return "text" if self.apart is None else "text and image"


def held_in_task(task: Task, data_dir: Path, limits: ImageLimits | None = None) -> Iterator[Held]:
    """The rows of a benchmark. A row whose image is missing is there without it."""
    for item in task.load(data_dir):
        try:
            images = row_hashes(item.images, item.root, limits)
        except BadImage:
            images = ()
        yield Held(set=task.name, id=item.id, question=item.question, answer=item.answer, images=images)


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationIndex:
    """Rows of evaluation sets, by runs of words and by images. Memory grows with them and not with the rows
    that are looked up."""

    held: Sequence[Held]
    n: int = 8
    """Words of a run."""
    share: float = 0.5
    """How much of a question must be found."""
    common: int = 10
    """A run of words that more questions of one set have is its template, and no evidence; short questions
    likewise."""
    distance: int | None = 4
    """Most bits of 64 in which structures of near images differ; None: only the very same pixels."""
    tint: int = 3
    """The same for their colours."""
    _keys: Hashes = field(init=False, repr=False)
    _owners: NDArray[np.int32] = field(init=False, repr=False)
    _own: NDArray[np.int32] = field(init=False, repr=False)
    """How many runs of its own each question has."""
    _short: dict[int, list[int]] = field(init=False, repr=False)
    _pictures: Pictures = field(init=False, repr=False)
    _shown: dict[int, list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.n < 2 or self.common < 1 or not 0 < self.share <= 1:
            raise ValueError(
                f"EvaluationIndex has n={self.n}, common={self.common}, share={self.share}. "
                "It needs n >= 2, common >= 1 and 0 < share <= 1."
            )
        if self.distance is not None and not 0 <= self.distance <= 15:
            raise ValueError(
                f"EvaluationIndex.distance is {self.distance}. It must be from 0 to 15 bits, or None."
            )
        object.__setattr__(self, "held", tuple(self.held))
        self._index_texts()
        self._index_images()

    def hits(self, question: str, more: str = "", images: Sequence[ImageHash] = ()) -> list[Hit]:
        """What a row's question, its other texts and its images share with evaluation rows, in the order of
        those."""
        shares, short = self._shares(question, more)
        apart = self._apart(images)
        found: list[Hit] = []
        for place in sorted({*shares, *short, *apart}):
            held = self.held[place]
            whole = place in short and (place in apart or not images or not held.images)
            share = 1.0 if whole else shares.get(place)
            if share is not None or place in apart:
                found.append(Hit(held, share, apart.get(place)))
        return found

    def _shares(self, question: str, more: str) -> tuple[dict[int, float], set[int]]:
        """Shares of long questions that are large enough, and short ones that this row's question is."""
        asked = words(question)
        said = np.unique(np.concatenate([runs(asked, self.n), runs(words(more), self.n)]))
        low, high = (np.searchsorted(self._keys, said, side) for side in ("left", "right"))
        times = Counter(
            int(one) for a, b in zip(low, high, strict=True) if b > a for one in self._owners[a:b]
        )
        shares = {place: count / int(self._own[place]) for place, count in times.items()}
        short = self._short.get(hashed(" ".join(asked)), [])
        return {place: share for place, share in shares.items() if share >= self.share}, {*short}

    def _apart(self, images: Sequence[ImageHash]) -> dict[int, int]:
        found: dict[int, int] = {}
        for image in images:
            for group, apart in self._pictures.near((image,)):
                for place in self._shown[group]:
                    found[place] = min(apart, found.get(place, apart))
        return found

    def _index_texts(self) -> None:
        owned: list[Hashes] = []
        short: dict[tuple[str, int], list[int]] = defaultdict(list)
        times: dict[str, Counter[int]] = defaultdict(Counter)
        for place, held in enumerate(self.held):
            asked = words(held.question)
            if 0 < len(asked) < self.n:
                short[held.set, hashed(" ".join(asked))].append(place)
            found = np.unique(runs(asked, self.n))
            owned.append(found)
            times[held.set].update(map(int, found))
        keys: list[int] = []
        owners: list[int] = []
        for place, found in enumerate(owned):
            own = [one for one in map(int, found) if times[self.held[place].set][one] <= self.common]
            keys += own
            owners += [place] * len(own)
        order = np.argsort(np.array(keys, dtype=np.uint64), kind="stable")
        object.__setattr__(self, "_keys", np.array(keys, dtype=np.uint64)[order])
        object.__setattr__(self, "_owners", np.array(owners, dtype=np.int32)[order])
        object.__setattr__(
            self,
            "_own",
            np.bincount(np.array(owners, dtype=np.int64), minlength=len(self.held)).astype(np.int32),
        )
        rare: dict[int, list[int]] = defaultdict(list)
        for (_, key), places in short.items():
            if len(places) <= self.common:
                rare[key] += places
        object.__setattr__(self, "_short", dict(rare))

    def _index_images(self) -> None:
        pictures, shown = Pictures(self.distance, self.tint), defaultdict(list)
        for place, held in enumerate(self.held):
            for image in dict.fromkeys(held.images):
                shown[pictures.add((image,))].append(place)
        object.__setattr__(self, "_pictures", pictures)
        object.__setattr__(self, "_shown", dict(shown))


class Overlapping(NamedTuple):
    """A row that is in an evaluation set, with the texts of both."""

    position: str
    id: str
    question: str
    answer: str
    hits: tuple[Hit, ...]


@dataclass(kw_only=True)
class Tally:
    """Counts of a pass over the rows, by set, and the rows that were found."""

    rows: int = 0
    unread: list[str] = field(default_factory=list)
    """One line for each row that could not be read."""
    found: list[Overlapping] = field(default_factory=list)

    def add(self, row: Overlapping) -> None:
        self.rows += 1
        if row.hits:
            self.found.append(row)

    def by_set(self, names: Iterable[str]) -> dict[str, dict[str, int]]:
        """For each set the rows by their strongest evidence, all of them, and how many of its own rows they
        meet."""
        return {name: self._of(name) for name in names}

    def _of(self, name: str) -> dict[str, int]:
        rows: Counter[str] = Counter()
        met: set[str] = set()
        for row in self.found:
            hits = [hit for hit in row.hits if hit.held.set == name]
            met.update(hit.held.id for hit in hits)
            if hits:
                rows[min((hit.evidence for hit in hits), key=EVIDENCE.index)] += 1
        return {
            "rows": sum(rows.values()),
            **{one: rows[one] for one in EVIDENCE},
            "evaluation rows": len(met),
        }
