"""MMK12 (MM-Eureka, arXiv 2503.07365): the hub's FanqingM/MMK12, `data/train-….parquet` and `test`.

As it comes:

    id        text         question  may hold `<image>`; in `test` its options stand in it
    answer    text         subject   math, physics, chemistry, biology
    image     {"bytes", "path"}

As it leaves: `id` (`mmk12-train-…`, with the source's id or the row's number), `question`, `answer`,
`images`, `subject`, and all other columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from reflectvlm.data.readers.layout import Converted, check_choice, hub_tables, others, text_of
from reflectvlm.data.rows import Row
from reflectvlm.data.sources import PathLike


@dataclass(frozen=True, slots=True)
class MMK12:
    """Example: `dataset(MMK12("MMK12"))`"""

    folder: PathLike
    split: Literal["train", "test"] = "train"

    def __post_init__(self) -> None:
        check_choice("MMK12", "split", self.split, ("train", "test"))

    @property
    def root(self) -> Path:
        return Path(self.folder)

    def open(self) -> Converted:
        rows = hub_tables("MMK12", Path(self.folder), self.split, "FanqingM/MMK12")
        return Converted(rows, partial(_plain, split=self.split))


def _plain(row: Row, position: str, number: int, split: str) -> dict[str, Any]:
    return {
        **others(row, "image"),
        "id": f"mmk12-{split}-{row.get('id') or number}",
        "question": text_of(row, "question", position),
        "answer": text_of(row, "answer", position).strip(),
        "images": row.get("image"),
    }
