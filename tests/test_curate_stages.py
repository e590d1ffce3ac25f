"""Stages on disk: what is there is not done again, and what cannot be trusted is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from reflectvlm.curate.stages import Line, Stage, folder_of, rows_digest


@dataclass(frozen=True)
class Row:
    id: str


ROWS = [Row(str(number)) for number in range(7)]


def work(rows: Sequence[Row]) -> list[Line]:
    return [{"twice": row.id * 2} for row in rows]


def test_what_is_there_is_not_done_again(tmp_path: Path) -> None:
    """Bug: a restart asks for rows that are done and appends them a second time."""
    path = tmp_path / "a.jsonl"
    Stage(path=path, rows_at_once=3).run(ROWS, work)
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    seen: list[str] = []

    def noted(rows: Sequence[Row]) -> list[Line]:
        seen.extend(row.id for row in rows)
        return work(rows)

    Stage(path=path, rows_at_once=3).run(ROWS, noted)
    assert seen == ["3", "4", "5", "6"]
    assert path.read_bytes() == whole


def test_whatever_a_kill_leaves_the_bytes_at_the_end_are_the_same(tmp_path: Path) -> None:
    """Bug: half a line, or half a part of rows, survives and everything behind it is shifted by one."""
    path = tmp_path / "a.jsonl"
    Stage(path=path, rows_at_once=3).run(ROWS, work)
    whole = path.read_bytes()
    for length in range(0, len(whole) + 1, 5):
        path.write_bytes(whole[:length])
        Stage(path=path, rows_at_once=3).run(ROWS, work)
        assert path.read_bytes() == whole, length


def test_a_power_cuts_zeros_are_dropped(tmp_path: Path) -> None:
    """Bug: bytes that are no JSON stop every later start with an error."""
    path = tmp_path / "a.jsonl"
    Stage(path=path, rows_at_once=2).run(ROWS, work)
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + b"\0" * 9 + b"\n" + whole[50:])
    Stage(path=path, rows_at_once=2).run(ROWS, work)
    assert path.read_bytes() == whole


def test_lines_of_other_rows_are_refused(tmp_path: Path) -> None:
    """Bug: a file of other rows is gone on with, and answers stand beside other questions."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": "9"}) + "\n")
    with pytest.raises(ValueError, match=r"a.jsonl:1 is about '9', not '0'.*another out=FOLDER"):
        Stage(path=path).run(ROWS, work)


def test_rows_in_which_a_server_was_silent_are_done_again(tmp_path: Path) -> None:
    """Bug: what a server did not say stays unsaid for ever; or rows that are whole are done again; or a file
    that was made from the old lines stays; or one that was not touched goes."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    second.write_text("made from it\n")
    seen: list[str] = []

    def stage() -> Stage:
        return Stage(path=first, rows_at_once=2, later=[second])

    def silent(rows: Sequence[Row]) -> list[Line]:
        seen.extend(row.id for row in rows)
        return [{"failed": 1} if row.id in "135" else {"twice": row.id * 2} for row in rows]

    stage().run(ROWS, silent)
    seen.clear()
    assert [row.id for row in stage().todo(ROWS)] == ["1", "3", "5"]
    stage().run(ROWS, silent)
    assert seen == ["1", "3", "5"]
    assert second.exists(), "nothing has changed"
    first.write_bytes(first.read_bytes()[:-1])  # and the last part is lost
    assert [row.id for row in stage().todo(ROWS)] == ["1", "3", "5", "6"]
    stage().run(ROWS, work)
    assert not second.exists()
    assert stage().todo(ROWS) == []
    Stage(path=tmp_path / "whole.jsonl").run(ROWS, work)
    assert first.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    """Bug: half of a set is made by one teacher and half by another, and nothing tells."""
    with folder_of(tmp_path / "out", {"n": 4, "shares": {"corrected": 1.0}}):
        pass
    with folder_of(tmp_path / "out", {"n": 4, "shares": {"corrected": 1.0}}):
        pass
    with (
        pytest.raises(ValueError, match=r"begun with other settings: n 4 → 5"),
        folder_of(tmp_path / "out", {"n": 5, "shares": {"corrected": 1.0}}),
    ):
        pass


def test_a_folder_of_somebodys_files_is_refused(tmp_path: Path) -> None:
    """Bug: out=. fills somebody's own folder."""
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds 'thesis.tex' and no card\.json"), folder_of(tmp_path, {}):
        pass


def test_a_digest_tells_rows_apart() -> None:
    """Bug: parts run into each other, so that "ab", "c" is "a", "bc"."""
    one = rows_digest(iter([("ab", "c"), ("d", b"e")]))
    assert one == rows_digest(iter([("ab", "c"), ("d", b"e")]))
    assert one != rows_digest(iter([("a", "bc"), ("d", b"e")]))
    assert one != rows_digest(iter([("ab", "c"), ("d", b"f")]))
