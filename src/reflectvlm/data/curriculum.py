"""Joining data sets: one after another, or in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from reflectvlm.types import Sample


@dataclass(frozen=True, kw_only=True)
class Curriculum(Sequence[Sample]):
    """Rows of the first part, then of the second, and so on; the last part goes on to its end.

    Example: `Curriculum(parts=[easy, hard], rows=[6400])` is 6,400 rows of `easy`, then all of `hard`.
    """

    parts: Sequence[Sequence[Sample]]
    rows: Sequence[int]
    """Rows taken of each part but the last."""

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.parts) - 1:
            raise ValueError(
                f"Curriculum has {len(self.parts)} parts and {len(self.rows)} row counts. "
                "Give one count per part but the last, which goes on to its end."
            )
        for number, (part, rows) in enumerate(zip(self.parts, self.rows, strict=False)):
            if not 0 <= rows <= len(part):
                raise ValueError(f"Curriculum takes {rows} rows of part {number}, which has {len(part)}.")

    def __len__(self) -> int:
        return sum(self.rows) + len(self.parts[-1])

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a Curriculum with {len(self)} rows")
        for part, rows in zip(self.parts, self.rows, strict=False):
            if index < rows:
                return part[index]
            index -= rows
        return self.parts[-1][index]
