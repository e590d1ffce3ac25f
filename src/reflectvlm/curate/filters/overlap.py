"""Is the row in an evaluation set?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, get_args

from reflectvlm.curate.contamination import EVIDENCE, EvaluationIndex, Evidence
from reflectvlm.curate.hashes import row_hashes
from reflectvlm.curate.types import Trace
from reflectvlm.data.fetch import BadImage, ImageLimits


@dataclass(frozen=True, kw_only=True)
class NoOverlap:
    """A trace whose question, text or images are in the index is not kept.

    Example: `NoOverlap(index=EvaluationIndex(held=[*held_in_task(MathVista(), folder)]))`
    """

    index: EvaluationIndex
    evidence: Sequence[Evidence] = EVIDENCE
    """Which of it counts. `("text and image",)` is for tasks that ask all their questions in the same
    words."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    name: ClassVar[str] = "overlap"

    def __post_init__(self) -> None:
        unknown = [one for one in self.evidence if one not in get_args(Evidence)]
        if isinstance(self.evidence, str) or unknown or not self.evidence:
            raise ValueError(f"NoOverlap.evidence is {self.evidence!r}. It is a list of some of {EVIDENCE}.")

    def __call__(self, trace: Trace, /) -> str | None:
        question = trace.question
        try:
            images = row_hashes(question.images, question.root, self.limits)
        except BadImage as bad:
            return f"an image cannot be read ({bad.reason})"
        for hit in self.index.hits(question.question, trace.text, images):
            if hit.evidence in self.evidence:
                return f"{hit.evidence} of {hit.held.set} {hit.held.id}"
        return None
