"""What a file of answers was made with, kept beside it in `<out>.card.json`: going on with another model or
other settings would mix two kinds of answers in one file, and nothing in its lines would tell.

Under `about` stands what no answer depends on and whoever reads the file may want: where the rows came from,
and how many were asked. It is not compared. Left out: the rows, since every answer names its question; the
device and this package's version.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from reflectvlm.protocols import Reattention
from reflectvlm.stages import model_digest
from reflectvlm.types import Instruction, SamplingParams

Card: TypeAlias = Mapping[str, Any]
"""Setting -> what JSON can write."""

ABSENT = "(not given)"
ABOUT = "about"
"""What a card only tells."""


def card_of(
    path: str,
    reattention: Reattention,
    instruction: Instruction,
    sampling: SamplingParams,
    *,
    seed: int,
    batch: int,
    **policy: Any,
) -> Card:
    """All that decides the answers to a row. `seed` and `batch` count only where chance is in it."""
    parts = {"reattention": reattention, "instruction": instruction, "sampling": sampling}
    digest = model_digest(path)
    card: dict[str, Any] = {"model": digest[:16] if digest else path, **policy}
    for name, part in parts.items():
        card[name] = type(part).__name__
        if dataclasses.is_dataclass(part):
            values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
            card |= {f"{name}.{key}": value for key, value in values.items()}
    if sampling.temperature:
        card |= {"seed": seed, "batch": batch}
    plain: Card = json.loads(json.dumps(card, default=repr))
    return plain


def check_card(answers: Path, card: Card) -> None:
    """Raises ValueError in one line unless the answers that are there were made with the same."""
    file = card_file(answers)
    if not file.is_file():
        raise ValueError(
            f"{answers} has no {file.name} beside it, so what its answers were made with is unknown and they "
            "cannot be gone on with. Put it back to go on, or give another out= to begin anew."
        )
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        old = None
    if not isinstance(old, dict):
        raise ValueError(  # noqa: TRY004  a file that a user has changed
            f"{file} is no JSON object. Put back the one that was written to go on, or give another out= to "
            "begin anew."
        )
    if differing := changes(old, card):
        raise ValueError(
            f"{answers} was made with other settings: {differing}. Give the old ones to go on with it, or "
            "another out= to begin anew."
        )


def changes(old: Card, new: Card) -> str:
    """`seed 1 → 2, top_p 1.0 → 0.5`; empty where both say the same."""
    names = sorted(name for name in {*old, *new} - {ABOUT} if old.get(name, ABSENT) != new.get(name, ABSENT))
    # Of another kind of re-attention, its settings need not be told.
    names = [name for name in names if "." not in name or name.split(".")[0] not in names]
    return ", ".join(
        f"{name} {_cut(old.get(name, ABSENT))} → {_cut(new.get(name, ABSENT))}" for name in names
    )


def told_about(answers: Path) -> Card:
    """What the card that is there tells; nothing where there is none."""
    try:
        found = json.loads(card_file(answers).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    about = found.get(ABOUT) if isinstance(found, dict) else None
    return about if isinstance(about, dict) else {}


def write_card(answers: Path, card: Card) -> None:
    file = card_file(answers)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"{file} cannot be written: {why}. Give another out=.") from error


def card_file(answers: Path) -> Path:
    """`answers.jsonl.card.json` for `answers.jsonl`."""
    return answers.with_name(f"{answers.name}.card.json")


def _cut(value: Any) -> str:
    """A value in one line."""
    text = value if value == ABSENT else repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
