"""Is the trace in its paper's layout, by the strict parser? And the parts of one that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar, NamedTuple

from reflectvlm import tags
from reflectvlm.curate.types import Look, Trace
from reflectvlm.tags import Block, Found, Layout

LOOKS = ("back", "REFLECTION")
"""Tags of a second look."""
METHODS: Mapping[str, Layout] = {
    "semantic_back": tags.look_back("semantic"),
    "solution_back": tags.look_back("solution"),
    "qwen_la": tags.qwen_la(),
}


@dataclass(frozen=True, kw_only=True)
class InLayout:
    """The whole text is the layout of the trace's method. Where no second look is needed it has none:
    `<think>` and the box for Look-Back, no `<REFLECTION>` or an empty one for Qwen-LA; else it has one that
    is not empty."""

    name: ClassVar[str] = "layout"

    def __call__(self, trace: Trace, /) -> str | None:
        if trace.look == "unneeded" and "<back>" in trace.text:
            return "a second look where none is needed"
        parsed = tags.parse(layout_of(trace.method, trace.look), trace.text)
        if not parsed.valid:
            return parsed.problem
        looks = any(block.tag in LOOKS and block.content.strip() for block in parsed.blocks)
        if trace.look == "unneeded":
            return "a second look where none is needed" if looks else None
        return None if looks else "no second look"


def layout_of(method: str, look: Look = "confirmed") -> Layout:
    """The layout of a method's traces with this kind of look."""
    if method not in METHODS:
        near = get_close_matches(str(method), METHODS, n=1, cutoff=0.0)[0]
        raise ValueError(f"There is no method {method!r}, only {list(METHODS)}. Did you mean {near!r}?")
    layout = METHODS[method]
    if look != "unneeded" or not layout.boxed:
        return layout
    return dataclasses.replace(layout, blocks=(Block("think"),))


class Parts(NamedTuple):
    """The blocks of a trace in their order; of one that is not in its layout, those before the fault."""

    blocks: tuple[Found, ...]
    answer: str | None

    def looks(self) -> tuple[int, ...]:
        """Places of the second looks that are not empty."""
        return tuple(
            place for place, block in enumerate(self.blocks) if block.tag in LOOKS and block.content.strip()
        )

    def before(self, place: int) -> str:
        """The texts of all blocks before this one."""
        return "\n".join(block.content for block in self.blocks[:place])


def parts(trace: Trace) -> Parts:
    parsed = tags.parse(layout_of(trace.method, trace.look), trace.text)
    return Parts(parsed.blocks, parsed.answer)
