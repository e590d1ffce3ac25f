"""The items of a JSON file that is one long array, found by their place: memory holds one item.

`[{…}, {…}, …]` of some hundred megabytes takes gigabytes when it is parsed as a whole. One pass over the file
finds where each item begins and ends; an item is parsed when it is asked for, by the same strict parser as a
line of JSON lines. Items are named by their number: `qa_tuning.json:17` is the seventeenth.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from reflectvlm.data.records import Records, empty_records, parse_json

# A string as a whole, so that brackets in it are none; an unclosed one runs to the end.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\Z)|[\[\]{}]', re.DOTALL)


def open_json_array(path: Path) -> Records:
    """Raises ValueError if the file is no array of objects."""
    records = empty_records(path, parse_json)
    if not records.file.stat().st_size:
        raise ValueError(f"{path} is empty. Fetch it again.")
    depth, start = 0, 0
    with records.file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for match in _TOKEN.finditer(data):
            token = match[0][:1]
            if depth == 0 and token != b"[":
                break
            if depth == 1 and token == b"{":
                start = match.start()
            if token in b"[{":
                depth += 1
            elif token in b"]}":
                depth -= 1
                if depth == 1 and token == b"}":
                    records.add(start, match.end(), len(records) + 1)
                if depth == 0:
                    return records
    raise ValueError(f"{path} is no whole JSON array of objects: it may be cut off. Fetch it again.")
