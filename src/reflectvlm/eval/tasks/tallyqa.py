"""TallyQA (arXiv 1810.12440): counting, 38,589 test questions, simple and complex ones.

The count in a reply is its first number from 0 to 20, in digits or as a word, that stands by itself
(`25` is none, and `3.5` is 3), as VLMEvalKit reads it; the paper's own models choose among numbers.
Accuracy and, as in the paper, the root of the mean squared error, over all and apart for simple and
complex questions. Replies without a number are wrong, and the error leaves them out: `no_number` is their
share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectvlm.eval.tasks.figures import accuracies, unscored
from reflectvlm.eval.tasks.files import first, folders, hub_rows, json_rows, missing, unique
from reflectvlm.eval.tasks.sharegpt import sharegpt_items
from reflectvlm.eval.types import Ask, Item, Manner, Mark, Reply, Summary

_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
    "twenty",
)
_COUNT = re.compile(rf"\b(?:([0-9]|1[0-9]|20)|({'|'.join(_WORDS)}))\b")
_LOOKBACK = "Tallyqa/Tallyqa.json"


@dataclass(frozen=True, kw_only=True)
class TallyQA:
    """Example: `TallyQA().load(Path("data"))`"""

    asked: Manner = "official"

    @property
    def name(self) -> str:
        return "tallyqa"

    def load(self, data_dir: Path) -> list[Item]:
        if self.asked == "lookback":
            if file := first(data_dir, _LOOKBACK):
                return sharegpt_items(file)
            way = "the hub's ShuoY/Look-Back-eval, unzipped into it: Tallyqa/Tallyqa.json and its images"
            raise missing("TallyQA in Look-Back's form", data_dir, way)
        names = ("tallyqa", "TallyQA")
        if file := first(data_dir, *(f"{name}/test.json" for name in names)):
            return _official(json_rows(file), file.parent)
        for root in folders(data_dir, *names):
            if rows := hub_rows(root, "test"):
                return _of_hub(rows, root)
        raise missing(
            "TallyQA",
            data_dir,
            "the hub's vikhyatk/tallyqa-test: tallyqa/data/test-….parquet",
            "github.com/manoja328/TallyQA_dataset (tallyqa.zip) and Visual Genome's images: "
            "tallyqa/test.json, tallyqa/VG_100K/2.jpg …, tallyqa/VG_100K_2/2410408.jpg …",
        )

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:  # noqa: ARG002
        marks = []
        for reply in replies:
            found, gold = count(reply.text), count(reply.item.answer)
            note = "" if found is not None else "no number from 0 to 20"
            answer = "" if found is None else str(found)
            marks.append(Mark(value=float(found is not None and found == gold), answer=answer, note=note))
        return marks

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        values = accuracies(items, marks, {"kind": _kind})
        pairs = list(zip(items, marks, strict=True))
        values["rmse"] = _error(pairs)
        for kind in dict.fromkeys(name for item in items for name in _kind(item)):
            values[f"rmse/kind/{kind}"] = _error([pair for pair in pairs if kind in _kind(pair[0])])
        scored = [mark for mark in marks if mark.value is not None]
        without = sum(count(mark.answer) is None for mark in scored)
        values["no_number"] = without / len(scored) if scored else None
        return Summary(headline="accuracy", values=values, unscored=unscored(marks))


def count(text: str) -> int | None:
    """The first number from 0 to 20 in a text."""
    found = _COUNT.search(text.lower())
    if found is None:
        return None
    return int(found[1]) if found[1] else _WORDS.index(found[2])


def _error(pairs: Sequence[tuple[Item, Mark]]) -> float | None:
    """Root of the mean squared difference, over the scored replies with a number."""
    both = [(count(item.answer), count(mark.answer)) for item, mark in pairs if mark.value is not None]
    squares = [(gold - told) ** 2 for gold, told in both if gold is not None and told is not None]
    return math.sqrt(sum(squares) / len(squares)) if squares else None


def _kind(item: Item) -> list[str]:
    """Look-Back's rows do not say it."""
    simple = item.columns.get("simple")
    return [] if simple is None else ["simple" if simple else "complex"]


def _official(rows: Sequence[Mapping[str, Any]], root: Path) -> list[Item]:
    names = unique([str(row.get("question_id", "")) for row in rows])
    return [
        Item(
            id=name,
            question=str(row["question"]),
            answer=str(row["answer"]),
            images=(row["image"],),
            root=root,
            columns={"simple": bool(row["issimple"]), "data_source": row.get("data_source", "")},
        )
        for row, name in zip(rows, names, strict=True)
    ]


def _of_hub(rows: Sequence[Mapping[str, Any]], root: Path) -> list[Item]:
    """One row per image there, with its questions in a list."""
    return [
        Item(
            id=f"{place}-{number}",
            question=str(one["question"]),
            answer=str(one["answer"]),
            images=(row["image"],),
            root=root,
            columns={"simple": bool(one["is_simple"]), "data_source": one.get("data_source", "")},
        )
        for place, row in enumerate(rows)
        for number, one in enumerate(row["qa"])
    ]
