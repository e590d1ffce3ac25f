"""PolyMATH (arXiv 2410.14702): the hub's him1411/polymath, `data/test-….parquet` (5,000) and `testmini`.

As it comes (the columns that are used; others pass):

    image               the picture, in which the question stands
    question            a text, where a version has one
    answer_option       the options as one text      final_answer_range  what answers can be, e.g. 1-4
    final_answer        the gold answer; null in some rows
    category            one of ten kinds of reasoning

As it leaves: `id` (`polymath-test-17`), `question` (the text, or a sentence that points to the picture, with
the options behind it), `answer`, `images`, and the other columns. A row without gold answer is a bad row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from reflectvlm.data.readers.layout import Converted, check_choice, hub_tables, others
from reflectvlm.data.rows import Row
from reflectvlm.data.sources import PathLike

ASK = "Answer the question in the image."
"""What stands for the question where it is part of the picture."""


@dataclass(frozen=True, slots=True)
class PolyMath:
    """Example: `dataset(PolyMath("polymath", "testmini"))`"""

    folder: PathLike
    split: Literal["test", "testmini"] = "test"

    def __post_init__(self) -> None:
        check_choice("PolyMath", "split", self.split, ("test", "testmini"))

    @property
    def root(self) -> Path:
        return Path(self.folder)

    def open(self) -> Converted:
        rows = hub_tables("PolyMATH", Path(self.folder), self.split, "him1411/polymath")
        return Converted(rows, partial(_plain, split=self.split))


def _plain(row: Row, _: str, number: int, split: str) -> dict[str, Any]:
    asked = row.get("question")
    options = str(row.get("answer_option") or "").strip()
    question = asked.strip() if isinstance(asked, str) and asked.strip() else ASK
    gold = row.get("final_answer")
    return {
        **others(row, "image", "final_answer", "question", "id"),
        "id": f"polymath-{split}-{number}",
        "question": f"{question}\nOptions: {options}" if options else question,
        "answer": gold.strip() if isinstance(gold, str) else gold,
        "images": row.get("image"),
    }
