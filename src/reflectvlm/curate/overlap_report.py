"""The report of `data overlap`: counts by set, and each row that was found beside what it was found in.
Markdown and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reflectvlm.curate.contamination import EVIDENCE, EvaluationIndex, Hit, Overlapping, Tally
from reflectvlm.data.rows import plain
from reflectvlm.rewards.answers import normalise

_SHOWN = 200
"""Rows in the Markdown file; the JSON file has all."""
_LONGEST = 400
"""Characters of a text in the Markdown file."""
_MOST_HITS = 5
"""Evaluation rows that are shown beside one row; all are counted."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a pass found."""

    file: str
    index: EvaluationIndex
    tally: Tally
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By evaluation set, one line for each of its rows of which nothing could be read."""
    doubts: Sequence[str] = ()
    """One line for each thing about the sets that was not compared (`EvaluationSets.doubts`)."""
    blind: tuple[str, ...] = ()
    """Of the file and the sets those of which no row had an image that could be read."""

    @property
    def sets(self) -> Mapping[str, tuple[int, int]]:
        """Rows of each evaluation set, and how many of them have images."""
        sizes: dict[str, tuple[int, int]] = {}
        for held in self.index.held:
            rows, pictures = sizes.get(held.set, (0, 0))
            sizes[held.set] = rows + 1, pictures + bool(held.images)
        return sizes

    def lines(self) -> list[str]:
        """A line for each set, and one for each thing that was not looked at."""
        found = [
            f"{name}: {counts['rows']:,} of {self.tally.rows:,} rows of {self.file} share something with "
            f"{counts['evaluation rows']:,} of its {self.sets[name][0]:,} rows "
            f"({', '.join(f'{one} {counts[one]:,}' for one in EVIDENCE)})"
            for name, counts in self.tally.by_set(self.sets).items()
        ]
        if self.tally.unread:
            first = self.tally.unread[0]
            found.append(f"{len(self.tally.unread):,} rows could not be read, the first: {first}")
        if self.file in self.blind:
            found.append(f"no row of {self.file} has an image that can be read: only its texts are compared")
        return [*found, *self.doubts]

    def as_json(self) -> str:
        settings = ("n", "share", "common", "distance", "tint")
        value = {
            "file": self.file,
            "rows": self.tally.rows,
            "unread": self.tally.unread,
            "unread of the sets": {name: list(bad) for name, bad in self.unread.items()},
            "without images": list(self.blind),
            "settings": {name: getattr(self.index, name) for name in settings},
            "sets": {
                name: {"size": size, "with images": pictures, **self.tally.by_set([name])[name]}
                for name, (size, pictures) in self.sets.items()
            },
            "found": [_found(row) for row in self.tally.found],
        }
        return json.dumps(value, indent=1, ensure_ascii=False) + "\n"

    def as_markdown(self) -> str:
        found = self.tally.found
        lines = [
            f"# {_cell(self.file)}: rows that evaluation sets have, too",
            "",
            *(f"- {_cell(line)}" for line in self.lines()),
            "",
            f"| set | its rows | rows found | {' | '.join(EVIDENCE)} | of its rows |",
            "|---|---:|---:|" + "---:|" * (len(EVIDENCE) + 1),
        ]
        for name, counts in self.tally.by_set(self.sets).items():
            by = " | ".join(f"{counts[one]:,}" for one in EVIDENCE)
            sizes = f"{self.sets[name][0]:,} | {counts['rows']:,}"
            lines.append(f"| {_cell(name)} | {sizes} | {by} | {counts['evaluation rows']:,} |")
        if found:
            some = (
                f"the first {_SHOWN} of {len(found):,}; the JSON file has all"
                if len(found) > _SHOWN
                else "all"
            )
            lines += [
                "",
                f"## Side by side ({some})",
                "",
                "| row | its question | evaluation row | its question | why |",
            ]
            lines += ["|---|---|---|---|---|"]
            lines += [line for row in found[:_SHOWN] for line in _side_by_side(row)]
        return "\n".join(lines) + "\n"


def write_report(report: Report, stem: Path) -> tuple[Path, Path]:
    """`stem.md` and `stem.json`, neither of which may be there."""
    files = report_files(stem)
    for file, text in zip(files, (report.as_markdown(), report.as_json()), strict=True):
        temporary = file.with_name(f".{file.name}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, file)
        except OSError as error:
            raise ValueError(
                f"{file} cannot be written: {error.strerror or error}. Name another out=FILE."
            ) from error
    return files


def report_files(stem: Path) -> tuple[Path, Path]:
    """The two files of `out=overlap`, `out=overlap.md` or `out=overlap.json`."""
    bare = stem.with_suffix("") if stem.suffix in (".md", ".json") else stem
    return bare.with_name(f"{bare.name}.md"), bare.with_name(f"{bare.name}.json")


def _found(row: Overlapping) -> dict[str, Any]:
    return {
        "row": row.position,
        "id": row.id,
        "question": row.question,
        "answer": row.answer,
        "in": [_hit(hit, row) for hit in row.hits[:_MOST_HITS]],
        "evaluation rows": len(row.hits),
    }


def _hit(hit: Hit, row: Overlapping) -> dict[str, Any]:
    return {
        "set": hit.held.set,
        "id": hit.held.id,
        "evidence": hit.evidence,
        "share of its words": None if hit.share is None else round(hit.share, 3),
        "bits apart": hit.apart,
        "question": hit.held.question,
        "answer": hit.held.answer,
        "same answer": _same_answer(hit, row),
    }


def _same_answer(hit: Hit, row: Overlapping) -> bool | None:
    if not hit.held.answer.strip() or not row.answer.strip():
        return None
    return normalise(hit.held.answer) == normalise(row.answer)


def _side_by_side(row: Overlapping) -> Iterator[str]:
    for hit in row.hits[:_MOST_HITS]:
        share = "" if hit.share is None else f", {hit.share:.0%} of its words"
        apart = "" if hit.apart is None else f", images {hit.apart} bits apart"
        same = {True: ", same answer", False: ", other answer", None: ""}[_same_answer(hit, row)]
        cells = (
            row.position,
            row.question,
            f"{hit.held.set} {hit.held.id}",
            hit.held.question,
            f"{hit.evidence}{share}{apart}{same}",
        )
        yield f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """A text of a row in one cell: it can neither end the table nor become mark-up."""
    line = plain(" ".join(text[: 2 * _LONGEST].split()))
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
    for sign, spelled in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "&#124;"),
        ("[", "&#91;"),
        ("`", "&#96;"),
    ):
        line = line.replace(sign, spelled)
    return line
