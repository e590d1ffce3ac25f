"""LLaVA-CoT-100k (arXiv 2411.10440): the hub's Xkev/LLaVA-CoT-100k, `train.jsonl` and `image.zip` unpacked.

As it comes, one object a line:

    id             text
    image          path below the folder of images
    conversations  [{"from": "human", "value": question}, {"from": "gpt", "value": reply}, …]

A reply is `<SUMMARY>…</SUMMARY> <CAPTION>…</CAPTION> <REASONING>…</REASONING> <CONCLUSION>…</CONCLUSION>`.
As it leaves: `id` (`llava-cot-` and the line, because ids are not promised to differ), `question` and
`answer` (the conclusion) of the first exchange, `images`, and the columns

    trace      the whole reply
    summary, caption, reasoning    its parts, where it has them
    exchanges  how many the conversation has
    source_id  the source's own id

Left out: later exchanges. They ask about a conversation that the model never had.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectvlm.data.readers.layout import (
    Converted,
    exchanges,
    first_file,
    image_root,
    missing,
    others,
    text_of,
)
from reflectvlm.data.records import open_json_lines
from reflectvlm.data.rows import BadRow, Row
from reflectvlm.data.sources import PathLike

_PARTS = ("summary", "caption", "reasoning", "conclusion")


@dataclass(frozen=True, slots=True)
class LlavaCot:
    """Example: `dataset(LlavaCot("LLaVA-CoT-100k"))`"""

    folder: PathLike

    @property
    def root(self) -> Path:
        names = ("", "image", "images", "image_files")
        return image_root(Path(self.folder), names, open_json_lines(self._file), "image", "LLaVA-CoT-100k")

    def open(self) -> Converted:
        return Converted(open_json_lines(self._file), _plain)

    @property
    def _file(self) -> Path:
        folder = Path(self.folder)
        file = first_file(folder, "train.jsonl", "train.jsonl.gz")
        if file is None:
            raise missing(
                "LLaVA-CoT-100k",
                folder,
                "the hub's Xkev/LLaVA-CoT-100k: train.jsonl, and image.zip (parts joined) unpacked beside it",
            )
        return file


def _plain(row: Row, position: str, _: int) -> dict[str, Any]:
    talk = exchanges(row, position)
    question, reply = talk[0]
    parts = {name: part for name in _PARTS if (part := section(reply, name.upper())) is not None}
    conclusion = parts.pop("conclusion", "")
    if not conclusion:
        detail = "The reply has no <CONCLUSION>…</CONCLUSION> with an answer in it."
        raise BadRow(position, "conversations", "no conclusion", "Remove the row.", detail)
    return {
        **others(row, "conversations", "image", "id"),
        **parts,
        "id": f"llava-cot-{position.rpartition(':')[2]}",
        "question": question,
        "answer": conclusion,
        "images": text_of(row, "image", position),
        "trace": reply,
        "exchanges": len(talk),
        "source_id": str(row.get("id", "")),
    }


def section(text: str, tag: str) -> str | None:
    """What stands in the last `<TAG>…</TAG>`, without outer spaces."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return found[-1].strip() if found else None
