"""The tasks that come with the library and need no files: pages of digits, and coloured shapes.

Their rows are those of `data/digits.py` and `data/shapes.py`, of a split that training never sees. The rule
is the strict one of training (`rewards/accuracy.py`): the last box, or the text of a tag, equals the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from reflectvlm.data import digits, shapes
from reflectvlm.eval.tasks.figures import accuracies, unscored
from reflectvlm.eval.tasks.groups import of
from reflectvlm.eval.types import Ask, Item, Mark, Reply, Summary
from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.rewards.isolation import RewardError
from reflectvlm.types import Sample


class _Made(Protocol):
    """A task whose rows are made, not read."""

    @property
    def accuracy(self) -> Accuracy: ...
    def _data(self) -> Sequence[Sample]: ...


def _load(task: _Made, data_dir: Path) -> list[Item]:
    """`data_dir` is not looked at."""
    del data_dir
    return [
        Item(
            id=sample.id,
            question=sample.question,
            answer=sample.answer,
            images=sample.images,
            columns=sample.columns,
        )
        for sample in task._data()
    ]


def _marks(task: _Made, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:
    del ask
    return [_mark(reply, task.accuracy) for reply in replies]


def _mark(reply: Reply, accuracy: Accuracy) -> Mark:
    try:
        right = accuracy.is_right(reply.text, reply.item.answer, reply.item.id)
    except RewardError as error:
        return Mark(value=None, note=error.reason)
    return Mark(value=float(right))


def _summary(task: _Made, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
    del task
    values = accuracies(items, marks, {"kind": of("kind")})
    return Summary(headline="accuracy", values=values, unscored=unscored(marks))


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Example: `Digits(size=200).load(Path())[0].question`"""

    split: digits.Split = "test"
    size: int = 400
    kinds: Sequence[str] = digits.KINDS
    filled: Sequence[int] = (2, 3, 4)
    """How many digits a page may hold."""
    image_size: int = 64
    accuracy: Accuracy = field(default_factory=Accuracy)

    def __post_init__(self) -> None:
        self._data()  # which checks the fields

    @property
    def name(self) -> str:
        return "digits" if self.split == "test" else f"digits_{self.split}"

    load, marks, summary = _load, _marks, _summary

    def _data(self) -> Sequence[Sample]:
        return digits.Digits(
            split=self.split,
            size=self.size,
            kinds=self.kinds,
            filled=self.filled,
            image_size=self.image_size,
        )


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Example: `Shapes(size=200).load(Path())[0].question`"""

    split: shapes.Split = "test"
    size: int = 400
    seed: int = 0
    image_size: int = 64
    max_objects: int = 3
    accuracy: Accuracy = field(default_factory=Accuracy)

    def __post_init__(self) -> None:
        self._data()  # which checks the fields

    @property
    def name(self) -> str:
        return "shapes" if self.split == "test" else f"shapes_{self.split}"

    load, marks, summary = _load, _marks, _summary

    def _data(self) -> Sequence[Sample]:
        return shapes.shapes(
            split=self.split,
            size=self.size,
            seed=self.seed,
            image_size=self.image_size,
            max_objects=self.max_objects,
        )
