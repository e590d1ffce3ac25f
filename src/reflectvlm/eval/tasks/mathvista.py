"""MathVista (arXiv 2310.02255): 1,000 rows in `testmini`, 540 with options, 460 with a value.

Extraction, each step only where the one before found nothing: the reply is one of the options; it is a
whole number or a number, where the answer is one; `The answer is "…".`; a language model reads it. Then
the extraction is brought to the form of the answer, and both must be the same text:

    options   a letter in brackets, or alone, names its option; anything else, *also an empty text*, is
              taken for the option with the smallest edit distance (`ignore_empty_extractions`: wrong)
    integer   str(int(float(x)))
    float     str(round(float(x), precision))
    list      as it is

The prompt of the language model is ours, and so figures made with it are not those of the official one.
Left out: gains over random guessing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from reflectvlm.eval.tasks.figures import accuracies, unscored
from reflectvlm.eval.tasks.files import first, folders, hub_rows, json_rows, missing, read_json
from reflectvlm.eval.types import Ask, Item, Manner, Mark, Reply, Summary

Split = Literal["testmini", "test"]
_QUOTED = 'The answer is "'
_IN_BRACKETS = re.compile(r"\(([a-zA-Z])\)")
_LONGEST_PROMPT = 20_000
_METADATA = ("language", "source", "category", "task", "context", "grade")


@dataclass(frozen=True, kw_only=True)
class MathVista:
    """Example: `MathVista().load(Path("data"))`"""

    split: Split = "testmini"
    """`test` has no gold answers: it is asked and never scored."""
    asked: Manner = "official"
    """Both ask the data set's own `query`. Where it is not there, `official` puts the question together."""
    quick_extract: bool = True
    """Whether `The answer is "…".` is read without a language model."""
    ignore_empty_extractions: bool = False
    """True: an empty extraction is wrong where there are options, and does not pick one of them."""

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(
                f"MathVista.split is {self.split!r}. It must be one of {', '.join(get_args(Split))}."
            )

    @property
    def name(self) -> str:
        return "mathvista" if self.split == "testmini" else f"mathvista_{self.split}"

    def load(self, data_dir: Path) -> list[Item]:
        rows, root = self._rows(data_dir)
        return [self._item(row, root) for row in rows]

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:
        found = [extraction(reply, self.quick_extract) for reply in replies]
        open_places = [place for place, text in enumerate(found) if text is None]
        if ask is not None and open_places:
            told = ask([extraction_prompt(replies[place]) for place in open_places])
            for place, text in zip(open_places, told, strict=True):
                found[place] = text
        return [self._mark(reply.item, text) for reply, text in zip(replies, found, strict=True)]

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        by = {
            "question_type": lambda item: [item.columns["question_type"]],
            "answer_type": lambda item: [item.columns["answer_type"]],
            **{key: _of_metadata(key) for key in _METADATA},
            "skills": lambda item: _metadata(item).get("skills") or [],
        }
        return Summary(headline="accuracy", values=accuracies(items, marks, by), unscored=unscored(marks))

    def _mark(self, item: Item, text: str | None) -> Mark:
        if not item.columns["gold"]:
            return Mark(value=None, note="the row has no gold answer")
        if text is None:
            return Mark(value=None, note="needs a language model to extract the answer")
        answer = normalised(text, item, self.ignore_empty_extractions)
        note = "" if answer is not None else f"{text.strip()[:80]!r} is no {item.columns['answer_type']}"
        return Mark(value=float(answer == item.columns["gold"]), answer=answer or "", note=note)

    def _rows(self, data_dir: Path) -> tuple[list[dict[str, Any]], Path]:
        names = ("mathvista", "MathVista")
        wanted = [f"{name}/{inner}{self.split}.json" for name in names for inner in ("", "data/")]
        if file := first(data_dir, *wanted):
            return _with_queries(json_rows(file), file), file.parent
        for root in folders(data_dir, *names):
            if rows := hub_rows(root, self.split):
                return [dict(row) for row in rows], root
        raise missing(
            "MathVista",
            data_dir,
            f"the hub's AI4Math/MathVista: mathvista/data/{self.split}-….parquet",
            f"github.com/lupantech/MathVista, folder data, with its images.zip unpacked: "
            f"mathvista/{self.split}.json, mathvista/query.json, mathvista/images/1.jpg …",
        )

    def _item(self, row: Mapping[str, Any], root: Path) -> Item:
        choices = tuple(map(str, row.get("choices") or ()))
        gold = str(row.get("answer") or "")
        query = row.get("query")
        if query is None and self.asked == "lookback":
            raise ValueError(
                f"MathVista row {row.get('pid')} in {root} has no 'query', which Look-Back asks. "
                "Put query.json beside the file, or take the hub's form."
            )
        stored = row.get("decoded_image")
        return Item(
            id=str(row["pid"]),
            question=str(query) if query is not None else built_query(row),
            answer=chr(ord("A") + choices.index(gold)) if gold in choices else gold,
            images=(stored if stored is not None else row["image"],),
            root=root,
            choices=choices,
            columns={
                "gold": gold,
                "question_type": str(row["question_type"]),
                "answer_type": str(row["answer_type"]),
                "precision": row.get("precision"),
                "metadata": row.get("metadata") or {},
            },
        )


def extraction(reply: Reply, quick_extract: bool) -> str | None:
    """What the rules find, or None: only a language model can tell. An empty reply is an empty extraction."""
    text, item = reply.text, reply.item
    if text == "" or (item.columns["question_type"] == "multi_choice" and text in item.choices):
        return text
    number = _number(text, item.columns["answer_type"])
    if number is not None:
        return number
    return _quoted(text) if quick_extract else None


def _quoted(text: str) -> str | None:
    """`The answer is "(.*)"\\.`, but linear in the length of a line that begins it a thousand times."""
    for line in text.split("\n"):
        start, end = line.find(_QUOTED), line.rfind('".')
        if 0 <= start <= end - len(_QUOTED):
            return line[start + len(_QUOTED) : end]
    return None


def _number(text: str, kind: str) -> str | None:
    """`text` as Python's `int` or `float` reads it, where the answer is of that kind."""
    if kind not in ("integer", "float"):
        return None
    try:
        return str(int(text) if kind == "integer" else float(text))
    except ValueError:
        return None


def normalised(text: str, item: Item, ignore_empty: bool) -> str | None:
    """An extraction in the form of the answer; None: it has none, and is wrong."""
    kind = item.columns["answer_type"]
    if item.columns["question_type"] == "multi_choice":
        return _choice(text.strip(), item.choices, ignore_empty)
    try:
        if kind == "integer":
            return str(int(float(text)))
        if kind == "float":
            return str(round(float(text), int(item.columns["precision"])))
    except (ValueError, OverflowError, TypeError):  # no number, infinite, or a row without a precision
        return None
    return text


def _choice(text: str, choices: Sequence[str], ignore_empty: bool) -> str | None:
    if not choices or (ignore_empty and not text):
        return None
    letter = _IN_BRACKETS.search(text)
    name = letter[1].upper() if letter else text
    letters = [chr(ord("A") + place) for place in range(len(choices))]
    return choices[letters.index(name)] if name in letters else nearest(name, choices)


def nearest(text: str, choices: Sequence[str]) -> str:
    """The choice with the smallest edit distance, the first of several."""
    from rapidfuzz.distance import Levenshtein

    return min(choices, key=lambda choice: Levenshtein.distance(text, choice))


def extraction_prompt(reply: Reply) -> str:
    """Asks a language model for the answer in a reply. Our words, not the official prompt."""
    form = {
        "multi_choice": "the letter of the option that the reply chooses",
        "integer": "the whole number that the reply ends on, in digits and without a unit",
        "float": "the decimal number that the reply ends on, in digits and without a unit",
        "list": "the list that the reply ends on, written like [1, 2, 3]",
    }
    columns = reply.item.columns
    kind = columns["question_type"] if columns["question_type"] in form else columns["answer_type"]
    wanted = form.get(kind, "the answer that the reply ends on")
    return (
        f"Below are a question and somebody's reply to it. Write down {wanted}, and nothing else. Do not "
        "solve the question yourself; if the reply gives no answer, write nothing.\n\n"
        f"[Question]\n{reply.item.question}\n\n[Reply]\n{reply.text[-_LONGEST_PROMPT:]}\n\n[Answer]\n"
    )


def built_query(row: Mapping[str, Any]) -> str:
    """The question of a row that brings no query of its own: with its unit, precision and options."""
    lines = [str(row["question"]) + (f" (Unit: {row['unit']})" if row.get("unit") else "")]
    if row["answer_type"] == "float" and row.get("precision") is not None:
        lines.append(f"Number of decimal places: {int(row['precision'])}")
    if row.get("choices"):
        lines.append("Choices:")
        lines += [f"({chr(ord('A') + place)}) {text}" for place, text in enumerate(row["choices"])]
    return "\n".join(lines)


def _with_queries(rows: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """The official files keep the queries apart, by the row's id."""
    path = file.with_name("query.json")
    queries = read_json(path) if path.exists() else {}
    return [{"query": queries.get(str(row["pid"])), **row} for row in rows]


def _metadata(item: Item) -> Mapping[str, Any]:
    found: Mapping[str, Any] = item.columns["metadata"]
    return found


def _of_metadata(key: str) -> Any:
    return lambda item: [_metadata(item)[key]] if _metadata(item).get(key) else []
