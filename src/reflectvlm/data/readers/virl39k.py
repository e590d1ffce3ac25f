"""ViRL39K (VL-Rethinker, arXiv 2504.08837): the hub's TIGER-Lab/ViRL39K, one Parquet file and `images.zip`.

As it comes, `39Krelease.parquet`:

    qid       text          question  with one `<image>` for each image
    answer    `\\boxed{…}`   image     list of paths, images/Processed-….jpg
    category, source        texts
    PassRate_32BTrained, PassRate_7BBase    shares of right answers of two models; negative: not known

As it leaves: `id` (`virl39k-` and the qid), `question`, `answer` (without its box), `images`, and the columns
`category`, `source`, `pass_rate_32b`, `pass_rate_7b` (null where not known).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectvlm.data.readers.layout import Converted, braced, first_file, missing, others, text_of
from reflectvlm.data.rows import Row
from reflectvlm.data.sources import PathLike
from reflectvlm.data.tables import ParquetRows

_RATES = {"PassRate_32BTrained": "pass_rate_32b", "PassRate_7BBase": "pass_rate_7b"}


@dataclass(frozen=True, slots=True)
class ViRL39K:
    """Example: `dataset(ViRL39K("ViRL39K"))`"""

    folder: PathLike

    @property
    def root(self) -> Path:
        return Path(self.folder)

    def open(self) -> Converted:
        folder = Path(self.folder)
        file = first_file(folder, "39Krelease.parquet", "train.parquet")
        if file is None:
            raise missing(
                "ViRL39K",
                folder,
                "the hub's TIGER-Lab/ViRL39K: 39Krelease.parquet, and images.zip unpacked to images/",
            )
        return Converted(ParquetRows([file]), _plain)


def _plain(row: Row, position: str, _: int) -> dict[str, Any]:
    gold = text_of(row, "answer", position)
    boxed = list(braced(gold, "boxed"))
    rates = {name: _rate(row.get(column)) for column, name in _RATES.items()}
    return {
        **others(row, "image", "qid", *_RATES),
        **rates,
        "id": f"virl39k-{text_of(row, 'qid', position)}",
        "question": text_of(row, "question", position),
        "answer": boxed[-1] if boxed else gold.strip(),
        "images": row.get("image"),
    }


def _rate(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value >= 0 else None
