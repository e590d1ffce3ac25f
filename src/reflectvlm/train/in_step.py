"""Passes in step: with shared weights every process makes as many passes as the one with the most.

Under ZeRO-2 and -3 a pass is also a sequence of messages. A process with fewer rows, or whose rows show no
image, would leave the others waiting for ever. So it makes up the number: with a row of a few tokens, whose
loss counts 0 times, and with a small blank image, whose features nobody uses.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from reflectvlm.batch import Batch
from reflectvlm.protocols import Policy
from reflectvlm.train.ranks import Ranks
from reflectvlm.types import Instruction, Patches, Sample

T = TypeVar("T")


@dataclass(kw_only=True, eq=False)
class InStep:
    """Makes up the passes of one process to those of the others."""

    ranks: Ranks
    policy: Policy
    on: bool
    """False: processes need not be in step, and nothing is added."""

    def passes(self, own: Sequence[T]) -> list[T | None]:
        """A process's passes; None stands for one that is made up."""
        if not self.on:
            return list(own)
        (most,) = self.ranks.most([len(own)])
        return [*own, *[None] * (int(most) - len(own))]

    def image_parts(self, own: Sequence[tuple[Patches, ...]]) -> list[tuple[Patches, ...]]:
        """A process's passes of the vision tower. If none has an image, nobody runs it."""
        if not self.on:
            return list(own)
        count = sum(bool(part) for part in own)
        (most,) = self.ranks.most([count])
        parts = [part for part in own if part] if most else list(own)
        return [*parts, *[(self.image,)] * (int(most) - count)]

    @functools.cached_property
    def row(self) -> Batch:
        """A few tokens of text, one of them trained."""
        prompt = self.policy.prompt(_sample(), Instruction())
        return self.policy.batch([(prompt, self.policy.answer("."))])

    @functools.cached_property
    def image(self) -> Patches:
        from PIL import Image

        blank = Image.new("RGB", (112, 112))
        (patches,) = self.policy.prompt(_sample(blank), Instruction()).patches
        return patches


def _sample(*images: object) -> Sample:
    return Sample(id="made up", question=".", answer=".", images=images)  # type: ignore[arg-type]
