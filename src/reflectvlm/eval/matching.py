"""Which reply is to which item: by id, by another name of the row, by question, or by the row's index.

Files of ours name items by their ids. Another tool counts its rows in its own way, and its row numbers may be
ids here by accident: they count as such only where what was asked, or the gold answer, is mostly the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from reflectvlm.eval.predictions import OURS, Prediction, Predictions, numbered
from reflectvlm.eval.types import Item, Reply

log = logging.getLogger("reflectvlm")


class Matched(NamedTuple):
    """Replies to a benchmark's items: all first replies in the items' order, then all second ones."""

    items: Sequence[Item]
    replies: Sequence[Reply]
    samples: int
    """Replies to each item."""
    absent: Sequence[str]
    """Ids of items without a reply of every number. They count as replied to with an empty text."""


def matched(items: Sequence[Item], predictions: Predictions) -> Matched:
    """Replies by id or, where another tool counts its rows in its own way, by question. Items without one
    stay in the denominator; predictions of other items are left out, unless they are all of them."""
    lines = _with_ids_of(items, predictions)
    texts = {(line.id, line.number): line.text for line in lines}
    known = {item.id for item in items}
    samples = 1 + max((number for id, number in texts if id in known), default=0)
    replies = [
        Reply(item=item, text=texts.get((item.id, number), ""), number=number)
        for number in range(samples)
        for item in items
    ]
    absent = [item.id for item in items if any((item.id, n) not in texts for n in range(samples))]
    return Matched(items, replies, samples, absent)


def _with_ids_of(items: Sequence[Item], predictions: Predictions) -> Sequence[Prediction]:
    """The predictions under the items' own ids."""
    lines, known = predictions.lines, {item.id: item for item in items}
    by_id = [line for line in lines if line.id in known]
    if predictions.kind == OURS:
        if not by_id:
            raise _strangers(items, predictions)
        if 2 * sum(_same_question(known[line.id], line) for line in by_id) < len(by_id):
            raise _other_questions(known[by_id[0].id], by_id[0], predictions)
        return lines
    if by_name := _by_name(known, lines):
        return by_name
    agreeing = sum(_agree(known[line.id], line) for line in by_id)
    if by_id and agreeing == len(lines):
        return lines
    if by_index := _by_index(items, lines):
        return numbered(by_index)
    if _bare(lines) and not known.keys() <= {line.id for line in lines}:
        return _by_row(items, predictions)
    by_question = _by_question(items, predictions)
    if len(by_question) > agreeing:
        return numbered(by_question)
    pairs = [(known[line.id], line) for line in by_id]
    if not by_id or 2 * agreeing < len(by_id) or (not _any_asked(lines) and not _borne_out(pairs)):
        raise _strangers(items, predictions)
    return lines


def _by_name(known: Mapping[str, Item], lines: Sequence[Prediction]) -> list[Prediction]:
    """Under the first name by which most rows are items, each another one, of the same questions; none where
    there is no such name."""
    rows = len({line.id for line in lines})
    for name in dict.fromkeys(name for line in lines for name in line.named):
        ids = {line.id: line.named[name] for line in lines if line.named.get(name) in known}
        found = [replace(line, id=ids[line.id]) for line in lines if line.id in ids]
        several = len(set(ids.values())) < len(ids)
        enough = 2 * len(ids) >= min(rows, len(known))
        if found and enough and not several and _borne_out([(known[line.id], line) for line in found]):
            return found
    return []


def _by_index(items: Sequence[Item], lines: Sequence[Prediction]) -> list[Prediction]:
    """By the index that the benchmark's own rows have where another tool's table is its data; a row may be
    several items there, as one question of several of POPE's sets. Where nothing else bears it out, every
    item must have its row: counted from 1 instead of 0 all but one would have one."""
    indexed: dict[str, list[Item]] = {}
    for item in items:
        if "index" in item.columns:
            indexed.setdefault(str(item.columns["index"]), []).append(item)
    if _bare(lines) and not indexed.keys() <= {line.id for line in lines}:
        return []
    pairs = [(item, replace(line, id=item.id)) for line in lines for item in indexed.get(line.id, ())]
    return [line for _, line in pairs] if _borne_out(pairs) else []


def _by_row(items: Sequence[Item], predictions: Predictions) -> list[Prediction]:
    """Of a table that says neither question nor gold answer, and has as many rows as the task: by their
    number, from 0 or 1. Nothing bears it out, which is told."""
    ids = {line.id for line in predictions.lines}
    start = next((n for n in (0, 1) if ids == set(map(str, range(n, n + len(items))))), None)
    if start is None:
        raise ValueError(
            f"{predictions.path} has neither questions nor gold answers, and its index does not tell which "
            f"rows of this task it has: {len(ids):,} rows there, {len(items):,} here. Keep its columns "
            "question and answer, give the settings that it was made with (split, subset, limit), or put the "
            "table that was asked into data_dir, as POPE/POPE.tsv."
        )
    if all("index" in item.columns for item in items):
        items = sorted(items, key=lambda item: int(item.columns["index"]))
    log.warning(
        "%s names neither questions nor gold answers: its rows, counted from %d, are taken for those of the "
        "task in their order, %s to %s",
        predictions.path, start, items[0].id, items[-1].id,
    )  # fmt: skip
    ours = {str(place): item.id for place, item in enumerate(items, start)}
    return [replace(line, id=ours[line.id]) for line in predictions.lines]


def _bare(lines: Sequence[Prediction]) -> bool:
    """They say nothing by which they could be told."""
    return not any(line.question.strip() or line.answer.strip() for line in lines)


def _any_asked(lines: Sequence[Prediction]) -> bool:
    return any(line.question.strip() for line in lines)


def _borne_out(pairs: Sequence[tuple[Item, Prediction]]) -> bool:
    """Nine of ten have their item's question or, without one, its gold answer: of yes and no half agree by
    accident."""
    return 10 * sum(_same_row(item, line) for item, line in pairs) >= 9 * len(pairs)


def _same_row(item: Item, line: Prediction) -> bool:
    """Nothing that the line says is against it."""
    if said := _plain(line.question):
        return said in _plain(item.question) or _plain(item.question) in said
    return not line.answer.strip() or _plain(line.answer).lower() == _plain(item.answer).lower()


def _agree(item: Item, line: Prediction) -> bool:
    """Of the question or the gold answer, whichever the line has, one is the item's."""
    asked, said = _plain(item.question), _plain(line.question)
    ours, gold = _plain(item.answer).lower(), _plain(line.answer).lower()
    if said and (asked in said or said in asked):
        return True
    return ours == gold if gold else not said


def _same_question(item: Item, line: Prediction) -> bool:
    """A line of ours says what was asked; the gold answer alone, a yes or a letter, may agree by accident."""
    return _plain(line.question) in ("", _plain(item.question))


def _other_questions(item: Item, line: Prediction, predictions: Predictions) -> ValueError:
    return ValueError(
        f"{predictions.path} has ids of this task by accident: most of its questions are others, as that of "
        f"{line.id!r}, {_plain(line.question)[:60]!r} there and {_plain(item.question)[:60]!r} here. Name "
        "the task and the settings that it was made with, or leave task= out to score it by the gold "
        "answers in the file."
    )


def _strangers(items: Sequence[Item], predictions: Predictions) -> ValueError:
    ours, theirs = (
        ", ".join(repr(one.id) for one in some[:3]) or "none" for some in (items, predictions.lines)
    )
    return ValueError(
        f"{predictions.path} does not belong to this task: neither the ids ({theirs}, … there; {ours}, … "
        f"here) nor "
        "the questions agree. Name the task that it was made with, or leave task= out to score it by the "
        "gold "
        "answers in the file."
    )


def _by_question(items: Sequence[Item], predictions: Predictions) -> list[Prediction]:
    """Predictions under the ids of the items with their question. Items of one question, as the pages of one
    benchmark are often asked, are told apart by their order in the file, if the gold answers bear it out."""
    asked: dict[str, list[Item]] = {}
    for item in items:
        asked.setdefault(_plain(item.question), []).append(item)
    said: dict[str, dict[str, list[Prediction]]] = {}
    for line in predictions.lines:
        said.setdefault(_plain(line.question), {}).setdefault(line.id, []).append(line)
    found = []
    for question, rows in said.items():
        wanted = asked.get(question, []) if question else []
        pairs = list(zip(wanted, rows.values(), strict=False))
        if len(wanted) > 1 and not all(_same_gold(item, line) for item, some in pairs for line in some):
            raise _cannot_tell(question, predictions)
        found += [replace(line, id=item.id) for item, some in pairs for line in some]
    return found


def _same_gold(item: Item, line: Prediction) -> bool:
    one, other = (_plain(text).lower() for text in (item.answer, line.answer))
    return one == other or not one


def _cannot_tell(question: str, predictions: Predictions) -> ValueError:
    return ValueError(
        f"{predictions.path} asks {question[:60]!r} several times, of other gold answers than the task in "
        "this order, so its replies cannot be told apart. Give the task the settings that the file was made "
        "with (its split, its limit), or leave task= out to score it by the gold answers in the file."
    )


def _plain(text: str) -> str:
    return " ".join(text.split())
