"""Is the trace, and each of its blocks, neither too short nor too long?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from reflectvlm.curate.filters.layout import parts
from reflectvlm.curate.types import Trace

Bounds = tuple[int, int]


def _usual() -> Mapping[str, Bounds]:
    return {
        "think": (5, 12_000),
        "back": (10, 3_000),
        "SUMMARY": (5, 3_000),
        "CAPTION": (5, 6_000),
        "REASONING": (5, 12_000),
        "REFLECTION": (10, 3_000),
        "CONCLUSION": (1, 2_000),
    }


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths are of text without outer white space, bounds included; an empty block is the layout's matter.

    Example: `Lengths(text=(1, 2048), blocks={"back": (8, 300)}, count=lambda text:
    len(tokenizer.encode(text)), unit="tokens")`"""

    text: Bounds = (20, 16_000)
    """Least and most of the whole answer, tags and all."""
    blocks: Mapping[str, Bounds] = field(default_factory=_usual)
    """Least and most of each block with this tag; other blocks are not looked at."""
    count: Callable[[str], int] = len
    """How long a text is: by default its characters."""
    unit: str = "characters"
    name: ClassVar[str] = "length"

    def __post_init__(self) -> None:
        for what, (least, most) in {"text": self.text, **self.blocks}.items():
            if not 0 <= least <= most:
                raise ValueError(
                    f"Lengths has {(least, most)} for {what!r}. It needs 0 <= least <= most: (10, 3000)."
                )

    def __call__(self, trace: Trace, /) -> str | None:
        whole = [("the answer", trace.text, self.text)]
        blocks = [
            (f"<{block.tag}>", block.content, self.blocks[block.tag])
            for block in parts(trace).blocks
            if block.tag in self.blocks and block.content.strip()
        ]
        for what, text, (least, most) in whole + blocks:
            length = self.count(text.strip())
            if not least <= length <= most:
                rule = f"at least {least:,}" if length < least else f"at most {most:,}"
                return f"{what} has {length:,} {self.unit}, {rule} wanted"
        return None
