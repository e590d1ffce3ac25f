"""The form in which Look-Back keeps GeoMath, TallyQA and MME: a JSON list of short conversations.

    [{"id": "7", "images": ["images/7.png"],
      "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}, …]

As its loaders read it: the first image counts, and of several messages of one role the last. Paths are
relative to the folder of the file. A row without images stays, which there is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflectvlm.eval.tasks.files import json_rows, unique
from reflectvlm.eval.types import Item

_READ = ("id", "images", "messages")


def sharegpt_items(path: Path) -> list[Item]:
    """All rows of a file in its order. What else a row holds goes to `Item.columns`."""
    rows = json_rows(path)
    names = unique([str(row.get("id", "")) for row in rows])
    return [
        _item(row, name, path, place) for place, (row, name) in enumerate(zip(rows, names, strict=True), 1)
    ]


def _item(row: Mapping[str, Any], name: str, path: Path, place: int) -> Item:
    messages, images = row.get("messages"), row.get("images") or []
    if not isinstance(messages, list) or not isinstance(images, list):
        raise ValueError(  # noqa: TRY004 - a user's file, not a caller's type
            f"{path}, row {place}: 'messages' and 'images' must be lists. Fetch the file again, or write "
            'rows {"id", "images": [path], "messages": [{"role", "content"}, …]}.'
        )
    said = {message.get("role"): message.get("content", "") for message in messages}
    answer = str(said.get("assistant", ""))
    return Item(
        id=name,
        question=str(said.get("user", "")),
        answer=answer.strip(),
        images=tuple(images[:1]),
        root=path.parent,
        lookback_answer=answer if answer != answer.strip() else None,
        columns={key: value for key, value in row.items() if key not in _READ},
    )
