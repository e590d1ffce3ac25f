r"""Tag layouts as data, and the one strict parser that every reward, metric and picture uses.

Look-Back (arXiv 2507.03019):  <think>…</think> <back>…</back> <think>…</think> \boxed{answer}
Qwen-LA   (arXiv 2505.23558):  <SUMMARY> <CAPTION> <REASONING> <CONCLUSION>, each once and in this
                               order, and <REFLECTION> any number of times between or after them.

Strict means: a text is valid only if the *whole* of it is the layout. Order, number, nesting,
overlap, empty blocks, unclosed tags, text beside the blocks, a second box and text after the box
are all looked at, and the first fault is said in words. Time is linear in the text's length.

Left out: attributes in tags, nested layouts, spellings that differ in case. `<Think>` is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

_TAG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_BOX_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """How often a tag may stand at one place of a layout. Example: `Block("back")` = exactly once."""

    tag: str
    min: int = 1
    max: int | None = 1
    """None: any number."""
    allow_empty: bool = False
    """True: `<tag></tag>` and pure white space are fine."""

    def __post_init__(self) -> None:
        if not _TAG_NAME.fullmatch(self.tag):
            raise ValueError(
                f"Block tag {self.tag!r} is not a tag name. Write letters, digits, '_' and '-' only, "
                "without the angle brackets: Block('back')."
            )
        if self.min < 0 or (self.max is not None and self.max < max(self.min, 1)):
            raise ValueError(
                f"Block {self.tag!r} has min={self.min} and max={self.max}. "
                "It needs 0 <= min <= max and max >= 1; max=None allows any number."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    r"""The order of an answer's blocks.

    Example: `Layout(name="short", blocks=(Block("think"),), boxed=True)` is
    `<think>…</think> \boxed{…}`.
    """

    name: str
    blocks: tuple[Block, ...]
    """In this order."""
    floating: tuple[Block, ...] = ()
    """Anywhere after the first of `blocks` has ended, never inside another block."""
    boxed: bool = False
    r"""True: exactly one `\boxed{…}` in the whole text, after the last block, and nothing after it."""
    answer_tag: str | None = None
    """The block whose text is the answer, if it is not the box."""
    free_text: bool = False
    """True: text may also stand between the blocks and before the box."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "floating", tuple(self.floating))
        ordered = {block.tag for block in self.blocks}
        if both := sorted(ordered & {block.tag for block in self.floating}):
            raise ValueError(
                f"Layout {self.name!r} has {both} both in blocks and in floating. "
                "A tag has a fixed place or floats: keep it in one of them."
            )
        empty_rules = {(block.tag, block.allow_empty) for block in (*self.blocks, *self.floating)}
        if len(empty_rules) > len({tag for tag, _ in empty_rules}):
            raise ValueError(
                f"Layout {self.name!r} allows an empty block in one place of a tag and not in another. "
                "Give every Block of one tag the same allow_empty."
            )
        if self.boxed and self.answer_tag:
            raise ValueError(
                f"Layout {self.name!r} has boxed=True and answer_tag={self.answer_tag!r}. "
                "The answer stands in one place: give one of them."
            )
        places = [block for block in self.blocks if block.tag == self.answer_tag]
        if self.answer_tag and (len(places) != 1 or (places[0].min, places[0].max) != (1, 1)):
            raise ValueError(
                f"Layout {self.name!r} takes its answer from {self.answer_tag!r}, which must stand in "
                f"blocks exactly once. Tags in blocks: {sorted(ordered)}."
            )


class Found(NamedTuple):
    """A block in a text: `text[start:end] == f"<{tag}>{content}</{tag}>"`."""

    tag: str
    content: str
    start: int
    end: int


class Box(NamedTuple):
    r"""A brace-balanced box: `text[start:end]` is `\boxed{…}`, `text[inner:end - 1]` its content.

    Offsets only: cutting out the contents of boxes nested 10,000 deep would take quadratic time.
    """

    start: int
    inner: int
    end: int

    def content(self, text: str) -> str:
        return text[self.inner : self.end - 1].strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """What `parse` found."""

    valid: bool
    problem: str
    """The first fault in words; empty if valid."""
    blocks: tuple[Found, ...]
    """In the order of the text. Of an invalid text: the well-formed blocks before the fault."""
    answer: str | None
    """Text of the box or of the answer tag, stripped. None if invalid or if the layout has neither."""


def parse(layout: Layout, text: str) -> Parsed:
    """Holds `text` against `layout`; see the file's docstring for what strict means."""
    found, problem = _scan(layout, text)
    boxes = find_boxes(text) if layout.boxed else ()
    problem = (
        problem
        or _order_problem(layout, found)
        or _floating_problem(layout, found)
        or _empty_problem(layout, found)
        or _box_problem(layout, text, found, boxes)
        or _outside_problem(layout, text, found, boxes)
    )
    answer = None if problem else _answer(layout, text, found, boxes)
    return Parsed(valid=not problem, problem=problem, blocks=found, answer=answer)


def tag_names(layout: Layout) -> tuple[str, ...]:
    """Each tag of the layout once: `("think", "back")` for Look-Back."""
    return tuple(dict.fromkeys(block.tag for block in (*layout.blocks, *layout.floating)))


def layout_tags(layout: Layout) -> tuple[str, ...]:
    """Each opening and closing tag once: `("<think>", "</think>", "<back>", "</back>")` for Look-Back."""
    return tuple(tag for name in tag_names(layout) for tag in (f"<{name}>", f"</{name}>"))


def find_boxes(text: str) -> tuple[Box, ...]:
    r"""All brace-balanced `\boxed{…}`, by where they end. Escaped braces (`\{`) do not count."""
    open_braces: list[tuple[int, int] | None] = []  # None: a brace that opens no box
    boxes: list[Box] = []
    for token in _BOX_TOKEN.finditer(text):
        piece = token.group()
        if piece == "{":
            open_braces.append(None)
        elif piece == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None:
                boxes.append(Box(*opened, token.end()))
        elif piece.startswith("\\boxed"):
            open_braces.append(token.span())
    return tuple(boxes)


def look_back(variant: str = "semantic") -> Layout:
    r"""Look-Back, arXiv 2507.03019: `<think> <back> <think> \boxed{}`.

    Both variants have this skeleton. They differ in what the `<back>` block is for, which the
    prompt and the cold-start data say: "semantic" re-examines details in the middle of the
    reasoning, "solution" verifies a finished preliminary solution.
    """
    variants = ("semantic", "solution")
    if variant not in variants:
        near = get_close_matches(str(variant), variants, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"look_back has no variant {variant!r}, only {list(variants)}. Did you mean {near!r}?"
        )
    return Layout(
        name=f"look_back_{variant}",
        blocks=(Block("think"), Block("back"), Block("think")),
        boxed=True,
    )


def grpo() -> Layout:
    r"""The plain GRPO baseline beside Look-Back: `<think>…</think> \boxed{}`, no `<back>`.

    The paper does not print the baseline's layout; one thought and a box is our reading.
    """
    return Layout(name="grpo", blocks=(Block("think"),), boxed=True)


def qwen_la() -> Layout:
    """Qwen-LA, arXiv 2505.23558: four blocks in order, `<REFLECTION>` (may be empty) at will."""
    return Layout(
        name="qwen_la",
        blocks=(Block("SUMMARY"), Block("CAPTION"), Block("REASONING"), Block("CONCLUSION")),
        floating=(Block("REFLECTION", min=0, max=None, allow_empty=True),),
        answer_tag="CONCLUSION",
    )


def _scan(layout: Layout, text: str) -> tuple[tuple[Found, ...], str]:
    """Well-formed blocks up to the first fault in nesting, and that fault."""
    found: list[Found] = []
    names = tag_names(layout)
    if not names:
        return (), ""
    inside: tuple[str, int, int] | None = None
    for match in re.finditer(rf"<(/?)({'|'.join(map(re.escape, names))})>", text):
        closing, tag = match.groups()
        if inside is None and closing:
            return tuple(found), f"</{tag}> without <{tag}> before it"
        if inside is None:
            inside = (tag, match.start(), match.end())
            continue
        if not closing:
            return tuple(found), f"<{tag}> inside <{inside[0]}>: blocks must not be nested"
        if tag != inside[0]:
            return tuple(found), f"</{tag}> inside <{inside[0]}>: blocks must not overlap"
        found.append(Found(tag, text[inside[2] : match.start()], inside[1], match.end()))
        inside = None
    return tuple(found), f"<{inside[0]}> is never closed" if inside else ""


_State = tuple[int, int]  # (place in layout.blocks, how often the tag there has been seen)


def _moves(blocks: tuple[Block, ...], state: _State) -> Iterator[tuple[str, _State]]:
    """All tags that may come next, with the state after each; "" if the text may end here."""
    place, seen = state
    for here in range(place, len(blocks)):
        block = blocks[here]
        if block.max is None or seen < block.max:
            # Without a maximum only "enough" matters: the number of states stays small.
            yield block.tag, (here, seen + 1 if block.max else min(seen + 1, max(block.min, 1)))
        if seen < block.min:
            return
        seen = 0
    yield "", (len(blocks), 0)


def _order_problem(layout: Layout, found: tuple[Found, ...]) -> str:
    """Runs all ways to read the sequence of tags at once, so optional blocks need no backtracking."""
    fixed = {block.tag for block in layout.blocks}
    states: set[_State] = {(0, 0)}
    for tag in [*(block.tag for block in found if block.tag in fixed), ""]:
        moves = [move for state in states for move in _moves(layout.blocks, state)]
        states = {state for name, state in moves if name == tag}
        if not states:
            expected = " or ".join(f"<{name}>" if name else "the end" for name in dict(moves))
            return f"expected {expected}, found {f'<{tag}>' if tag else 'no further block'}"
    return ""


def _floating_problem(layout: Layout, found: tuple[Found, ...]) -> str:
    floating = {block.tag for block in layout.floating}
    if layout.blocks and found and found[0].tag in floating:
        return f"<{found[0].tag}> before the first block"
    for block in layout.floating:
        times = sum(item.tag == block.tag for item in found)
        if times < block.min:
            return f"<{block.tag}> occurs {times} times, at least {block.min} wanted"
        if block.max is not None and times > block.max:
            return f"<{block.tag}> occurs {times} times, at most {block.max} wanted"
    return ""


def _empty_problem(layout: Layout, found: tuple[Found, ...]) -> str:
    may_be_empty = {block.tag for block in (*layout.blocks, *layout.floating) if block.allow_empty}
    for block in found:
        if block.tag not in may_be_empty and not block.content.strip():
            return f"<{block.tag}> is empty"
    return ""


def _box_problem(layout: Layout, text: str, found: tuple[Found, ...], boxes: tuple[Box, ...]) -> str:
    if not layout.boxed:
        return ""
    opened = sum(1 for token in _BOX_TOKEN.finditer(text) if token.group().startswith("\\boxed"))
    if opened != 1:
        return f"{opened} boxes, exactly one \\boxed{{}} wanted" if opened else "no \\boxed{}"
    if not boxes:
        return "\\boxed{ is never closed"
    (box,) = boxes
    if found and box.start < found[-1].end:
        return "\\boxed{} before the end of the last block"
    if not box.content(text):
        return "\\boxed{} is empty"
    return "text after \\boxed{}" if text[box.end :].strip() else ""


def _outside_problem(layout: Layout, text: str, found: tuple[Found, ...], boxes: tuple[Box, ...]) -> str:
    if layout.free_text:
        return ""
    position = 0
    for start, end in [
        *((block.start, block.end) for block in found),
        *((box.start, box.end) for box in boxes),
    ]:
        if text[position:start].strip():
            return f"text outside of the blocks at character {position}"
        position = end
    return f"text outside of the blocks at character {position}" if text[position:].strip() else ""


def _answer(layout: Layout, text: str, found: tuple[Found, ...], boxes: tuple[Box, ...]) -> str | None:
    if layout.boxed:
        return boxes[0].content(text)
    texts = [block.content.strip() for block in found if block.tag == layout.answer_tag]
    return texts[0] if texts else None
