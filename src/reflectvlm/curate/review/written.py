"""The reviewed set: accepted and fixed rows as JSON lines in the order of the file, with who and when.

    {…, "reviewed": {"decision": "fixed", "by": "ada", "at": "…", "changed": ["trace"], "despite": ""}}

`dataset()` reads it. Bytes of images become data URLs; paths stay as they are, relative to the folder of the
rows. It is made from the rows and the decisions alone and can be made again at any time.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reflectvlm.curate.review.decisions import Decision, Decisions, NotSaved
from reflectvlm.curate.review.rows import ReviewRows

MARK = "reviewed"
"""The column that every row of the set has."""
_DONE = {"accept": "accepted", "fix": "fixed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What the set holds. `str()` is a line for people."""

    path: str
    accepted: int = 0
    fixed: int = 0
    dropped: int = 0
    undecided: int = 0
    stale: int = 0
    """Of the undecided: rows that changed since somebody decided."""
    rest: Literal["drop", "keep"] = "drop"

    def __str__(self) -> str:
        left = f"{self.undecided:,} undecided " + ("kept as they were" if self.rest == "keep" else "left out")
        changed = f" ({self.stale:,} of them changed since somebody decided)" if self.stale else ""
        rows = self.accepted + self.fixed + (self.undecided if self.rest == "keep" else 0)
        return (
            f"{self.path}: {rows:,} rows: {self.accepted:,} accepted, {self.fixed:,} fixed; "
            f"{self.dropped:,} dropped, {left}{changed}"
        )


def check_out(path: Path) -> None:
    """Refuses to write over anything but an earlier reviewed set."""
    if path.suffix not in (".jsonl", ".ndjson"):
        raise ValueError(
            f"The reviewed set is written as JSON lines, and {str(path)!r} is not. Name a .jsonl file."
        )
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder. Make it, or name another file.")
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        first = file.readline(2**28)
    try:
        ours = "decision" in json.loads(first)[MARK]
    except (ValueError, TypeError, KeyError, RecursionError):
        ours = False
    if not ours:
        raise ValueError(f"{path} is there already and is no reviewed set. Name another file.")


def write_reviewed(
    rows: ReviewRows, decisions: Decisions, path: Path, rest: Literal["drop", "keep"] = "drop"
) -> Written:
    """Writes the set whole or not at all."""
    check_out(path)
    counts = dict.fromkeys(("accept", "fix", "drop", "undecided", "stale"), 0)
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            for index in range(len(rows)):
                decision = decisions.of(rows.ids[index], rows.digests[index])
                counts[decision.do if decision else "undecided"] += 1
                counts["stale"] += decision is None and bool(decisions.by_row.get(rows.ids[index]))
                if (decision is None and rest == "drop") or (decision is not None and decision.do == "drop"):
                    continue
                file.write(_line(rows, index, decision) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise NotSaved(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        beside.unlink(missing_ok=True)
    return Written(
        path=str(path), accepted=counts["accept"], fixed=counts["fix"], dropped=counts["drop"],
        undecided=counts["undecided"], stale=counts["stale"], rest=rest,
    )  # fmt: skip


def _line(rows: ReviewRows, index: int, decision: Decision | None) -> str:
    row = dict(rows.raw(index))
    if decision is None:
        # Said of these rows as well, so that the first line tells that the file is a reviewed set.
        row[MARK] = {"decision": "undecided"}
    else:
        row = rows.changed(row, decision.fields)
        row[MARK] = {
            "decision": _DONE[decision.do],
            "by": decision.by,
            "at": decision.at,
            "changed": sorted(decision.fields),
            "despite": decision.despite,
        }
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """What JSON has. A number that is none becomes null; a `{"bytes", "path"}` image and bare bytes become a
    data URL, which `load_image` reads."""
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"} and isinstance(value["bytes"], bytes):
            return _plain(value["bytes"])
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return "data:image/png;base64," + base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
