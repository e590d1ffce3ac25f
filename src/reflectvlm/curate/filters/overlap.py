"""Is the row in an evaluation set?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, get_args

from reflectvlm.curate.contamination import EVIDENCE, EvaluationIndex, Evidence
from reflectvlm.curate.hashes import row_hashes
from reflectvlm.curate.types import Question, Trace
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
        try:
            return self._found(trace.question, trace.text, self.evidence)
        except BadImage as bad:
            return f"an image cannot be read ({bad.reason})"

    def of_question(self, question: Question, /) -> str | None:
        """What is found of every trace of this question, whatever it says. A question whose images cannot be
        read is left to those that need them."""
        surely = [one for one in self.evidence if one != "image" or "text and image" in self.evidence]
        try:
            return self._found(question, "", surely)  # a trace's words can make an image text and image
        except BadImage:
            return None

    def _found(self, question: Question, more: str, evidence: Sequence[Evidence]) -> str | None:
        images = row_hashes(question.images, question.root, self.limits)
        for hit in self.index.hits(question.question, more, images):
            if hit.evidence in evidence:
                return f"{hit.evidence} of {hit.held.set} {hit.held.id}"
        return None
