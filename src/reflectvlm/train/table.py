"""A small table of texts: drawn on a terminal, plain markdown anywhere else and in files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO, cast

from reflectvlm.train.printing import SafeStream, put

if TYPE_CHECKING:
    from rich.console import Console


def visible(text: str) -> str:
    """`text` with control, invisible and direction characters as escapes: what a model or a file says must
    not drive a terminal. `visible("a\x1b[2J") == "a\\x1b[2J"`"""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass
class Table:
    """The first column names the rows; all others are numbers, aligned to the right.

    Example: `Table("kept", ("answers", "number")).add("right", "12").show()`
    """

    title: str
    columns: Sequence[str]
    rows: list[tuple[str, ...]] = field(default_factory=list, init=False)

    def add(self, *cells: str) -> Table:
        assert len(cells) == len(self.columns), f"{len(cells)} cells for {len(self.columns)} columns"
        self.rows.append(tuple(map(visible, cells)))
        return self

    @property
    def markdown(self) -> str:
        """Padded, so that it can be read as it is."""
        lines = [tuple(self.columns), *self.rows]
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        widths = [max(3, *(len(line[c]) for line in escaped)) for c in range(len(self.columns))]
        shown = [
            [cell.ljust(width) if c == 0 else cell.rjust(width) for c, (cell, width) in enumerate(pairs)]
            for pairs in (list(zip(line, widths, strict=True)) for line in escaped)
        ]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        body = "\n".join("| " + " | ".join(line) + " |" for line in [shown[0], rule, *shown[1:]])
        return f"### {self.title}\n\n{body}\n"

    def show(self, out: Console | None = None) -> None:
        """Prints it, by default on standard output."""
        screen = SafeStream(sys.stdout)
        if out is None and not screen.isatty():
            put(self.markdown)
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        out = out or Console(file=cast("TextIO", screen), highlight=False)
        if not out.is_terminal:
            out.print(Text(self.markdown), soft_wrap=True, end="")
            return
        drawn = RichTable(box=box.SIMPLE_HEAD)
        for number, name in enumerate(self.columns):
            drawn.add_column(Text(name), justify="right" if number else "left")
        for row in self.rows:
            drawn.add_row(*map(Text, row))
        # As a line of its own: rich wraps a table's title to the table's width.
        out.print(Text(self.title, style="bold"), soft_wrap=True)
        out.print(drawn)


def say(line: str) -> None:
    """Prints one line, with control characters as escapes."""
    put(f"{visible(line)}\n")
