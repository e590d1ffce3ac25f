"""What is wrong with a file, row by row: a finding, and a tally of them that does not grow with the file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import IO, ClassVar, Literal, NamedTuple, TypeAlias

from reflectvlm.data.rows import BadRow, plain

Weight: TypeAlias = Literal["problem", "warning"]
"""A problem makes a row unusable, or the file; a warning is of what may not be meant so."""


class Finding(NamedTuple):
    """One thing about one row: `rows.jsonl:17`, field `answer`, "empty answer"."""

    position: str
    field: str
    """The row's column; empty for the line as a whole."""
    reason: str
    detail: str
    weight: Weight = "problem"

    @classmethod
    def of(cls, bad: BadRow) -> Finding:
        return cls(bad.position, bad.field, bad.reason, f"{bad.detail} {bad.remedy}".strip())

    @property
    def line(self) -> str:
        where = plain(self.field) or "line"
        return f"{plain(self.position)}: {where}: {self.reason}. {plain(self.detail)}"


@dataclass
class Tally:
    """Counts by weight, field and reason, and the first few rows of each."""

    show: int = 5
    """Rows kept of each kind."""
    every: IO[str] | None = None
    """Gets every finding, one JSON object a line."""
    counts: dict[tuple[Weight, str, str], int] = field(default_factory=dict)
    shown: dict[tuple[Weight, str, str], list[Finding]] = field(default_factory=dict)

    MOST: ClassVar[int] = 500
    """Kinds told apart. Columns are named by rows, and a broken file may name a million."""

    def add(self, finding: Finding, count: int = 1) -> None:
        """`count` rows, of which `finding` is the first."""
        key = finding.weight, plain(finding.field), finding.reason
        if key not in self.counts and len(self.counts) >= self.MOST:
            key = finding.weight, "…", finding.reason
        self.counts[key] = self.counts.get(key, 0) + count
        kept = self.shown.setdefault(key, [])
        if len(kept) < self.show:
            kept.append(finding)
        if self.every is not None:
            self.every.write(json.dumps(finding._asdict(), ensure_ascii=False) + "\n")

    def total(self, weight: Weight) -> int:
        return sum(count for key, count in self.counts.items() if key[0] == weight)

    def kinds(self, weight: Weight) -> list[tuple[str, str, int, list[Finding]]]:
        """(field, reason, how many, the first of them), the commonest first."""
        found = [(*key[1:], count, self.shown[key]) for key, count in self.counts.items() if key[0] == weight]
        return sorted(found, key=lambda kind: (-kind[2], kind[0], kind[1]))
