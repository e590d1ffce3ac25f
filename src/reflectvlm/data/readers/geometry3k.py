"""Geometry3K (Inter-GPS, arXiv 2105.04165): the authors' folders with logic forms, or the hub's form of them.

As it comes from the authors, a folder for each problem, `train/17/`, `val/2101/`, `test/2401/`:

    data.json        id, problem_text, annotat_text (with LaTeX), choices (4), answer (a letter),
                     problem_type_graph, problem_type_goal, …
    logic_form.json  text_logic_form, diagram_logic_form, point_positions, … (may be missing)
    img_diagram.png

As the hub's hiyouga/geometry3k has it, `data/train-….parquet`, `validation`, `test`: images (a list),
problem (with `<image>`), answer (the text of the right choice).

As it leaves: `id`, `question`, `answer`, `images`; from the authors' folders also

    choices, choice                 the options, and the letter of the right one
    goal, graph                     problem_type_goal and problem_type_graph, lists
    text_logic_form, diagram_logic_form    lists of literals

The answer is the text of the right choice, as on the hub; with `choices=True` the options are listed behind
the question and the answer is a letter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from reflectvlm.data.filtered import Rows
from reflectvlm.data.readers.layout import (
    Converted,
    check_choice,
    missing,
    others,
    parquet_files,
    text_of,
    with_choices,
)
from reflectvlm.data.rows import BadRow, Row
from reflectvlm.data.sources import PathLike
from reflectvlm.data.tables import ParquetRows

_HUB = {"train": "train", "val": "validation", "test": "test"}


@dataclass(frozen=True, slots=True)
class Geometry3K:
    """Example: `dataset(Geometry3K("geometry3k", split="train"))`"""

    folder: PathLike
    split: Literal["train", "val", "test"] = "train"
    choices: bool = False
    """List the options and ask for a letter. Only the authors' folders have them."""

    def __post_init__(self) -> None:
        check_choice("Geometry3K", "split", self.split, tuple(_HUB))

    @property
    def root(self) -> Path:
        return self._official or Path(self.folder)

    def open(self) -> Rows:
        if (folder := self._official) is not None:
            return Converted(ProblemFolders(folder), partial(_official_row, choices=self.choices))
        files = parquet_files(Path(self.folder), _HUB[self.split])
        if not files:
            raise missing(
                "Geometry3K",
                Path(self.folder),
                f"the authors' {self.split}.zip and logic_forms.zip (github.com/lupantech/InterGPS): "
                f"{self.split}/0/data.json, img_diagram.png, logic_form.json",
                f"the hub's hiyouga/geometry3k: data/{_HUB[self.split]}-….parquet",
            )
        if self.choices:
            raise ValueError(
                "Geometry3K(choices=True) needs the authors' folders: the hub's form has no options."
            )
        return Converted(ParquetRows(files), partial(_hub_row, split=self.split))

    @property
    def _official(self) -> Path | None:
        for inner in ("", "geometry3k"):
            folder = Path(self.folder) / inner / self.split
            if folder.is_dir() and next(folder.glob("*/data.json"), None) is not None:
                return folder
        return None


class ProblemFolders:
    """`Rows` of a folder of problems, in the order of their numbers."""

    def __init__(self, folder: Path) -> None:
        names = [path.parent.name for path in folder.glob("*/data.json")]
        self._folder = folder
        self._names = sorted(
            names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)
        )

    def __len__(self) -> int:
        return len(self._names)

    def position(self, index: int) -> str:
        return f"{self._folder.name}/{self._names[index]}/data.json:1"

    def __getitem__(self, index: int) -> Row:
        name, position = self._names[index], self.position(index)
        problem = _read(self._folder / name / "data.json", position)
        literals = self._folder / name / "logic_form.json"
        return {
            **problem,
            "name": name,
            "logic": _read(literals, position) if literals.is_file() else {},
        }


def _read(path: Path, position: str) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        detail = f"{path.name} cannot be read ({type(error).__name__})."
        raise BadRow(position, path.name, "broken JSON", "Unpack the archive again.", detail) from None
    if not isinstance(found, dict):
        detail = f"{path.name} holds no object."
        raise BadRow(position, path.name, "broken JSON", "Unpack the archive again.", detail)
    return found


def _official_row(row: Row, position: str, _: int, choices: bool) -> dict[str, Any]:
    options = row.get("choices")
    letter = str(row.get("answer", "")).strip()
    listed = isinstance(options, list) and all(isinstance(option, str) for option in options)
    if not listed or len(letter) != 1 or not 0 <= ord(letter) - ord("A") < len(options or ()):
        detail = f"The answer is {letter[:40]!r} and there are {len(options or ())} choices."
        raise BadRow(position, "answer", "answer is no choice", "Unpack the archive again.", detail)
    assert isinstance(options, list)
    asked = "annotat_text" if row.get("annotat_text") else "problem_text"
    question, logic = text_of(row, asked, position), row["logic"]
    return {
        "id": f"geometry3k-{row['name']}",
        "question": with_choices(question, options) if choices else question,
        "answer": letter if choices else options[ord(letter) - ord("A")].strip(),
        "images": f"{row['name']}/img_diagram.png",
        "choices": options,
        "choice": letter,
        "goal": row.get("problem_type_goal") or [],
        "graph": row.get("problem_type_graph") or [],
        "text_logic_form": logic.get("text_logic_form") or [],
        "diagram_logic_form": logic.get("diagram_logic_form") or [],
    }


def _hub_row(row: Row, position: str, number: int, split: str) -> dict[str, Any]:
    return {
        **others(row, "problem", "answer", "images"),
        "id": f"geometry3k-{split}-{number}",
        "question": text_of(row, "problem", position),
        "answer": text_of(row, "answer", position),
        "images": row.get("images"),
    }
