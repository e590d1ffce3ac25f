"""Geo170K (G-LLaVA, arXiv 2312.11370): the hub's Luckyjhg/Geo170K, as JSON with `images.zip` or as Parquet.

As it comes, `qa_tuning.json` (some 117,000 items) and `alignment.json` (60,000), each one array, or
`data/qa_tuning-….parquet` and `data/alignment-….parquet` with the same columns:

    image          path below `images/`: geo3k/…, geoqa_plus/…
    conversations  [{"from": "human", "value": "<image>\\n" question}, {"from": "gpt", "value": reply}]

As it leaves: `id` (`geo170k-qa_tuning-17`), `question`, `images`, `trace` (the reply), and `answer`: in
qa_tuning the letter behind the last `Answer:`, or, where the reply ends without one, the letter of its last
"option X"; a reply with neither is a bad row. In alignment the reply is a caption, and it is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from reflectvlm.data.filtered import Rows
from reflectvlm.data.readers.json_array import open_json_array
from reflectvlm.data.readers.layout import (
    Converted,
    check_choice,
    exchanges,
    first_file,
    image_root,
    missing,
    others,
    parquet_files,
)
from reflectvlm.data.rows import BadRow, Row
from reflectvlm.data.sources import PathLike
from reflectvlm.data.tables import ParquetRows

_ANSWER = re.compile(r"\bAnswer\s*:\s*\(?([A-Z])\b")
_OPTION = re.compile(r"\b(?:option|choice|answer is)\s*:?\s*\(?([A-Z])\b(?!\w)")


@dataclass(frozen=True, slots=True)
class Geo170K:
    """Example: `dataset(Geo170K("Geo170K"))`"""

    folder: PathLike
    part: Literal["qa_tuning", "alignment"] = "qa_tuning"

    def __post_init__(self) -> None:
        check_choice("Geo170K", "part", self.part, ("qa_tuning", "alignment"))

    @property
    def root(self) -> Path:
        names = ("images", "", "data/images")
        return image_root(Path(self.folder), names, self._rows(), "image", "Geo170K")

    def open(self) -> Converted:
        return Converted(self._rows(), partial(_plain, part=self.part))

    def _rows(self) -> Rows:
        folder = Path(self.folder)
        if file := first_file(folder, f"{self.part}.json", f"data/{self.part}.json"):
            return open_json_array(file)
        if files := parquet_files(folder, self.part):
            return ParquetRows(files)
        raise missing(
            "Geo170K",
            folder,
            f"the hub's Luckyjhg/Geo170K: {self.part}.json or data/{self.part}-….parquet, and images.zip "
            "unpacked to images/",
        )


def _plain(row: Row, position: str, number: int, part: str) -> dict[str, Any]:
    question, reply = exchanges(row, position)[0]
    return {
        **others(row, "conversations", "image", "id"),
        "id": f"geo170k-{part}-{number}",
        "question": question,
        "answer": reply.strip() if part == "alignment" else _letter(reply, position),
        "images": _image(row.get("image")),
        "trace": reply,
    }


def _letter(reply: str, position: str) -> str:
    found = _ANSWER.findall(reply) or _OPTION.findall(reply)
    if not found:
        detail = "The reply names no option: neither 'Answer:X' nor 'option X'."
        raise BadRow(position, "conversations", "answer not found", "Remove the row.", detail)
    return str(found[-1])


def _image(value: Any) -> Any:
    """A path, or what a table stores."""
    return dict(value) if isinstance(value, Mapping) else value
