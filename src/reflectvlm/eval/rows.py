"""A benchmark's items as rows, so that a run's own evaluation asks the same questions.

    evaluation:
      _target_: reflectvlm.train.evaluate.Evaluation
      data:
        _target_: reflectvlm.eval.rows.TaskRows
        task: {_target_: reflectvlm.eval.tasks.mathvista.MathVista}
        data_dir: data
        limit: 100

An image is read when its row is. A row whose image cannot be read is a `BadRow`: the run names it and keeps
it in the denominator, as `reflectvlm eval` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from reflectvlm.data.images import BadImage, ImageLimits, load_image
from reflectvlm.data.rows import BadRow
from reflectvlm.eval.types import Item, Task
from reflectvlm.types import Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskRows(Sequence[Sample]):
    """Example: `Evaluation(data=TaskRows(task=MathVista(), data_dir="data", limit=100))`"""

    task: Task
    data_dir: str = "data"
    limit: int | None = None
    """Only so many of the first items."""
    items: Sequence[Item] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"TaskRows.limit is {self.limit}. It must be at least 1.")
        items = self.task.load(Path(self.data_dir).expanduser())[: self.limit]
        if blank := [item.id for item in items if not item.answer.strip()]:
            raise ValueError(
                f"{self.task.name} has {len(blank):,} items without a gold answer ({blank[0]!r} is one), "
                f"so no "
                "reward can grade them. Score it by `reflectvlm eval`."
            )
        object.__setattr__(self, "items", items)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        item = self.items[index]
        try:
            return sample_of(item)
        except BadImage as bad:
            place = f"{self.task.name}, item {item.id!r}"
            detail = f"The image {bad.value} {bad.rule}."
            raise BadRow(place, "images", bad.reason, bad.remedy, detail) from bad


def sample_of(item: Item, limits: ImageLimits | None = None) -> Sample:
    """The item with its images read. Raises BadImage."""
    return Sample(
        id=item.id,
        question=item.question,
        answer=item.answer,
        images=tuple(load_image(image, item.root, limits) for image in item.images),
        columns=item.columns,
    )
