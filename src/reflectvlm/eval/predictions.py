"""What a model replied to a benchmark's items, as a file of ours holds it and as scoring takes it.

One JSON object a line, in the order in which they were answered:

    id, number      of the item, and which of several replies to it
    question        as it was asked, and `answer`, `lookback_answer`: gold, where the item has it
    text            the reply, with all tags
    stop, tokens, inserted   as `generate` writes them (`answer_file.py`)
    missing         instead of these three: why the item's image could not be shown; the text is then empty

A file is only ever appended to. Its last line counts only when it is whole, and of two lines with the same id
and number the last one does. Files of other tools are read by `others.py`; `matching.py` gives replies to
items. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reflectvlm.eval.types import Item

NEEDED = frozenset({"id", "question", "text"})
"""What a line of ours has at least."""
OURS = "reflectvlm"
"""The kind of a file of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One reply. Example: `Prediction(id="17", text="So \\\\boxed{3}", answer="3")`"""

    id: str
    text: str
    number: int = 0
    question: str = ""
    answer: str = ""
    """Gold, if the file names it; empty: it does not."""
    lookback_answer: str | None = None
    missing: str = ""
    """Why its image could not be shown; empty: it was."""
    named: Mapping[str, str] = field(default_factory=dict)
    """What else names its row, by column: another tool's `id` may be the row's number alone."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """A file of them."""

    path: Path
    kind: str
    """Which tool wrote it."""
    lines: Sequence[Prediction]
    card: Mapping[str, Any] = field(default_factory=dict)
    """What they were made with, where that is known (`answer_card.py`)."""

    @property
    def missing(self) -> dict[str, str]:
        """Why the image of an item could not be shown, by its id."""
        return {line.id: line.missing for line in self.lines if line.missing}


def read_lines(data: bytes, path: Path) -> list[Prediction]:
    """The lines of a file of ours; a last one that was cut is passed over."""
    lines: dict[tuple[str, int], Prediction] = {}
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.split(b"\n"), start=1):
        if line.strip():
            made = prediction_of(_object(line, f"{path}:{number}"), f"{path}:{number}")
            lines.pop((made.id, made.number), None)
            lines[made.id, made.number] = made
    return list(lines.values())


def prediction_of(row: Mapping[str, Any], place: str) -> Prediction:
    """A line of ours, read."""
    if not row.keys() >= NEEDED or not isinstance(row["text"], str):
        raise ValueError(
            f"{place} is no prediction, which has id, question and text. Remove that line, or name "
            f"another file."
        )
    number = row.get("number", 0)
    lookback = row.get("lookback_answer")
    return Prediction(
        id=str(row["id"]),
        number=number if isinstance(number, int) else 0,
        question=str(row["question"]),
        answer=str(row.get("answer") or ""),
        lookback_answer=None if lookback is None else str(lookback),
        text=row["text"],
        missing=str(row.get("missing") or ""),
    )


def gold_of(item: Item) -> dict[str, str]:
    """What a line says of the item's gold answers."""
    said = {"answer": item.answer, "lookback_answer": item.lookback_answer}
    return {name: value for name, value in said.items() if value}


def items_of(lines: Iterable[Prediction]) -> list[Item]:
    """Items as far as the predictions themselves tell them: for rules that need no more."""
    found: dict[str, Item] = {}
    for line in lines:
        if line.id not in found:
            found[line.id] = Item(
                id=line.id,
                question=line.question,
                answer=line.answer,
                lookback_answer=line.lookback_answer,
            )
    return list(found.values())


def numbered(lines: Sequence[Prediction]) -> list[Prediction]:
    """Several replies to one item, counted as they come."""
    seen: Counter[str] = Counter()
    found = []
    for line in lines:
        found.append(replace(line, number=seen[line.id]))
        seen[line.id] += 1
    return found


def _object(line: bytes, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(  # noqa: TRY004  a file that a user has
            f"{place} is no JSON object. Remove that line, or name another file."
        )
    return row
