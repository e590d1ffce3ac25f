"""What people decided, in a file that only grows: one JSON line a decision, whole lines, on disk before the
page hears of it. A kill at any moment loses at most the key that is being pressed.

    {"do": "fix", "row": "17", "of": "9f3c…", "by": "ada", "at": "2026-11-22T10:00:00+00:00",
     "fields": {"trace": "…"}, "despite": ""}
    {"do": "undo", …}          takes back the last decision that still stands, whichever row it is about

`of` is the hash of the row that was judged. Drafts, texts that somebody is still typing, are a small file
beside it, written whole each time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from reflectvlm.data.rows import plain

What = Literal["accept", "fix", "drop"]
WHATS = get_args(What)

_BEGINNING = b'{"do": "'
"""Of every line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Example: `Decision(do="drop", row="17", of="9f3c", by="ada", at="2026-11-22T10:00:00+00:00")`"""

    do: What
    row: str
    """Its id."""
    of: str
    by: str
    at: str
    fields: Mapping[str, str] = field(default_factory=dict)
    """With `fix`: the texts that replace those of the row."""
    despite: str = ""
    """What the checks had against it when somebody kept it all the same."""


class NotSaved(RuntimeError):
    """The disk did not take a decision; the file is as it was."""


@dataclass(eq=False)
class Decisions:
    """The decisions that stand, in the order in which they were made."""

    path: Path
    standing: list[Decision] = field(default_factory=list)
    by_row: dict[str, list[Decision]] = field(default_factory=dict)
    last_row: str | None = None
    """Row of the last line, undone or not: where people were."""
    undone: bool = False
    """Whether that line took something back."""

    @classmethod
    def open(cls, path: Path) -> Decisions:
        """Reads the file, if there is one; a last line that was cut by a kill is dropped."""
        made = cls(path)
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read: {error.strerror}. Name another decisions=FILE."
            ) from error
        whole = data[: data.rfind(b"\n") + 1]
        # All is read before anything is cut: a file that holds no decisions stays as it is.
        for number, line in enumerate(whole.splitlines(), start=1):
            made._replay(line, f"{path}:{number}")
        if len(whole) < len(data):
            if not whole and data[: len(_BEGINNING)] != _BEGINNING[: len(data)]:
                raise ValueError(f"{path} holds no decisions of a review. Name another decisions=FILE.")
            os.truncate(path, len(whole))
        return made

    def __len__(self) -> int:
        return len(self.standing)

    def of(self, row: str, digest: str) -> Decision | None:
        """The decision that holds for a row as it is now."""
        found = self.by_row.get(row)
        return found[-1] if found and found[-1].of == digest else None

    def add(self, decision: Decision) -> None:
        self._append(
            {name: getattr(decision, name) for name in Decision.__slots__} | {"fields": dict(decision.fields)}
        )
        self._push(decision)

    def undo(self, by: str, at: str) -> Decision:
        """Takes the last one back."""
        last = self.standing[-1]
        self._append({"do": "undo", "row": last.row, "of": last.of, "by": by, "at": at})
        return self._pop()

    def _push(self, decision: Decision) -> None:
        self.standing.append(decision)
        self.by_row.setdefault(decision.row, []).append(decision)
        self.last_row, self.undone = decision.row, False

    def _pop(self) -> Decision:
        last = self.standing.pop()
        self.by_row[last.row].pop()
        self.last_row, self.undone = last.row, True
        return last

    def _replay(self, line: bytes, place: str) -> None:
        try:
            value = json.loads(line)
            if value["do"] == "undo" and self.standing:
                self._pop()
                return
            known = {name: value[name] for name in Decision.__slots__}
        except (ValueError, KeyError, TypeError):
            known = {}
        texts = known.pop("fields", None)
        fine = isinstance(texts, dict) and all(
            isinstance(one, str) for one in (*known.values(), *texts.values())
        )
        if not fine or known["do"] not in WHATS:
            raise ValueError(
                f"{place} is no decision of a review. Name another decisions=FILE, or remove it."
            )
        self._push(Decision(**known, fields=texts))

    def _append(self, value: Mapping[str, Any]) -> None:
        data = (json.dumps(value) + "\n").encode()
        new = not self.path.exists()
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise NotSaved(f"{self.path} cannot be written: {error.strerror}.") from error
        try:
            before = os.fstat(file).st_size
            try:
                while data:
                    data = data[os.write(file, data) :]
                os.fsync(file)
            except OSError as error:
                os.ftruncate(file, before)  # half a line would hide the next one
                raise NotSaved(f"{self.path} cannot be written: {error.strerror}.") from error
        finally:
            os.close(file)
        if new:
            sync_folder(self.path.parent)


@dataclass(eq=False)
class Drafts:
    """Texts of edits that are not decided yet, by row. Losing them all costs typing, no decision."""

    path: Path
    texts: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Drafts:
        try:
            found = json.loads(path.read_bytes())
            return cls(
                path, {str(row): {str(k): str(v) for k, v in one.items()} for row, one in found.items()}
            )
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} holds no drafts ({plain(str(error))}). Move it away.") from error

    def keep(self, row: str, texts: Mapping[str, str] | None) -> None:
        """None forgets them."""
        if self.texts.get(row) == texts:
            return
        if texts is None:
            del self.texts[row]
        else:
            self.texts[row] = dict(texts)
        if self.texts:
            write_whole(self.path, json.dumps(self.texts).encode())
        else:
            self.path.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """A file that is the old or the new one, whenever the process dies."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise NotSaved(f"{path} cannot be written: {error.strerror}.") from error


def sync_folder(folder: Path) -> None:
    """So that a new file's name outlives a power cut, too."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
