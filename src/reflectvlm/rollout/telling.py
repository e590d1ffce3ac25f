"""An answer told while it grows: what of it is new."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from reflectvlm.rollout.placing import text_ids
from reflectvlm.types import Rollout, Spans, Visual


class Telling:
    """Remembers what of one answer has been told already."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._told = ""
        self._blocks = 0

    def news(self, spans: Spans) -> Iterator[str | Visual]:
        """What has come since: blocks where they stand, text up to the last whole character. Of a tag of
        several tokens with a block in front, the first ones have been told when the block comes."""
        places = [place for place, span in enumerate(spans) if isinstance(span, Visual)]
        for place in places[self._blocks :]:
            before = self._decode(text_ids(spans[:place]))
            yield before[len(self._told) :]
            block = spans[place]
            assert isinstance(block, Visual)
            yield block
            self._told = max(self._told, before, key=len)
        self._blocks = len(places)
        text = self._decode(text_ids(spans))
        if not text.endswith("\ufffd"):  # else a character of several tokens is not complete yet
            yield text[len(self._told) :]
            self._told = text

    def rest(self, rollout: Rollout) -> str:
        return rollout.text[len(self._told) :]
