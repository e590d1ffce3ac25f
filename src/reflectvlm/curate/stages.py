"""Work in stages that a kill can interrupt anywhere: each stage has a file, a line for each row, in the
order of the rows.

A stage is a pure function of its row and of what was said about it, so that it does not matter which
process wrote which line: what is there is not done again, a last line that was cut is dropped, and the bytes
at the end are those of a run that nobody killed. The one exception are lines in which a server was silent
(`FAILED`): the next start does these rows again, and what was made from lines that change is made anew, from
replies that are kept. What a folder was made with stands in its `card.json`; going
on with other settings or rows is refused. What needs all rows at once is worked out anew by every start and
written in one step (`write_whole`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

from reflectvlm.interrupt import safe_point
from reflectvlm.train.console import duration
from reflectvlm.train.lock import lock, unlock

log = logging.getLogger("reflectvlm")

Line: TypeAlias = dict[str, Any]
FAILED = "failed"
"""In a line: how many replies did not come for reasons that may pass."""
EVERY = 10.0
"""Seconds between two lines about how far a stage is."""


class HasId(Protocol):
    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=HasId)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One file of lines. Example: `Stage(path=out / "answers.jsonl", rows_at_once=64)`"""

    path: Path
    rows_at_once: int = 64
    """What a kill loses at most, beside what a teacher's cache has kept."""
    later: Sequence[Path] = ()
    """The files that are made from this one's lines."""

    def todo(self, rows: Sequence[R]) -> list[R]:
        """What `run` is going to do."""
        done, again = self._whole_lines(rows)
        return [*(rows[place] for place in again), *rows[done:]]

    def run(self, rows: Sequence[R], work: Callable[[Sequence[R]], Sequence[Line]]) -> None:
        """Does the rows that are not in the file yet. `work` gives one line for each row; its `id` is the
        row's and is set here."""
        done, again = self._whole_lines(rows)
        if again:
            self._mend(rows, again, work)
        started, first = time.monotonic(), done
        told = started
        while done < len(rows):
            safe_point()
            until = min(len(rows), done + self.rows_at_once)
            part = rows[done:until]
            lines = work(part)
            assert len(lines) == len(part), f"{len(lines)} lines for {len(part)} rows"
            append(self.path, [{"id": row.id, **line} for row, line in zip(part, lines, strict=True)])
            done = until
            if time.monotonic() - told >= EVERY and done < len(rows):
                told = time.monotonic()
                left = duration((told - started) / (done - first) * (len(rows) - done))
                log.info("%s: %d of %d rows, %s to go", self.path.stem, done, len(rows), left)
        there = ", all there already" if rows and done == first and not again else ""
        log.info("%s: %d rows%s", self.path.stem, len(rows), there)

    def lines(self) -> Iterator[Line]:
        """Memory holds one of them."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for line in file:
                yield json.loads(line)

    def _mend(
        self, rows: Sequence[R], again: Sequence[int], work: Callable[[Sequence[R]], Sequence[Line]]
    ) -> None:
        """Does rows again in which a server was silent. The file is another one at the end, in one step; a
        kill before that loses nothing but lines, which the replies that came give again."""
        log.info("%s: %d rows without all their replies, asked again", self.path.stem, len(again))
        new: dict[int, bytes] = {}
        for first in range(0, len(again), self.rows_at_once):
            safe_point()
            part = again[first : first + self.rows_at_once]
            lines = work([rows[place] for place in part])
            assert len(lines) == len(part), f"{len(lines)} lines for {len(part)} rows"
            for place, line in zip(part, lines, strict=True):
                new[place] = f"{dumped({'id': rows[place].id, **line})}\n".encode()
        with self.path.open("rb") as file:
            if all(new.get(place, line) == line for place, line in enumerate(file)):
                return
            for path in self.later:
                path.unlink(missing_ok=True)
            file.seek(0)
            write_whole(self.path, (new.get(place, line) for place, line in enumerate(file)))

    def _whole_lines(self, rows: Sequence[HasId]) -> tuple[int, list[int]]:
        """How many rows are done, in whole parts: a local teacher is then asked in the same company as
        without a kill; and the places of those to be done again. Each line must be that of its row."""
        self.path.touch()
        whole, size, parts, parts_size = 0, 0, 0, 0
        again: list[int] = []
        with self.path.open("rb") as file:
            for line in file:
                try:
                    found = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    found = None  # a power cut may leave anything
                if not isinstance(found, dict):
                    break
                if whole >= len(rows) or found.get("id") != rows[whole].id:
                    wanted = repr(rows[whole].id) if whole < len(rows) else "no further line"
                    raise ValueError(
                        f"{self.path}:{whole + 1} is about {found.get('id')!r}, not {wanted}: the "
                        "file was made from other rows, or edited. Name another out=FOLDER."
                    )
                again += [whole] if found.get(FAILED) else []
                whole, size = whole + 1, size + len(line)
                if whole % self.rows_at_once == 0 or whole == len(rows):
                    parts, parts_size = whole, size
        if parts_size < self.path.stat().st_size:
            os.truncate(self.path, parts_size)
        return parts, [place for place in again if place < parts]


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """In one write, and on the disk when this returns."""
    with path.open("ab") as file:
        file.write("".join(f"{dumped(line)}\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, data: bytes | str | Iterator[bytes]) -> None:
    """The file is there whole or not at all."""
    parts = [data.encode()] if isinstance(data, str) else [data] if isinstance(data, bytes) else data
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def dumped(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, default=str)


@contextlib.contextmanager
def folder_of(path: Path, card: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of one piece of work, for this process alone. ValueError: it holds another one's."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock(path / ".lock")
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"out={str(path)!r} cannot be written: {why}. Name another folder.") from error
    try:
        _check_card(path, json.loads(dumped(card)))
        yield path
    finally:
        unlock(path / ".lock")


def rows_digest(rows: Iterator[tuple[Any, ...]]) -> str:
    """A name for rows: the same ids, questions, answers and images give the same one."""
    digest = hashlib.sha256()
    for row in rows:
        for part in row:
            data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


def _check_card(folder: Path, card: Mapping[str, Any]) -> None:
    file = folder / "card.json"
    if not file.is_file():
        others = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        if others:
            raise ValueError(
                f"out={str(folder)!r} holds {others[0]!r} and no card.json, so it is not a folder that this "
                "command made. Name another one."
            )
        write_whole(file, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
        return
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        old = {}
    names = [name for name in {**old, **card} if old.get(name) != card.get(name)]
    if names:
        told = ", ".join(f"{name} {_cut(old.get(name))} → {_cut(card.get(name))}" for name in names)
        raise ValueError(
            f"out={str(folder)!r} was begun with other settings: {told}. Give the old ones, or another "
            "out=FOLDER."
        )


def tokens_of(*stages: Stage) -> dict[str, list[int]]:
    """What was asked and said in all lines of each stage that has any."""
    found = {}
    for stage in stages:
        spent_by = [line.get("tokens", [0, 0]) for line in stage.lines()]
        if any(sum(one) for one in spent_by):
            found[stage.path.stem] = [sum(one[0] for one in spent_by), sum(one[1] for one in spent_by)]
    return found


def failed_of(*stages: Stage) -> dict[str, int]:
    """How many calls of each stage the next start makes again."""
    found = {stage.path.stem: sum(line.get(FAILED, 0) for line in stage.lines()) for stage in stages}
    return {name: count for name, count in found.items() if count}


def _cut(value: Any) -> str:
    text = "(not given)" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
