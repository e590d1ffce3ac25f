r"""Putting a second look into an answer: what stands before it is kept letter by letter. Pure.

    Look-Back (arXiv 2507.03019)  <think>KEPT</think> <back>look</back> <think>rest</think> \boxed{answer}
    Qwen-LA (arXiv 2505.23558)    KEPT<REFLECTION>look</REFLECTION><CONCLUSION>answer</CONCLUSION>

In the semantic variant the reasoning is cut between two sentences, near its middle; in the solution variant
it is kept whole, up to the box. Where to cut is our decision: the paper does not say. Left out: answers with
several boxes, or with a tag of the layout in them, which have no place for a look that would be theirs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from reflectvlm.tags import Layout, find_boxes, layout_tags, look_back, parse, qwen_la

Method = Literal["semantic_back", "solution_back", "qwen_la"]
METHODS: tuple[Method, ...] = ("semantic_back", "solution_back", "qwen_la")

_TAGS = (*layout_tags(look_back()), *layout_tags(qwen_la()))
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_OPENER = re.compile(r"(?:\$\$?|\\\[|\\\(|\*\*)\s*\Z")  # what a box is often set in
_END = re.compile(r"[.!?][\"')\]]*(?=\s)|[。！？]|(?<=\S)(?=\s*\n)")
_NO_END = re.compile(r"(?:^|\n)\s*\d+\.\Z|\b(?:e\.g|i\.e|cf|[Ff]igs?|[Ee]qs?|vs|approx|[Nn]o)\.\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    r"""An answer without tags, taken apart. Of "Left 3. 3 + 4 = 7. \boxed{7}" the reasoning is
    "Left 3. 3 + 4 = 7." and the answer "7"."""

    reasoning: str
    """A piece of the text as it stands there, without white space around it."""
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spliced:
    text: str
    kept: str


def layout_of(method: Method) -> Layout:
    return qwen_la() if method == "qwen_la" else look_back(method.removesuffix("_back"))


def draft(text: str) -> Draft | str:
    """The parts of an answer, or in a few words why it has none that can be used."""
    thought = _THOUGHT.match(text)
    rest = text[thought.end() :] if thought else text
    boxes = find_boxes(text)
    if text.count("\\boxed") != 1 or len(boxes) != 1:
        return "not exactly one box"
    if thought and boxes[0].start < thought.end():
        return "box inside of the thought"
    reasoning = (thought[1] if thought else text[: boxes[0].start]).strip()
    reasoning = _OPENER.sub("", reasoning).rstrip()
    if any(tag in reasoning or (thought and tag in rest) for tag in _TAGS):
        return "tags in the answer"
    answer = boxes[0].content(text)
    if not reasoning or not answer:
        return "no reasoning" if answer else "empty box"
    return Draft(reasoning=reasoning, answer=answer)


def sentence_ends(text: str) -> tuple[int, ...]:
    """Where sentences end before the end of the text; a line's end is one too, "1." and "e.g." are none."""
    ends = (match.end() for match in _END.finditer(text))
    return tuple(end for end in dict.fromkeys(ends) if text[end:].strip() and not _NO_END.search(text[:end]))


def cut(reasoning: str, at: float = 0.5) -> int | None:
    """The end of a sentence nearest to the share `at` of the text, the earlier of two; None if it is one
    sentence."""
    ends = sentence_ends(reasoning)
    return min(ends, key=lambda end: (abs(end - at * len(reasoning)), end)) if ends else None


def with_look(kept: str, look: str, rest: str, answer: str) -> Spliced:
    text = f"<think>{kept}</think> <back>{look}</back> <think>{rest}</think> \\boxed{{{answer}}}"
    return Spliced(text=text, kept=kept)


def without_look(reasoning: str, answer: str) -> Spliced:
    """For a question that needs no second look: plain GRPO's layout."""
    return Spliced(text=f"<think>{reasoning}</think> \\boxed{{{answer}}}", kept=reasoning)


def before_conclusion(text: str) -> str | None:
    """An answer in Qwen-LA's layout up to the end of `</REASONING>`; None unless it is valid and has no
    reflection yet."""
    parsed = parse(qwen_la(), text)
    if not parsed.valid or any(block.tag == "REFLECTION" for block in parsed.blocks):
        return None
    return next(text[: block.end] for block in parsed.blocks if block.tag == "REASONING").lstrip()


def with_reflection(kept: str, look: str, answer: str) -> Spliced:
    text = f"{kept}<REFLECTION>{look}</REFLECTION><CONCLUSION>{answer}</CONCLUSION>"
    return Spliced(text=text, kept=kept)
