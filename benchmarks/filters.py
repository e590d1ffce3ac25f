"""What bounds of the filters mean on the built-in tasks: `python benchmarks/filters.py images=1200
traces=1500`.

How near different pictures come to each other, how far a picture moves when it is saved as JPEG, and how
much of a gold trace's second look stands before it already."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from reflectvlm.curate.filters.layout import parts
from reflectvlm.curate.filters.visible import copied_share
from reflectvlm.curate.hashes import distances, image_hash
from reflectvlm.curate.types import Question, Trace
from reflectvlm.data.digit_traces import DigitTraces, Style
from reflectvlm.data.digits import Digits
from reflectvlm.data.shapes import Shapes
from reflectvlm.types import Sample

STYLES: dict[Style, str] = {"semantic": "semantic_back", "solution": "solution_back", "qwen_la": "qwen_la"}


def main(images: int, traces: int) -> None:
    _pairs("digits", Digits(size=images))
    _pairs("shapes", Shapes(split="train", size=images))
    for style, method in STYLES.items():
        shares = [_copied(sample, method) for sample in DigitTraces(data=Digits(size=traces), style=style)]
        print(f"{style}: {max(shares):.0%} of a look's runs of three words stand before it at the most")


def _pairs(name: str, rows: Sequence[Sample]) -> None:
    pictures = [row.images[0] for row in rows]
    hashes = [image_hash(picture) for picture in pictures]
    structure = np.array([one.structure for one in hashes], np.uint64)
    colour = np.array([one.colour for one in hashes], np.uint64)
    near: dict[int, int] = dict.fromkeys((2, 4, 6, 8), 0)
    alike = dict(near)
    for place, one in enumerate(hashes):
        apart = distances(one.structure, structure[place + 1 :])
        tints = distances(one.colour, colour[place + 1 :])
        for bits in near:
            near[bits] += int((apart <= bits).sum())
            alike[bits] += int(((apart <= bits) & (tints <= 3)).sum())
    moved = [
        (_saved(picture) ^ one.structure).bit_count() for picture, one in zip(pictures, hashes, strict=True)
    ]
    pairs = len(rows) * (len(rows) - 1) // 2
    print(f"{name}: {pairs:,} pairs; within bits of structure {near}, with 3 of colour {alike}")
    print(
        f"{name}: saved as JPEG of quality 50 it moves by {np.mean(moved):.2f} bits, {max(moved)} at the most"
    )


def _saved(picture: Image.Image) -> int:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=50)
    return image_hash(Image.open(file).convert("RGB")).structure


def _copied(sample: Sample, method: str) -> float:
    question = Question(id=sample.id, question=sample.question, answer=sample.answer)
    found = parts(Trace(question=question, text=sample.columns["trace"], method=method))
    place = found.looks()[0]
    return copied_share(found.blocks[place].content, found.before(place))


if __name__ == "__main__":
    given = dict(word.split("=") for word in sys.argv[1:])
    main(int(given.get("images", "1200")), int(given.get("traces", "1500")))
