"""What of a step's rollouts is written down: texts, rewards by part, tokens with their log-probs, inserted
blocks; and small copies of their pictures. `samples.jsonl` and `sample_images/` of a run's folder.

Everything here is bounded: so many rollouts a step, so many tokens a rollout, so many pictures a run. Left
out: attention, which `reflectvlm report` asks the trained model for.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflectvlm.types import Rollout, ScoredGroup, Text, Visual

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_TOKENS = 8192
"""A rollout with more tokens is written without them; its text is there."""
MOST_PICTURES = 2000
"""Pictures that a run keeps."""
SMALL = 16_384
"""Bytes up to which a picture is kept without loss."""


def sample_rows(
    groups: Sequence[ScoredGroup], most: int, most_held_out: int | None = None
) -> Iterator[dict[str, Any]]:
    """At most `most` rollouts as plain values: of each group in turn the best and the worst. Where every
    group is one answer, as in an evaluation, at most `most_held_out` of them.

    Example: `{"sample": "digits-17", "question": "...", "answer": "11", "text": "3 + 5<back>...",
    "reward": 1.0, "parts": {"accuracy": 1.0}, "scored": True, "stop": "eos", "length": 31, "inserted": 1,
    "group": 8, "policy_version": 12, "images": ["9f86d0..."]}` and what `token_rows` gives.
    """
    for group, index in _chosen(groups, most, most_held_out):
        rollout = group.rollouts[index]
        sample = rollout.prompt.sample
        yield {
            "sample": sample.id,
            "question": sample.question,
            "answer": sample.answer,
            "text": rollout.text,
            "reward": group.rewards[index],
            "parts": {name: values[index] for name, values in group.parts.items()},
            "scored": group.scored[index],
            "stop": rollout.stop,
            "length": len(rollout.sampled_ids),
            "inserted": len(rollout.insertions),
            "group": len(group.rollouts),
            "policy_version": rollout.policy_version,
            "images": [image_digest(image) for image in sample.images],
            **token_rows(rollout),
        }


def token_rows(rollout: Rollout) -> dict[str, Any]:
    """An answer token by token: ids, the character at which each begins, its log-prob to three digits (None
    where it was forced), and each inserted block with the number of tokens in front of it.

    Example: `{"ids": [18, 77], "offsets": [0, 1], "logprobs": [-0.105, None], "grids": [[1, 4, 4]],
    "blocks": [{"after": 1, "image": 0, "keep": [3, 9], "before_sampled": False}]}`
    """
    ids: list[int] = []
    logprobs: list[float | None] = []
    blocks = []
    for span in rollout.spans:
        if isinstance(span, Text):
            ids += span.ids
            # Adding 0.0 makes -0.0, which rounding gives, a shorter 0.0.
            known = [round(value, 3) + 0.0 for value in span.logprobs]
            logprobs += known or [None] * len(span.ids)
        else:
            blocks.append(_block(span, len(ids)))
    row: dict[str, Any] = {"blocks": blocks, "grids": [list(grid) for grid in rollout.prompt.grids]}
    if len(ids) > MOST_TOKENS:
        return row
    return row | {"ids": ids, "offsets": list(rollout.offsets), "logprobs": logprobs}


@dataclass
class Pictures:
    """Small copies of samples' pictures in a folder, each once, under the digest of the whole picture.

    Example: `Pictures(run / "sample_images", side=256).keep(groups, 4)`
    """

    folder: Path
    side: int = 256
    """Longest side, in pixels; larger pictures are made smaller."""
    most: int = MOST_PICTURES
    _there: set[str] | None = field(default=None, init=False, repr=False)
    """Digests of those that are kept."""

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"Pictures.side is {self.side}. It must be at least 1 pixel.")

    def keep(self, groups: Sequence[ScoredGroup], most: int, most_held_out: int | None = None) -> None:
        """Those of the rollouts that `sample_rows` writes."""
        chosen = _chosen(groups, most, most_held_out)
        samples = {id(group): group.rollouts[index].prompt.sample for group, index in chosen}
        for sample in samples.values():
            for image in sample.images:
                self.add(image)

    def add(self, image: Image) -> None:
        """Writes one, unless it is there or there are enough."""
        if self._there is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._there = {file.stem for file in self.folder.iterdir() if not file.name.startswith(".")}
        digest = image_digest(image)
        if digest in self._there or len(self._there) >= self.most:
            return
        data, suffix = small_copy(image, self.side)
        aside = self.folder / f".{digest}.tmp"
        aside.write_bytes(data)
        os.replace(aside, self.folder / f"{digest}{suffix}")
        self._there.add(digest)


def small_copy(image: Image, side: int) -> tuple[bytes, str]:
    """A picture of at most `side` pixels as a file's bytes, and the file's suffix: PNG where that is small,
    as for drawn pages, else JPEG."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    whole = _bytes(small, "PNG", optimize=True)
    if len(whole) <= SMALL:
        return whole, ".png"
    return _bytes(small, "JPEG", quality=82), ".jpg"


def image_digest(image: Image) -> str:
    """sha256 of mode, size and pixels."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def _chosen(
    groups: Sequence[ScoredGroup], most: int, most_held_out: int | None
) -> Iterator[tuple[ScoredGroup, int]]:
    held_out = all(len(group.rollouts) == 1 for group in groups)
    extremes = (
        (group, index)
        for group in groups
        if group.rollouts
        for index in dict.fromkeys((_extreme(group, max), _extreme(group, min)))
    )
    return itertools.islice(extremes, most_held_out if held_out and most_held_out is not None else most)


def _extreme(group: ScoredGroup, pick: Callable[..., int]) -> int:
    return pick(range(len(group.rewards)), key=lambda index: group.rewards[index])


def _block(span: Visual, after: int) -> dict[str, Any]:
    keep = None if span.keep is None else list(span.keep)
    return {"after": after, "image": span.image, "keep": keep, "before_sampled": span.before_sampled}


def _bytes(image: Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
