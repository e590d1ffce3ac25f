"""How many tokens a question with its images takes, from the images' sizes alone: no pixel is processed.

The chat template and the instruction count, as in training. Visual tokens follow from the rule by which the
model's image processor resizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from reflectvlm.data.prompt_maker import PromptMaker
from reflectvlm.spans import count_tokens
from reflectvlm.types import Grid


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptLength:
    """Example: `PromptLength(maker=PromptMaker.load("tiny"), limit=512)("How many?", [(64, 64)])` is None:
    it fits."""

    maker: PromptMaker
    limit: int
    """Most tokens of a prompt."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"max_tokens is {self.limit}. It must be at least 1.")

    def tokens(self, question: str, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """Tokens of the prompt, and how many of them are visual."""
        processor = self.maker.image_processor
        side = processor.patch_size * processor.merge_size
        resized = [self.maker.size(*size) for size in sizes]
        grids = [Grid(1, height // side, width // side) for width, height in resized]
        spans = self.maker.spans(question, len(sizes))
        return count_tokens(spans, grids), sum(grid.tokens for grid in grids)

    def __call__(self, question: str, sizes: list[tuple[int, int]]) -> str | None:
        tokens, visual = self.tokens(question, sizes)
        if tokens <= self.limit:
            return None
        alone = " Its images alone are too long: lower max_pixels." if visual >= self.limit else ""
        return f"Its prompt has {tokens:,} tokens ({visual:,} of images), {self.limit:,} are allowed.{alone}"
