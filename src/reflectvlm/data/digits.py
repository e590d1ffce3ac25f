"""Pages of handwritten digits: the built-in task on real images.

A page is a 2 x 2 sheet with two to four digits, each a real 8 x 8 scan of the UCI "Optical
Recognition of Handwritten Digits" set (CC BY 4.0), enlarged, shifted and set on grey noise.
Questions need one or several looks: read, add, subtract, compare, count.

The three splits are made of *different scans* (1,197 / 200 / 400 of the 1,797), so a page of the test
split shows no scan that training has seen. The writers are not kept apart: the split is by scan, after
a shuffle, and the same people wrote digits of all three. Training rows are unlimited: row i of a split
depends on (seed, split, i) alone. Validation and test are fixed: they do not depend on the seed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal, overload

import numpy as np
from PIL import Image

from reflectvlm.types import Sample

Split = Literal["train", "validation", "test"]
PLACES = ("upper left", "upper right", "lower left", "lower right")
PAIRS = {"upper": (0, 1), "lower": (2, 3), "left": (0, 2), "right": (1, 3)}
KINDS = ("read", "add", "subtract", "compare", "count", "exceed")
UNLIMITED = 2**31

_SCANS: dict[str, slice] = {
    "train": slice(0, 1197),
    "validation": slice(1197, 1397),
    "test": slice(1397, 1797),
}
_SPLIT_NUMBER = {"train": 0, "validation": 1, "test": 2}


@dataclass(frozen=True, kw_only=True)
class Digits(Sequence[Sample]):
    """Rows of one split, made when asked for. `digits[i]` is always the same row.

    Example: `Digits(split="test", size=200)[0].question`
    """

    split: Split = "train"
    size: int = UNLIMITED
    seed: int | Sequence[int] = 0
    """Which training pages, one number or several; validation and test ignore it."""
    kinds: Sequence[str] = KINDS
    filled: Sequence[int] = (2, 3, 4)
    """How many of the four places may hold a digit; a page has one of these numbers."""
    image_size: int = 64

    def __post_init__(self) -> None:
        if self.split not in _SCANS:
            raise ValueError(f"Digits has no split {self.split!r}. Choose one of {sorted(_SCANS)}.")
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"Digits asks no questions of kind {sorted(unknown)}. Choose from {KINDS}.")
        if not set(self.filled) <= {1, 2, 3, 4} or not self.filled:
            raise ValueError(f"Digits.filled is {self.filled}. A page holds 1 to 4 digits, e.g. (2, 3, 4).")
        if 1 in self.filled and (pairs := {"add", "subtract", "compare"} & set(self.kinds)):
            raise ValueError(
                f"Questions of kind {sorted(pairs)} need two digits, but filled={self.filled} has 1."
            )
        if not self.kinds or self.size < 1:
            raise ValueError(
                f"Digits needs kinds and a size of at least 1, got {self.kinds} and {self.size}."
            )

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of Digits with {self.size} rows")
        seed = (self.seed,) if isinstance(self.seed, int) else tuple(self.seed)
        seed = seed if self.split == "train" else (0,)
        rng = np.random.default_rng([*seed, _SPLIT_NUMBER[self.split], index])
        page, digits = _page(self.split, rng, self.image_size, self.filled)
        kind = self.kinds[int(rng.integers(len(self.kinds)))]
        question, looks, working, answer = _question(kind, digits, rng)
        return Sample(
            id=f"digits-{self.split}-{index}",
            question=question,
            answer=answer,
            images=(page,),
            columns={"kind": kind, "digits": digits, "looks": looks, "working": working},
        )


def reading(place: int, digit: int | None) -> str:
    """How a trace states what it saw at one place, e.g. "upper left 7"."""
    return f"{PLACES[place]} {'none' if digit is None else digit}"


def conclude(kind: str, looks: Sequence[int], digits: Sequence[int | None], question: str) -> tuple[str, str]:
    """(working, answer) that follow from readings, right or wrong: "3 + 8 = 11", "11"."""
    seen = [digits[place] for place in looks]
    values = [digit or 0 for digit in seen]
    match kind:
        case "read":
            return f"It is {values[0]}", str(values[0])
        case "add":
            return f"{values[0]} + {values[1]} = {sum(values)}", str(sum(values))
        case "subtract":
            high, low = max(values), min(values)
            return f"{high} - {low} = {high - low}", str(high - low)
        case "compare":
            return f"{max(values)} is larger than {min(values)}", str(max(values))
        case _:
            bound = int(
                next(word for word in question.replace("?", " ").replace("s ", " ").split() if word.isdigit())
            )
            hits = [d for d in seen if d is not None and (d == bound if kind == "count" else d > bound)]
            return f"Found {len(hits)}", str(len(hits))


def _question(
    kind: str, digits: tuple[int | None, ...], rng: np.random.Generator
) -> tuple[str, tuple[int, ...], str, str]:
    """(question, places to look at, working, answer) for a page."""
    filled = [place for place, digit in enumerate(digits) if digit is not None]
    looks: tuple[int, ...]
    match kind:
        case "read":
            looks = (int(rng.choice(filled)),)
            question = f"What is the {PLACES[looks[0]]} digit?"
        case "add" | "subtract":
            full = [name for name, pair in PAIRS.items() if set(pair) <= set(filled)]
            if not full:  # only a diagonal is filled: ask for the sum or difference of "the two digits"
                looks, name = (filled[0], filled[1]), ""
            else:
                name = full[int(rng.integers(len(full)))]
                looks = PAIRS[name]
            pair = f"two {name} digits" if name else "two digits"
            question = f"Add the {pair}." if kind == "add" else f"What is the difference of the {pair}?"
        case "compare":
            first, second = rng.permutation(filled)[:2]
            looks = (int(first), int(second))
            question = f"Which is larger, the {PLACES[first]} or the {PLACES[second]} digit?"
        case "count":
            looks = (0, 1, 2, 3)
            wanted = (
                digits[filled[int(rng.integers(len(filled)))]]
                if rng.random() < 0.8
                else int(rng.integers(10))
            )
            question = f"How many {wanted}s are there?"
        case _:
            looks = (0, 1, 2, 3)
            question = f"How many digits are larger than {int(rng.integers(1, 8))}?"
    working, answer = conclude(kind, looks, digits, question)
    return question, looks, working, answer


def _page(
    split: str, rng: np.random.Generator, size: int, counts: Sequence[int]
) -> tuple[Image.Image, tuple[int | None, ...]]:
    """A sheet and the digit at each place, None where it is empty."""
    pixels, labels = _scans()
    pool = range(len(labels))[_SCANS[split]]
    count = int(rng.choice(counts))
    filled = set(rng.permutation(4)[:count].tolist())
    cell = size // 2
    sheet = rng.normal(20, 8, (size, size))
    digits: list[int | None] = []
    for place in range(4):
        if place not in filled:
            digits.append(None)
            continue
        scan = pool[int(rng.integers(len(pool)))]
        side = int(rng.integers(int(cell * 0.65), int(cell * 0.95)))
        x, y = (int(rng.integers(0, cell - side + 1)) for _ in range(2))
        x, y = x + cell * (place % 2), y + cell * (place // 2)
        enlarged = Image.fromarray(pixels[scan]).resize((side, side), Image.Resampling.BILINEAR)
        sheet[y : y + side, x : x + side] += np.asarray(enlarged, dtype=float) * float(rng.uniform(0.7, 0.9))
        digits.append(int(labels[scan]))
    grey = Image.fromarray(np.clip(sheet, 0, 255).astype(np.uint8))
    return grey.convert("RGB"), tuple(digits)


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Pixels [1797, 8, 8] in 0..255 and labels [1797], in a fixed shuffled order.

    The set lists its writers one after another; shuffled, every split has all hands and digits.
    """
    with resources.files("reflectvlm.data").joinpath("digits.npz").open("rb") as file:
        data = np.load(file)
        return data["pixels"], data["labels"]
