"""The words after `reflectvlm data SUB`: files, `key=value`, flags. As everywhere, errors are one line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectvlm.data.rows import Columns
from reflectvlm.data.sources import Source, pick
from reflectvlm.generate_options import Given
from reflectvlm.recipe_check import RecipeError

COLUMNS = (
    "columns.question",
    "columns.answer",
    "columns.images",
    "columns.id",
    "columns.messages",
    "columns.turn",
    "columns.system",
)
ROWS = (*COLUMNS, "split", "subset", "root", "max_rows")
"""What says which rows of which columns are meant; known to every tool."""
_NULL = ("null", "none")


@dataclass(frozen=True, kw_only=True)
class Words:
    """What a user wrote, sorted."""

    command: str
    files: tuple[str, ...]
    given: Given
    flags: frozenset[str]

    @classmethod
    def read(
        cls, words: Sequence[str], command: str, known: Sequence[str], flags: Sequence[str] = ()
    ) -> Words:
        """A word without '=' is a file, and so is one that exists although it has one."""
        files, pairs, switches = [], [], set()
        for word in words:
            if word in flags:
                switches.add(word)
            elif word.startswith("--"):
                hint = f"It knows {', '.join(flags)}" if flags else "There are no dashes: write key=value"
                raise RecipeError(f"data {command} has no flag {word!r}. {hint}.")
            elif "=" not in word or os.path.exists(os.path.expanduser(word)):
                files.append(os.path.expanduser(word))
            else:
                pairs.append(word)
        given = Given.parsed(pairs, f"data {command}", known)
        return cls(command=command, files=tuple(files), given=given, flags=frozenset(switches))

    @property
    def file(self) -> str:
        """The one file there is."""
        if len(self.files) != 1:
            raise RecipeError(
                f"data {self.command} takes one file or folder of rows, got {len(self.files)}: "
                f"reflectvlm data {self.command} rows.jsonl"
            )
        return self.files[0]

    @property
    def source(self) -> Source:
        """A file or folder as `dataset()` takes it, or a ready reader's: `geo170k:FOLDER`."""
        if ":" in self.file and not os.path.exists(self.file):
            from reflectvlm.data.readers import named

            found: Source = named(self.file)
            return found
        return pick(self.file, self.given.text("split"), self.given.text("subset"))

    @property
    def root(self) -> Path | None:
        text = self.given.text("root")
        return None if text is None else Path(os.path.expanduser(text))

    @property
    def columns(self) -> Columns:
        return columns_of(self.given)

    def whole(self, key: str, default: int | None, least: int = 1) -> int | None:
        value = self.given.value(key, int, default)
        if value is not None and value < least:
            raise RecipeError(f"{key} is {value}. It must be {least} or more.")
        return None if value is None else int(value)

    def out(self) -> Path:
        """Where the result goes; nothing that is there is ever overwritten."""
        text = self.given.text("out")
        if text is None:
            raise RecipeError(f"data {self.command} needs out=…: where the result goes.")
        return Path(os.path.expanduser(text))


def columns_of(given: Given) -> Columns:
    found: dict[str, Any] = {}
    for name, text in given.below("columns").items():
        nothing = text.lower() in _NULL and name in ("answer", "images", "messages", "system")
        found[name] = None if nothing else text
    if found.get("images") is not None:
        names = [name for value in given.all("columns.images") for name in value.split(",")]
        found["images"] = names[0] if len(names) == 1 else names
    return Columns(**found)
