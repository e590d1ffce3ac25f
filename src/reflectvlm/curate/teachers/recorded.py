"""Replies from a file: to repeat a run without its teacher, or to take over what somebody else was told.

A line of the file is a JSON object with `request`, the request's `content_hash`, `reply`, a text or null, and
for null `why`; the file of a `Calls` has such lines. Of equal requests the first line counts. What is not in
the file has no reply, and is counted as `missing`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from reflectvlm.curate.request_key import content_hash
from reflectvlm.curate.teachers.reasons import nothing
from reflectvlm.curate.types import Request, Said
from reflectvlm.data.fetch import BadImage

_log = logging.getLogger("reflectvlm")


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedTeacher:
    """Example: `RecordedTeacher(path="replies.jsonl")([Request(row="17", purpose="answer", text="?")])`"""

    path: str
    batch: ClassVar[int] = 1024
    """`Calls` asks for so many at one time, so that what is missing is told once."""
    _replies: Mapping[str, Said] = field(init=False, repr=False)
    _content: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        replies, content = _recorded(Path(self.path))
        object.__setattr__(self, "_replies", replies)
        object.__setattr__(self, "_content", content)

    @property
    def name(self) -> str:
        return f"recorded {self._content}"

    def __call__(self, requests: Sequence[Request], /) -> list[Said]:
        found = [self._said(request) for request in requests]
        if missing := sum(said.text is None and said.why.startswith("missing") for said in found):
            _log.warning("%s has no reply to %d of %d requests.", self.path, missing, len(found))
        return found

    def _said(self, request: Request) -> Said:
        try:
            content = content_hash(request)
        except BadImage as bad:
            return nothing("image", str(bad))
        why = f"{self.path} has no reply to this {request.purpose} of row {request.row!r}"
        said = self._replies.get(content)
        # What it took was taken when it was recorded, and would be reckoned into estimates.
        return nothing("missing", why) if said is None else dataclasses.replace(said, seconds=0.0)


def read_said(row: Mapping[str, Any]) -> Said:
    """A line's reply. Raises KeyError, ValueError or TypeError for a line without one."""
    text = row["reply"]
    if not isinstance(text, str | None):
        raise TypeError("reply is neither a text nor null")
    prompt_tokens, tokens = row.get("tokens", (0, 0))
    why = "" if text is not None else str(row.get("why") or "unknown: the record does not say")
    return Said(
        text=text, why=why, prompt_tokens=int(prompt_tokens), tokens=int(tokens),
        seconds=float(row.get("seconds", 0.0)),
    )  # fmt: skip


def said_line(said: Said) -> dict[str, Any]:
    """What `read_said` reads."""
    reply = {"reply": said.text} if said.text is not None else {"reply": None, "why": said.why}
    return {**reply, "tokens": [said.prompt_tokens, said.tokens], "seconds": round(said.seconds, 3)}


def _recorded(path: Path) -> tuple[dict[str, Said], str]:
    """The replies, and a name for the file's content."""
    if not path.is_file():
        raise ValueError(f"RecordedTeacher.path is {str(path)!r}, and there is no such file. Check the path.")
    replies: dict[str, Said] = {}
    cut = 0
    content = hashlib.sha256()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content.update(line)
            row = _row(line)
            if row is None:
                cut += bool(line.strip())
                continue
            try:
                replies.setdefault(str(row["request"]), read_said(row))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number} is no recorded reply: {error!r}. A line is a JSON object with request, "
                    "the content_hash of a request, and reply, a text or null."
                ) from error
    if cut and not replies:
        raise ValueError(f"{path} holds no recorded replies, but {cut} lines that are no JSON objects.")
    if cut:
        _log.warning("%d lines of %s are cut and are passed over.", cut, path)
    return replies, content.hexdigest()[:16]


def _row(line: bytes) -> dict[str, Any] | None:
    """None for an empty line, and for one that was cut when its process was killed."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
