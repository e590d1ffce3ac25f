r"""SceMQA (arXiv 2402.05138): the repository SceMQA/SceMQA, `Multiple_Choice/` and `Free_Response/`.

As it comes, `Multiple_Choice/multiple_choice.json` and `Free_Response/free_response.json`, each an object of
subjects with a list of

    Question                            with its options, `\nA. …`
    Answer (final answer highlighted)   a letter, or `\answer{69.5}` and an explanation; several: alternatives
    ImagePath                           Math/1: the picture Math/1.jpg or .png beside the JSON file

As it leaves: `id` (`scemqa-choice-Math-1`, by subject and number), `question`, `answer` (the letter, or what
stands in the first `\answer{…}`), `images`, and the columns `subject`, `kind` (`choice` or `free`),
`answers` (all alternatives) and `explanation` (the whole text, where it is more than the answer).
Left out: the hub's copy with files by subject (`chem/…`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reflectvlm.data.readers.layout import Converted, braced, check_choice, missing, text_of
from reflectvlm.data.rows import BadRow, Row
from reflectvlm.data.sources import PathLike

_FILES = {"choice": "Multiple_Choice/multiple_choice.json", "free": "Free_Response/free_response.json"}
_GOLD = "Answer (final answer highlighted)"
_LETTER = re.compile(r"\(?([A-H])\)?(?:[.:)\s]|\Z)")
_SUFFIXES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")


@dataclass(frozen=True, slots=True)
class SceMQA:
    """Example: `dataset(SceMQA("SceMQA"))`"""

    folder: PathLike
    kind: Literal["choice", "free", "both"] = "both"

    def __post_init__(self) -> None:
        check_choice("SceMQA", "kind", self.kind, (*_FILES, "both"))

    @property
    def root(self) -> Path:
        return Path(self.folder)

    def open(self) -> Converted:
        kinds = tuple(_FILES) if self.kind == "both" else (self.kind,)
        rows = [row for kind in kinds for row in _rows(Path(self.folder), kind)]
        return Converted(_Listed(rows), _plain)


@dataclass(frozen=True, eq=False)
class _Listed:
    """The rows of both files are some hundred kilobytes: they stay in memory."""

    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def position(self, index: int) -> str:
        row = self.rows[index]
        return f"{Path(_FILES[row['kind']]).name} {row['subject']}:{row['number']}"


def _rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    file = folder / _FILES[kind]
    if not file.is_file():
        raise missing(
            "SceMQA", folder, f"github.com/SceMQA/SceMQA: {_FILES[kind]} and the pictures beside it"
        )
    try:
        found = json.loads(file.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no readable JSON ({error}). Fetch it again.") from None
    if not isinstance(found, dict) or not all(isinstance(rows, list) for rows in found.values()):
        raise ValueError(f"{file} is no object of subjects with a list of rows each. Fetch it again.")
    return [
        {
            **(row if isinstance(row, dict) else {}),
            "kind": kind,
            "subject": subject,
            "number": number,
            "folder": folder,
        }
        for subject, rows in found.items()
        for number, row in enumerate(rows, start=1)
    ]


def _plain(row: Row, position: str, _: int) -> dict[str, Any]:
    said = text_of(row, _GOLD, position)
    answers = _answers(said, row["kind"], position)
    subject = str(row["subject"]).removesuffix("_Free_Response")
    return {
        "id": f"scemqa-{row['kind']}-{subject}-{row['number']}",
        "question": text_of(row, "Question", position),
        "answer": answers[0],
        "images": _image(row, position),
        "subject": subject,
        "kind": row["kind"],
        "answers": answers,
        "explanation": said if said.strip() != answers[0] else "",
    }


def _answers(said: str, kind: str, position: str) -> list[str]:
    if found := [answer for answer in braced(said, "answer") if answer]:
        return found
    if kind == "choice" and (match := _LETTER.match(said.strip())):
        return [match[1]]
    if kind == "free" and len(said.split()) <= 6:
        return [said.strip()]
    detail = f"Neither \\answer{{…}} nor a letter begins {said[:60]!r}."
    raise BadRow(position, _GOLD, "answer not found", "Remove the row.", detail)


def _image(row: Row, position: str) -> str:
    """The path below the folder, with the suffix that is there."""
    stem = f"{Path(_FILES[row['kind']]).parent}/{text_of(row, 'ImagePath', position)}"
    there = (f"{stem}{suffix}" for suffix in _SUFFIXES if (row["folder"] / f"{stem}{suffix}").is_file())
    return next(there, f"{stem}{_SUFFIXES[0]}")
