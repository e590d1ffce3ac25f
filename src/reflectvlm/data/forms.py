"""Which columns rows have, and of which kinds: counted by form, so that memory holds forms, not rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TypeAlias

from reflectvlm.data.findings import Finding
from reflectvlm.data.rows import Row, plain

Form: TypeAlias = tuple[tuple[str, ...], tuple[type, ...]]

_MOST = 1000
"""Forms told apart; rows of further ones are counted together."""
_WIDEST = 200
"""Columns of a row that is looked at."""
_KINDS: dict[type, str] = {
    str: "text",
    bool: "truth value",
    int: "number",
    float: "number",
    Decimal: "number",
    list: "list",
    tuple: "list",
    dict: "object",
    bytes: "bytes",
}


@dataclass
class Forms:
    """Counts and first rows by form."""

    seen: dict[Form, tuple[int, str]] = field(default_factory=dict)
    others: int = 0

    def add(self, row: Row, position: str) -> None:
        if len(row) > _WIDEST:
            self.others += 1
            return
        form: Form = (tuple(row), tuple(map(type, row.values())))
        if known := self.seen.get(form):
            self.seen[form] = (known[0] + 1, known[1])
        elif len(self.seen) < _MOST:
            self.seen[form] = (1, position)
        else:
            self.others += 1

    @property
    def columns(self) -> dict[str, int]:
        """How many rows have each."""
        found: dict[str, int] = {}
        for (names, _), (count, _) in self.seen.items():
            for name in names:
                found[name] = found.get(name, 0) + count
        return found

    def kinds(self, column: str) -> dict[str, tuple[int, str]]:
        """How many rows hold each kind of value, and the first of them; nulls count as nothing."""
        found: dict[str, tuple[int, str]] = {}
        for (names, types), (count, position) in self.seen.items():
            if column in names:
                kind = types[names.index(column)]
                if kind is type(None):
                    continue
                word = _KINDS.get(kind, kind.__name__)
                before, first = found.get(word, (0, position))
                found[word] = (before + count, first)
        return found

    def findings(self) -> Iterator[tuple[Finding, int]]:
        """Columns of mixed kinds, and columns that only some rows have, each with the rows concerned."""
        total = sum(count for count, _ in self.seen.values())
        for column, having in self.columns.items():
            kinds = self.kinds(column)
            usual = max(kinds, key=lambda kind: kinds[kind][0], default="")
            for kind, (count, first) in kinds.items():
                if kind != usual:
                    detail = f"Column '{plain(column)}' holds a {kind} here and a {usual} in most rows."
                    yield Finding(first, column, "mixed kinds in a column", detail, "warning"), count
            if having < total:
                yield self._rare(column, having, total)

    def _rare(self, column: str, having: int, total: int) -> tuple[Finding, int]:
        few = 2 * having <= total
        first = next(at for (names, _), (_, at) in self.seen.items() if (column in names) == few)
        if few:
            detail = f"Column '{plain(column)}' stands in {having:,} of {total:,} rows only, first in this."
            return Finding(first, column, "column in few rows", detail, "warning"), having
        detail = f"Column '{plain(column)}' is missing here and in {total - having:,} of {total:,} rows."
        return Finding(first, column, "column missing in some rows", detail, "warning"), total - having
