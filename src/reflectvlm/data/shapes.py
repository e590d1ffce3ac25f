"""Coloured shapes on white: a visual question task without files, for examples and first runs.

A scene is a set of (cell of a 3 x 3 grid, colour, shape). Whether it belongs to train (8 parts in
10), validation (1) or test (1) is decided by a hash of that set alone: not of the seed, not of the
index, not of the jitter that places a shape inside its cell. So no scene is ever in two splits,
not even in those of data sets with different seeds.

Every number is a function of (seed, split, index), and a sample is made when it is asked for.

Left out: overlapping shapes, and questions of more than one step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import permutations
from typing import Literal, NamedTuple, TypeAlias, overload

from PIL import Image, ImageDraw

from reflectvlm.types import Sample

Split: TypeAlias = Literal["train", "validation", "test"]

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 40),
    "purple": (150, 60, 180),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")

_BUCKETS: dict[Split, tuple[int, ...]] = {"train": tuple(range(8)), "validation": (8,), "test": (9,)}
_LENGTHS: dict[Split, int] = {"train": 2**31, "validation": 1_000, "test": 1_000}
_PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the centre", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)


class Thing(NamedTuple):
    """One shape of a scene. Row and column are those of its grid cell."""

    row: int
    column: int
    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return _PLACES[self.row][self.column]


Scene: TypeAlias = tuple[Thing, ...]


class Puzzle(NamedTuple):
    """A question about a scene; `facts` are true statements that lead to the answer, in order."""

    question: str
    answer: str
    facts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Shapes(Sequence[Sample]):
    """The samples of one split, each made on demand; see `shapes`."""

    split: Split
    size: int
    seed: int = 0
    image_size: int = 64
    max_objects: int = 3

    def __post_init__(self) -> None:
        if self.split not in _BUCKETS:
            raise ValueError(f"Shapes.split is {self.split!r}. It must be one of {', '.join(_BUCKETS)}.")
        rules = [
            ("size", self.size >= 1, "at least 1"),
            ("image_size", 24 <= self.image_size <= 4096, "24 to 4096"),
            ("max_objects", 1 <= self.max_objects <= 9, "1 to 9, one per grid cell"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"Shapes.{name} is {getattr(self, name)}. It must be {rule}.")

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return tuple(self._sample(i) for i in range(*index.indices(self.size)))
        if not -self.size <= index < self.size:
            raise IndexError(f"Shapes has {self.size} samples, so there is no number {index}.")
        return self._sample(index % self.size)

    def _sample(self, index: int) -> Sample:
        rng = random.Random(_hash(f"{self.seed}/{self.split}/{index}"))
        kind = rng.choice([kind for kind in KINDS if self.max_objects > 1 or kind not in _NEEDS_TWO])
        scene, puzzle = self._draw(kind, rng)
        boxes = [_box(thing, self.image_size, rng) for thing in scene]
        objects = [
            {"colour": thing.colour, "shape": thing.shape, "cell": (thing.row, thing.column), "box": box}
            for thing, box in zip(scene, boxes, strict=True)
        ]
        return Sample(
            id=f"shapes-{self.split}-{self.seed}-{index}",
            question=puzzle.question,
            answer=puzzle.answer,
            images=(_picture(scene, boxes, self.image_size),),
            columns={"kind": kind, "objects": objects, "facts": list(puzzle.facts)},
        )

    def _draw(self, kind: str, rng: random.Random) -> tuple[Scene, Puzzle]:
        """Scenes at random until one is of this split and answers this kind of question."""
        while True:
            scene = _scene(rng, self.max_objects)
            if _hash(str([tuple(thing) for thing in scene])) % 10 in _BUCKETS[self.split]:
                puzzle = KINDS[kind](scene, rng)
                if puzzle is not None:
                    return scene, puzzle


def shapes(
    split: Split = "train",
    size: int | None = None,
    seed: int = 0,
    image_size: int = 64,
    max_objects: int = 3,
) -> Shapes:
    """Samples of the coloured-shapes task. `size` is unlimited (2**31) for train and a thousand
    for the others if left out; sample number i is the same whatever the size.

    `Sample.columns` holds `kind` (a key of `KINDS`), `objects` (colour, shape, cell = (row, column),
    box = (left, top, right, bottom) in pixels, the last two excluded) and `facts`.
    """
    length = _LENGTHS.get(split, 1) if size is None else size
    return Shapes(split=split, size=length, seed=seed, image_size=image_size, max_objects=max_objects)


def _count_colour(scene: Scene, rng: random.Random) -> Puzzle:
    colour = rng.choice([thing.colour for thing in scene] * 3 + list(COLOURS))
    found = [thing for thing in scene if thing.colour == colour]
    return Puzzle(f"How many {colour} shapes are there?", str(len(found)), _listing(found, f"{colour} shape"))


def _count_shape(scene: Scene, rng: random.Random) -> Puzzle:
    shape = rng.choice([thing.shape for thing in scene] * 3 + list(SHAPES))
    found = [thing for thing in scene if thing.shape == shape]
    return Puzzle(f"How many {shape}s are there?", str(len(found)), _listing(found, shape))


def _colour_of(scene: Scene, rng: random.Random) -> Puzzle | None:
    single = [thing for thing in scene if sum(other.shape == thing.shape for other in scene) == 1]
    if not single:
        return None
    thing = rng.choice(single)
    facts = (f"The only {thing.shape} is {thing.place}.", f"It is {thing.colour}.")
    return Puzzle(f"What colour is the {thing.shape}?", thing.colour, facts)


def _compare(scene: Scene, rng: random.Random) -> Puzzle:
    counts = {shape: sum(thing.shape == shape for thing in scene) for shape in SHAPES}
    pairs = list(permutations(SHAPES, 2))
    # Both orders of a pair are equally likely, so unequal counts give as many yes as no.
    unequal = [pair for pair in pairs if counts[pair[0]] != counts[pair[1]]]
    first, second = rng.choice(unequal or pairs)
    facts = tuple(f"The number of {shape}s is {counts[shape]}." for shape in (first, second))
    answer = "yes" if counts[first] > counts[second] else "no"
    return Puzzle(f"Are there more {first}s than {second}s?", answer, facts)


def _left_of(scene: Scene, rng: random.Random) -> Puzzle | None:
    pair = _told_apart(scene, rng, lambda thing: thing.column)
    if pair is None:
        return None
    one, other = pair
    answer = "yes" if one.column < other.column else "no"
    return Puzzle(f"Is the {one.name} left of the {other.name}?", answer, _whereabouts(one, other))


def _above(scene: Scene, rng: random.Random) -> Puzzle | None:
    pair = _told_apart(scene, rng, lambda thing: thing.row)
    if pair is None:
        return None
    one, other = pair
    answer = "yes" if one.row < other.row else "no"
    return Puzzle(f"Is the {one.name} above the {other.name}?", answer, _whereabouts(one, other))


KINDS: dict[str, Callable[[Scene, random.Random], Puzzle | None]] = {
    "count_colour": _count_colour,
    "count_shape": _count_shape,
    "colour_of": _colour_of,
    "compare": _compare,
    "left_of": _left_of,
    "above": _above,
}
"""Kinds of questions; None where a scene gives no unambiguous one."""

_NEEDS_TWO = ("left_of", "above")


def _listing(found: Sequence[Thing], what: str) -> tuple[str, ...]:
    if not found:
        return (f"There is no {what}.",)
    return (
        *(f"A {thing.name} is {thing.place}." for thing in found),
        f"The number of {what}s is {len(found)}.",
    )


def _whereabouts(one: Thing, other: Thing) -> tuple[str, ...]:
    return (f"The {one.name} is {one.place}.", f"The {other.name} is {other.place}.")


def _told_apart(scene: Scene, rng: random.Random, axis: Callable[[Thing], int]) -> tuple[Thing, Thing] | None:
    """Two shapes with names of their own that differ on the axis, in a random order."""
    names = [thing.name for thing in scene]
    own = [thing for thing in scene if names.count(thing.name) == 1]
    pairs = [(a, b) for a, b in permutations(own, 2) if axis(a) != axis(b)]
    return rng.choice(pairs) if pairs else None


def _scene(rng: random.Random, most: int) -> Scene:
    """Shapes in reading order, which makes the tuple the scene's one canonical form."""
    cells = sorted(rng.sample(range(9), rng.randint(1, most)))
    return tuple(Thing(cell // 3, cell % 3, rng.choice(list(COLOURS)), rng.choice(SHAPES)) for cell in cells)


def _hash(text: str) -> int:
    # Python's own hash of a text differs from process to process.
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _box(thing: Thing, image_size: int, rng: random.Random) -> tuple[int, int, int, int]:
    """A square inside the thing's cell, half to nine tenths of its side, at a random place in it."""
    cell = image_size / 3
    side = int(cell * rng.uniform(0.5, 0.9))
    left = int(thing.column * cell + rng.uniform(0, cell - side - 1)) + 1
    top = int(thing.row * cell + rng.uniform(0, cell - side - 1)) + 1
    return left, top, left + side, top + side


def _picture(scene: Scene, boxes: Sequence[tuple[int, int, int, int]], image_size: int) -> Image.Image:
    image = Image.new("RGB", (image_size, image_size), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for thing, (left, top, right, bottom) in zip(scene, boxes, strict=True):
        colour, inside = COLOURS[thing.colour], (left, top, right - 1, bottom - 1)
        if thing.shape == "circle":
            pen.ellipse(inside, fill=colour)
        elif thing.shape == "square":
            pen.rectangle(inside, fill=colour)
        else:
            corners = [((left + right - 1) / 2, top), (right - 1, bottom - 1), (left, bottom - 1)]
            pen.polygon(corners, fill=colour)
    return image
