"""What the rewards of a rubric demand, as far as they are this library's own: where the answer stands, and
in which layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.rewards.back import BackReward
from reflectvlm.rewards.layout import TagFormat
from reflectvlm.rewards.length import LengthPenalty, SoftOverlong
from reflectvlm.rewards.reflection import ReflectionBalance
from reflectvlm.tags import Layout


@dataclass(frozen=True, kw_only=True)
class Part:
    """One reward of a rubric."""

    name: str
    weight: float
    reward: Any

    @property
    def layout(self) -> Layout | None:
        """The layout that it demands."""
        return self.reward.layout if isinstance(self.reward, TagFormat | BackReward) else None

    @property
    def accuracy(self) -> Accuracy | None:
        """What decides in it whether an answer is right."""
        inner = self.reward.accuracy if isinstance(self.reward, BackReward) else self.reward
        return inner if isinstance(inner, Accuracy) else None

    @property
    def full(self) -> bool:
        """Whether a right answer in the right layout gets 1 from it, for certain."""
        if type(self.reward) is BackReward:
            return type(self.reward.accuracy) is Accuracy
        return type(self.reward) in (Accuracy, TagFormat)

    @property
    def right(self) -> float:
        """An answer to which it gives less is wrong, for certain; 0 if it does not tell.

        The layout alone tells nothing: of the texts that a layout of the user's allows we make but one.
        """
        if not self.full or type(self.reward) is TagFormat:
            return 0.0
        return 1.0 - self.reward.w if type(self.reward) is BackReward else 1.0

    @property
    def own(self) -> bool:
        """Whether it is one of this library's. A class that inherits from one may do anything."""
        return self.full or type(self.reward) in (ReflectionBalance, SoftOverlong, LengthPenalty)


def parts(rubric: Any) -> tuple[Part, ...]:
    """Its rewards that count. Nothing is known of a rubric that is not a `Rubric`."""
    rewards, weights = (getattr(rubric, name, None) for name in ("rewards", "weights"))
    if not isinstance(rewards, Mapping) or not isinstance(weights, Mapping):
        return ()
    made = (Part(name=name, weight=weights[name], reward=reward) for name, reward in rewards.items())
    return tuple(part for part in made if part.weight > 0)


def layouts(rubric: Any) -> tuple[Layout, ...]:
    return tuple(dict.fromkeys(part.layout for part in parts(rubric) if part.layout is not None))


def answer_tags(rubric: Any) -> Iterator[str]:
    """Tags, without brackets, that a reward reads beside those of the layouts."""
    for part in parts(rubric):
        if part.accuracy is not None and part.accuracy.answer_from != "boxed":
            yield part.accuracy.answer_from
        if isinstance(part.reward, ReflectionBalance):
            yield part.reward.tag


def places(rubric: Any) -> tuple[str, ...]:
    """Where its rewards read the answer: `"boxed"`, or a tag without brackets."""
    found = (
        (getattr(part.accuracy or part.reward, "answer_from", None), part.accuracy is not None)
        for part in parts(rubric)
    )
    # To other rewards "text" is the whole answer, to Accuracy a tag like any other.
    return tuple(dict.fromkeys(one for one, tag in found if isinstance(one, str) and (tag or one != "text")))


def answer_text(answer: str, layout: Layout | None, where: tuple[str, ...]) -> str:
    """A short text with this answer at all of these places, in this layout if that can be.

    Blocks that may be empty are; others hold a full stop. Example: for `look_back()`, "7" and ("boxed",)
    "<think>.</think><back>.</back><think>.</think>\\boxed{7}".
    """
    box = f"\\boxed{{{answer}}}"
    ends_with_box = layout is not None and layout.boxed
    inside = box if "boxed" in where and not ends_with_box else answer
    tags = list(_blocks(layout))
    holders = {tag for tag in (*where, layout.answer_tag if layout else None) if tag not in ("boxed", None)}
    tags += sorted(holders - {*tags})
    if "boxed" in where and layout is not None and not (tags or ends_with_box or layout.free_text):
        tags += [block.tag for block in layout.blocks][:1]  # text beside blocks is not allowed
    if "boxed" in where and not ends_with_box and not holders:
        holders = {*tags[-1:]}
    empty = _may_be_empty(layout)
    text = "".join(
        f"<{tag}>{inside if tag in holders else '' if tag in empty else '.'}</{tag}>" for tag in tags
    )
    alone = not text and (layout is None or "boxed" in where)
    return text + box if ends_with_box or alone else text


def _blocks(layout: Layout | None) -> Iterator[str]:
    """The tags that must be there, floating ones behind the first of the others."""
    if layout is None:
        return
    floating = [block.tag for block in layout.floating for _ in range(block.min)]
    fixed = [block.tag for block in layout.blocks for _ in range(block.min)]
    if floating and not fixed and layout.blocks:
        fixed = [layout.blocks[0].tag]
    yield from fixed[:1]
    yield from floating
    yield from fixed[1:]


def _may_be_empty(layout: Layout | None) -> set[str]:
    if layout is None:
        return set()
    return {block.tag for block in (*layout.blocks, *layout.floating) if block.allow_empty}
