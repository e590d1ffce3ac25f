"""A control for inserted images: as many text tokens in the same place, and no image.

What COPY or ROUTE changes in an answer may come of the image shown again, or of a longer context, a pause,
or tokens to attend to. With text of the same number of tokens instead, only the last is left.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from reflectvlm.protocols import DecodeState, Reattention
from reflectvlm.spans import count_tokens
from reflectvlm.types import AttentionProbe, Insertion, Prompt, Spans, Text, Visual


@dataclass(frozen=True, kw_only=True)
class MatchedText:
    """Satisfies `protocols.Reattention`: what `like` inserts, with every image block turned into text.

    Example: `MatchedText(like=VisualCopy(trigger="<back>", limit=1))`

    A limit of `like` counts as before; its `budget` does not, since it counts image blocks. The text's
    positions go on by one per token, those of an image by the longer of its sides.
    """

    like: Reattention
    text: str = "\n"
    """Repeated until it has as many tokens as the block, the two around it counted."""

    def __post_init__(self) -> None:
        if self.like.trigger is None:
            raise ValueError(
                f"MatchedText.like is {type(self.like).__name__}, which never inserts anything. Give "
                f"VisualCopy or "
                "VisualRoute."
            )
        if not self.text:
            raise ValueError("MatchedText.text is empty. Give the text that is repeated, e.g. a line break.")

    @property
    def trigger(self) -> str | None:
        return self.like.trigger

    @property
    def probe(self) -> AttentionProbe | None:
        return self.like.probe

    def __call__(self, state: DecodeState, /) -> Insertion | None:
        wanted = self.like(state)
        if not wanted:
            return None
        ids = state.ids(self.text)
        return Insertion(
            before=_as_text(wanted.before, state.prompt, ids),
            after=_as_text(wanted.after, state.prompt, ids),
        )


def _as_text(spans: Spans, prompt: Prompt, ids: tuple[int, ...]) -> Spans:
    def text(span: Text | Visual) -> Text:
        if isinstance(span, Text):
            return span
        count = count_tokens((span,), prompt.grids)
        return Text(ids=tuple(itertools.islice(itertools.cycle(ids), count)))

    return tuple(map(text, spans))
