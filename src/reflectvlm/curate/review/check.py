"""What is said about a trace while somebody edits it: the strict parser's word, and is its answer right?

The same parser (`tags.parse`) and the same equality (`Accuracy`) as in training, so that the page cannot
call a row good that the rewards would not.
"""

from __future__ import annotations

import functools
import re
import threading
from dataclasses import dataclass
from typing import Literal, get_args

from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.rewards.answers import extract_boxed
from reflectvlm.rewards.isolation import RewardError
from reflectvlm.tags import Layout, grpo, look_back, parse, qwen_la, tag_names

LayoutName = Literal["auto", "look_back", "qwen_la", "grpo", "none"]
LAYOUTS = get_args(LayoutName)

_LOOK_BACK, _QWEN_LA, _GRPO = look_back(), qwen_la(), grpo()
_OF_QWEN_LA = re.compile(rf"</?(?:{'|'.join(tag_names(_QWEN_LA))})>")
_OF_LOOK_BACK = re.compile(r"</?back>")
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What is to be said of a trace."""

    layout: str
    """The one that it was held against: `look_back`, `qwen_la`, `grpo` or `none`."""
    problem: str
    """The layout's first fault in words; empty if there is none."""
    answer: str | None
    """What the trace answers, if that can be told."""
    right: bool | None
    """Is it the gold answer? None: there is no gold answer, no answer, or nobody could tell."""
    why: str = ""
    """Why nobody could tell."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What speaks against training on it."""
        wrong = (
            f"the trace answers {self.answer!r}, which is not the gold answer" if self.right is False else ""
        )
        return tuple(filter(None, (self.problem, wrong, self.why)))


def check_trace(text: str, gold: str, layout: LayoutName = "auto") -> Checked:
    """`gold` may be empty: nothing is compared then."""
    with _one_at_a_time:  # sympy's workers are few
        try:
            return _checked(text, gold, layout)
        except RewardError as error:  # not remembered: the next time it may be settled
            held = _layout(text, layout)
            return Checked(
                layout=_name(held), problem=_fault(held, text), answer=None, right=None,
                why=f"the answers could not be compared ({error})",
            )  # fmt: skip


@functools.lru_cache(maxsize=2048)
def _checked(text: str, gold: str, layout: LayoutName) -> Checked:
    held = _layout(text, layout)
    problem = _fault(held, text)
    answer = extract_boxed(text) if held is None or held.boxed else parse(held, text).answer
    right = None
    if gold.strip() and answer is not None:
        source = "boxed" if held is None or held.boxed else str(held.answer_tag)
        right = Accuracy(answer_from=source).is_right(text, gold)
    return Checked(layout=_name(held), problem=problem, answer=answer, right=right)


def _layout(text: str, layout: LayoutName) -> Layout | None:
    """With `auto`: Qwen-LA's if one of its tags is there, Look-Back's if a `<back>` is, else a plain one."""
    if layout == "auto":
        layout = (
            "qwen_la" if _OF_QWEN_LA.search(text) else "look_back" if _OF_LOOK_BACK.search(text) else "grpo"
        )
    return {"look_back": _LOOK_BACK, "qwen_la": _QWEN_LA, "grpo": _GRPO}.get(layout)


def _name(layout: Layout | None) -> str:
    return {id(_LOOK_BACK): "look_back", id(_QWEN_LA): "qwen_la", id(_GRPO): "grpo"}.get(id(layout), "none")


def _fault(layout: Layout | None, text: str) -> str:
    if not text.strip():
        return "the trace is empty"
    return parse(layout, text).problem if layout is not None else ""
