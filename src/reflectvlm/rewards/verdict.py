"""What a judge says about an answer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Example: `Verdict(score=1.0, why="3 + 8 is 11")`, `Verdict(score=None, why="HTTP 500")`."""

    score: float | None
    """From 0, wrong, to 1, right. None: unscored, and never to be counted as 0."""
    why: str = ""

    def __post_init__(self) -> None:
        if self.score is not None and not (math.isfinite(self.score) and 0 <= self.score <= 1):
            raise ValueError(
                f"Verdict.score is {self.score}. It must be in [0, 1], or None if the judge cannot decide."
            )


def case_of(question: str, gold: str, answer: str, images: Sequence[Image] = ()) -> str:
    """A name for what is judged, made of its content: the same in every run and on every machine."""
    pictures = [
        hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
        for image in images
    ]
    content = json.dumps([question, gold, answer, pictures])
    return hashlib.sha256(content.encode()).hexdigest()
