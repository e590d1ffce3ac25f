"""MATH-Vision (arXiv 2402.14804) as rows: the authors' `data/test.jsonl` with `images/`, or the hub's
MathLLMs/MathVision as Parquet.

As it comes:

    id        text            question  with `<image1>`          options  list, empty for free answers
    image     images/1.jpg    decoded_image  the picture itself (hub)
    answer    a letter, or what is asked      solution, level (1 to 5), subject

As it leaves: `id` (`mathvision-17`), `question` (`<image1>` as `<image>`, once; options listed behind it,
unless they are only the letters, which then stand in the picture), `answer`, `images`, and the columns
`options`, `solution`, `level`, `subject`. It is a benchmark: whoever trains on it must not report it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reflectvlm.data.filtered import Rows
from reflectvlm.data.readers.layout import (
    Converted,
    check_choice,
    first_file,
    missing,
    one_marker,
    others,
    parquet_files,
    text_of,
    with_choices,
)
from reflectvlm.data.records import open_json_lines
from reflectvlm.data.rows import Row
from reflectvlm.data.sources import PathLike
from reflectvlm.data.tables import ParquetRows


@dataclass(frozen=True, slots=True)
class MathVisionRows:
    """Example: `dataset(MathVisionRows("MathVision", "testmini"))`"""

    folder: PathLike
    split: Literal["test", "testmini"] = "test"

    def __post_init__(self) -> None:
        check_choice("MathVisionRows", "split", self.split, ("test", "testmini"))

    @property
    def root(self) -> Path:
        return Path(self.folder)

    def open(self) -> Converted:
        return Converted(self._rows(), _plain)

    def _rows(self) -> Rows:
        folder = Path(self.folder)
        if file := first_file(folder, f"data/{self.split}.jsonl", f"{self.split}.jsonl"):
            return open_json_lines(file)
        if files := parquet_files(folder, self.split):
            return ParquetRows(files)
        raise missing(
            "MATH-Vision",
            folder,
            f"github.com/mathllm/MATH-V: data/{self.split}.jsonl and images/1.jpg …",
            f"the hub's MathLLMs/MathVision: data/{self.split}-….parquet",
        )


def _plain(row: Row, position: str, _: int) -> dict[str, Any]:
    options = [str(option) for option in row.get("options") or ()]
    picture = row.get("decoded_image")
    return {
        **others(row, "image", "decoded_image"),
        "id": f"mathvision-{text_of(row, 'id', position)}",
        "question": with_choices(one_marker(text_of(row, "question", position)), options),
        "answer": text_of(row, "answer", position).strip(),
        "images": row.get("image") if picture is None else picture,
        "options": options,
    }
