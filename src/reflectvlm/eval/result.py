"""One benchmark, scored: figures by scorer, rows on which scorers differ, items without an image.

    scores-TASK.json       figures, intervals, pass@k, and what is missing
    differing-TASK.jsonl   the rows that two scorers mark differently, with both marks and the reply

Every item stays in the denominator: one whose image could not be shown, or that has no reply, is wrong by
every rule that scores it, and its id is listed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from reflectvlm.data.fetch import BadImage, RowImage
from reflectvlm.eval.matching import Matched
from reflectvlm.eval.scorers import Scorer
from reflectvlm.eval.statistics import Interval, avg_at_k, interval, mean_pass_at_k
from reflectvlm.eval.types import Item, Mark, Reply, Summary, Task


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskResult:
    """Replies to one benchmark with the marks of each scorer, in the same order."""

    name: str
    items: Sequence[Item]
    replies: Sequence[Reply]
    samples: int
    marks: Mapping[str, Sequence[Mark]]
    summaries: Mapping[str, Summary]
    """Of several replies to each item: the mean of the figures of each number."""
    missing: Mapping[str, str]
    """Id -> why its image could not be shown."""
    absent: Sequence[str]
    """Ids without a reply, other than those."""

    @property
    def differing(self) -> list[int]:
        """Places of the replies that two scorers mark differently; one that does not score differs from
        none."""
        found = []
        for place in range(len(self.replies)):
            values = {marks[place].value for marks in self.marks.values()} - {None}
            if len(values) > 1:
                found.append(place)
        return found

    @cached_property
    def clusters(self) -> dict[str, str]:
        """What counts as one observation with an item, by its id; images in tables are read once."""
        return {item.id: cluster_of(item) for item in self.items}

    def means(self, scorer: str) -> dict[str, float]:
        """Mean mark of each item with a scored reply, by its id."""
        values = self.by_item(scorer)
        return {id: math.fsum(marks) / len(marks) for id, marks in values.items() if marks}

    def by_item(self, scorer: str) -> dict[str, list[float]]:
        """Scored marks of each item, in the order of their numbers."""
        found: dict[str, list[float]] = {item.id: [] for item in self.items}
        for reply, mark in zip(self.replies, self.marks[scorer], strict=True):
            if mark.value is not None:
                found[reply.item.id].append(mark.value)
        return found


def score_task(
    name: str, task: Task | None, matched: Matched, missing: Mapping[str, str], scorers: Sequence[Scorer]
) -> TaskResult:
    """All scorers on the same replies. `missing`: why an item's image could not be shown, by its id."""
    known = {item.id for item in matched.items}
    missing = {id: why for id, why in missing.items() if id in known}
    absent = [id for id in matched.absent if id not in missing]
    whys = dict.fromkeys(absent, "no reply") | dict.fromkeys(missing, "no image")
    marks = {
        scorer.name: [
            _wrong(reply, mark, whys)
            for reply, mark in zip(matched.replies, scorer(task, matched.replies), strict=True)
        ]
        for scorer in scorers
    }
    summaries = {
        scorer.name: _mean_summary(
            [
                scorer.summary(task, matched.items, part)
                for part in _parts(marks[scorer.name], matched.samples)
            ]
        )
        for scorer in scorers
    }
    return TaskResult(
        name=name,
        items=matched.items,
        replies=matched.replies,
        samples=matched.samples,
        marks=marks,
        summaries=summaries,
        missing=missing,
        absent=absent,
    )


def _wrong(reply: Reply, mark: Mark, whys: Mapping[str, str]) -> Mark:
    """A rule that guesses may find nothing right: what was never answered is wrong, or open if the rule
    leaves it open. What the rule took it for stays."""
    why = "" if reply.text.strip() else whys.get(reply.item.id, "")
    return replace(mark, value=0.0, note=why) if why and mark.value is not None else mark


def cluster_of(item: Item) -> str:
    """Items that share their images count as one observation: a scene's questions are not independent.
    Images are the same by their path or address, or by their bytes where a table holds them."""
    names = [_identity(image) for image in item.images]
    return "\n".join(map(str, names)) if names and None not in names else f"id {item.id}"


def _identity(image: RowImage) -> str | None:
    """None: there is no image, it cannot be read, or it is of no known kind."""
    if isinstance(image, Mapping):
        try:
            inside = image.get("bytes")
        except BadImage:
            return None
        return _identity(image.get("path") if inside is None else inside)
    if isinstance(image, str | os.PathLike):
        name = os.fspath(image)
        if not str(name).startswith("data:"):
            return str(name) or None
        image = str(name).partition(",")[2].encode()
    elif callable(getattr(image, "tobytes", None)) and hasattr(image, "size"):  # of PIL
        image = f"{image.size}".encode() + image.tobytes()
    if isinstance(image, bytes | bytearray | memoryview) and len(image):
        return f"sha256 {hashlib.sha256(image).hexdigest()}"
    return None


def mean_interval(result: TaskResult, scorer: str) -> Interval | None:
    """The mean over items of their marks, with its interval; None where nothing is scored."""
    means = result.means(scorer)
    return interval(list(means.values()), [result.clusters[id] for id in means]) if means else None


def figures(result: TaskResult, scorer: str) -> dict[str, Any]:
    """All that is known by one scorer, as JSON writes it."""
    summary = result.summaries[scorer]
    found: dict[str, Any] = {
        "headline": summary.headline,
        "unit": summary.unit,
        "values": dict(summary.values),
        "unscored": sum(mark.value is None for mark in result.marks[scorer]),
    }
    notes = sorted({mark.note for mark in result.marks[scorer] if mark.value is None and mark.note})
    if notes:
        found["notes"] = notes[:10]
    if mean := mean_interval(result, scorer):
        found["mean"] = mean._asdict()
    if result.samples > 1:
        found |= _of_several(result, scorer)
    return found


def write_result(result: TaskResult, folder: Path, about: Mapping[str, Any]) -> None:
    """Both files, each written aside and renamed."""
    content = {
        "task": result.name,
        "items": len(result.items),
        "samples": result.samples,
        "scorers": {name: figures(result, name) for name in result.marks},
        "differing": len(result.differing),
        "missing": dict(result.missing),
        "no_reply": list(result.absent),
        **about,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
    write_aside(folder / f"scores-{result.name}.json", text)
    lines = [json.dumps(_row(result, place), ensure_ascii=False) + "\n" for place in result.differing]
    write_aside(folder / f"differing-{result.name}.jsonl", "".join(lines))


def _row(result: TaskResult, place: int) -> dict[str, Any]:
    reply = result.replies[place]
    marks = {name: marks[place] for name, marks in result.marks.items()}
    return {
        "id": reply.item.id,
        "number": reply.number,
        "question": reply.item.question,
        "answer": reply.item.answer,
        "marks": {name: {"value": mark.value, "answer": mark.answer} for name, mark in marks.items()},
        "text": reply.text,
    }


def partly_scored(result: TaskResult, scorer: str) -> int:
    """Items of several replies of which not all are scored: avg@k and pass@k leave them out."""
    if result.samples == 1:
        return 0
    return sum(len(marks) < result.samples for marks in result.by_item(scorer).values())


def _of_several(result: TaskResult, scorer: str) -> dict[str, float]:
    """avg@k and, where marks are right or wrong, pass@k, for k = 1, 2, 4, … and all; `left_out@k` counts the
    items that are in none of them."""
    values = [marks for marks in result.by_item(scorer).values() if len(marks) == result.samples]
    out: dict[str, float] = {"left_out@k": partly_scored(result, scorer)}
    if not values:
        return out
    ks = sorted({2**power for power in range(result.samples.bit_length())} | {result.samples})
    ks = [k for k in ks if k <= result.samples]
    found = {f"avg@{k}": avg_at_k(values, k) for k in ks}
    if {mark for marks in values for mark in marks} <= {0.0, 1.0}:
        rights = [[mark == 1 for mark in marks] for marks in values]
        found |= {f"pass@{k}": mean_pass_at_k(rights, k) for k in ks}
    return found | out


def _parts(marks: Sequence[Mark], samples: int) -> list[Sequence[Mark]]:
    """The marks of each number."""
    size = len(marks) // samples
    return [marks[first : first + size] for first in range(0, size * samples, size)] if size else [marks]


def _mean_summary(summaries: Sequence[Summary]) -> Summary:
    first = summaries[0]
    if len(summaries) == 1:
        return first
    values: dict[str, float | None] = {}
    for name in first.values:
        known = [value for summary in summaries if (value := summary.values.get(name)) is not None]
        values[name] = math.fsum(known) / len(known) if len(known) == len(summaries) else None
    unscored = sum(summary.unscored for summary in summaries)
    return replace(first, values=values, unscored=unscored)


def write_aside(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"{path} cannot be written: {why}. Name another out=FOLDER.") from error
