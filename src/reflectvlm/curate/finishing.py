"""The end of every way to make a set: filters, shares, rows with their images, what was left out, a report.

    rows.jsonl        id, question, answer, images, trace, and how it was made: `dataset()` reads it
    images/           each image once, named by its content
    dropped.jsonl     every question that has no row: at which stage, and why
    to_review.jsonl   the rows that people should look at, with the reason: `reflectvlm data review` opens it
    report.json, .md  counts (`curation_report.py`)

All of it is made anew from the stages' files by every start, and `rows.jsonl` is there whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from reflectvlm.curate import scarce
from reflectvlm.curate.choosing import counts_of
from reflectvlm.curate.curation_report import Curated, report, report_markdown
from reflectvlm.curate.filters.applying import screened
from reflectvlm.curate.judging import Votes
from reflectvlm.curate.stages import dumped, write_whole
from reflectvlm.curate.types import Filter, Look, Question, Trace
from reflectvlm.data.fetch import BadImage, ImageLimits, describe, fetch

_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp"}


class Nothing(NamedTuple):
    """A question without a row."""

    id: str
    stage: str
    """plan, look, rewrite, judges, shares, images, or the name of a filter."""
    why: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """A trace that may become a row."""

    trace: Trace
    votes: Votes = field(default_factory=dict)
    review: str = ""
    """Why people should look at it."""


@dataclass(frozen=True, kw_only=True)
class Finishing:
    """Example: `Finishing(filters=standard("qwen_la"))(out, made, left_out, asked=100, about={})`"""

    filters: Sequence[Filter] = ()
    shares: Mapping[Look, float] | None = None
    """Traces beyond these shares are left out; None keeps them all."""
    usual_shares: bool = False
    """Nobody chose them: a look that no trace has any more is left out of them. Shares that were chosen are
    not had without it, and nothing is kept."""

    def __call__(
        self,
        out: Path,
        made: Sequence[Made],
        left_out: Sequence[Nothing],
        *,
        asked: int,
        about: Mapping[str, Any],
    ) -> Mapping[str, Any]:
        """Writes the files and returns the report's values. `asked` is the number of questions, `about` what
        else the report is to say."""
        dropped = list(left_out)
        kept: list[Made] = []
        found = screened(self.filters, [one.trace for one in made])
        for one, objection in zip(made, found, strict=True):
            if objection is None:
                kept.append(one)
            else:
                dropped.append(Nothing(one.trace.question.id, objection.by, objection.why))
        kept, surplus, notes = self._in_shares(kept)
        dropped += [
            Nothing(one.trace.question.id, "shares", f"more {one.trace.look} than wanted") for one in surplus
        ]
        rows = []
        final = []
        for one in kept:
            try:
                rows.append(
                    row_of(
                        one, [_saved(out, one.trace.question, image) for image in one.trace.question.images]
                    )
                )
                final.append(one)
            except BadImage as bad:
                dropped.append(Nothing(one.trace.question.id, "images", str(bad)))
        about = {**about, "notes": [*about.get("notes", ()), *notes]}
        curated = Curated(
            traces=[one.trace for one in final],
            dropped=[(one.stage, one.why) for one in dropped],
            asked=asked,
            shares=self.shares,
            about=about,
            to_review=sum(bool(one.review) for one in final),
        )
        values = report(curated)
        review = [{**row, "review": one.review} for row, one in zip(rows, final, strict=True) if one.review]
        write_whole(out / "dropped.jsonl", _lines(one._asdict() for one in dropped))
        write_whole(out / "to_review.jsonl", _lines(review))
        write_whole(out / "report.json", dumped(values) + "\n")
        write_whole(out / "report.md", report_markdown(values))
        write_whole(out / "rows.jsonl", _lines(rows))
        return values

    def _in_shares(self, made: Sequence[Made]) -> tuple[list[Made], list[Made], list[str]]:
        """The first of each look, as many as keep the shares; the others; and what is to be said about it."""
        if self.shares is None:
            return list(made), [], []
        supply = scarce.Supply.of([frozenset({one.trace.look}) for one in made], self.shares)
        shares = self.shares
        notes = []
        if supply.absent:
            left = supply.without_absent() if self.usual_shares else None
            notes.append(scarce.absent_after(supply, left))
            if left is None:
                return [], list(made), notes
            shares = left
        there = Counter(one.trace.look for one in made)
        total = len(made)
        while any(there[look] < count for look, count in counts_of(total, shares).items()):
            total -= 1
        wanted = dict(counts_of(total, shares))
        kept: list[Made] = []
        surplus: list[Made] = []
        for one in made:
            look = one.trace.look
            (kept if wanted[look] > 0 else surplus).append(one)
            wanted[look] -= 1
        if surplus:
            notes.append(scarce.after(replace(supply, shares=shares), len(surplus)))
        return kept, surplus, notes


def row_of(made: Made, images: Sequence[str]) -> dict[str, Any]:
    trace, question = made.trace, made.trace.question
    row: dict[str, Any] = {
        "id": question.id,
        "question": question.question,
        "answer": question.answer,
        "images": list(images),
        "trace": trace.text,
        "method": trace.method,
        "look": trace.look,
        "kept": len(trace.kept),
        "made_by": trace.made_by,
        "about": dict(trace.about),
    }
    row |= {"source": question.source} if question.source else {}
    return row | ({"votes": dict(made.votes)} if made.votes else {})


def _saved(out: Path, question: Question, image: Any) -> str:
    """The image's own bytes beside the rows, once; its name from there."""
    data = fetch(image, question.root, ImageLimits())
    suffix = next((suffix for start, suffix in _SUFFIXES.items() if data.startswith(start)), None)
    if suffix is None:
        named = Path(describe(image).strip("'")).suffix.lower()
        suffix = named if named[1:].isalnum() and len(named) <= 6 else ".img"
    path = out / "images" / f"{hashlib.sha256(data).hexdigest()[:24]}{suffix}"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_whole(path, data)
    return f"{path.parent.name}/{path.name}"


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(f"{dumped(row)}\n" for row in rows)
