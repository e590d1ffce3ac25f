"""MMMU (arXiv 2311.16502): college questions of 30 subjects in 6 domains; validation has 900 rows, dev 150.

Replies are read as in `mmmu_answers.py`. Accuracy over all rows is the figure that tables show, beside it
one for each subject and domain. A row with several gold answers is right by any of them; the strict and
Look-Back's scorer know only the first. The test split's answers are not public, so it is not here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from reflectvlm.data.rows import IMAGE_MARKER
from reflectvlm.eval.tasks.figures import accuracies, unscored
from reflectvlm.eval.tasks.files import first, hub_rows, missing
from reflectvlm.eval.tasks.groups import cell, of, stored_image
from reflectvlm.eval.tasks.mmmu_answers import choice, equals_open, letters_of, open_answers
from reflectvlm.eval.types import Ask, Item, Mark, Reply, Summary

Split = Literal["validation", "dev"]

_DOMAINS = {
    "Art and Design": "Art, Art_Theory, Design, Music",
    "Business": "Accounting, Economics, Finance, Manage, Marketing",
    "Science": "Biology, Chemistry, Geography, Math, Physics",
    "Health and Medicine": "Basic_Medical_Science, Clinical_Medicine, Diagnostics_and_Laboratory_Medicine, "
    "Pharmacy, Public_Health",
    "Humanities and Social Science": "History, Literature, Sociology, Psychology",
    "Tech and Engineering": "Agriculture, Architecture_and_Engineering, Computer_Science, Electronics, "
    "Energy_and_Power, Materials, Mechanical_Engineering",
}
DOMAIN_OF = {subject: domain for domain, names in _DOMAINS.items() for subject in names.split(", ")}
_NUMBERED = re.compile(r"<image\s+(\d+)>")
_WAYS = (
    "the Hub's MMMU/MMMU: MMMU/Accounting/{split}-00000-of-00001.parquet, MMMU/Art/…, a folder for each "
    "subject",
    "the Hub's lmms-lab/MMMU: MMMU/data/{split}-….parquet (or a folder that save_to_disk wrote)",
)


@dataclass(frozen=True, kw_only=True)
class MMMU:
    """Example: `MMMU(split="dev").load(Path("eval_data"))` reads `eval_data/MMMU`."""

    split: Split = "validation"

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(
                f"MMMU.split is {self.split!r}. It must be one of {', '.join(get_args(Split))}; "
                "the answers of the test split are not public."
            )

    @property
    def name(self) -> str:
        return "mmmu" if self.split == "validation" else f"mmmu_{self.split}"

    def load(self, data_dir: Path) -> list[Item]:
        root = first(data_dir, "MMMU", "mmmu") or data_dir / "MMMU"
        rows = hub_rows(root, self.split)
        if not rows:
            raise missing("MMMU", data_dir, *(way.format(split=self.split) for way in _WAYS))
        return [mmmu_item(row) for row in rows]

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:
        """Nothing is left for a language model."""
        del ask
        return [_mark(reply) for reply in replies]

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        by = {name: of(name) for name in ("domain", "subject", "question_type")}
        values = accuracies(items, marks, by)
        return Summary(headline="accuracy", values=values, unscored=unscored(marks))


def _mark(reply: Reply) -> Mark:
    item = reply.item
    if item.choices:
        letter, guessed = choice(reply.text, item.choices, item.id)
        return letter_mark(item, letter, guessed)
    answers = open_answers(reply.text)
    right = equals_open(item.columns["golds"], answers)
    return Mark(value=float(right), answer="; ".join(map(str, answers)))


def letter_mark(item: Item, letter: str, guessed: bool) -> Mark:
    golds = item.columns.get("golds") or (item.answer,)
    note = "no option found in the reply: a guess, as by the official rule" if guessed else ""
    return Mark(value=float(letter in golds), answer=letter, note=note)


def mmmu_item(row: Mapping[str, Any]) -> Item:
    """One row of the Hub's tables."""
    name = cell(row, "id")
    options = listed(row["options"], name) if row.get("question_type") != "open" else ()
    golds = _golds(row["answer"])
    subject = cell(row, "subject") or _subject(name)
    question, numbers = with_images(asked(str(row["question"]), options), row)
    return Item(
        id=name,
        question=question,
        answer=golds[0],
        images=tuple(stored_image(row.get(f"image_{number}")) for number in numbers),
        choices=options,
        columns={
            "golds": golds,
            "subject": subject,
            "domain": DOMAIN_OF.get(subject, ""),
            "question_type": "choice" if options else "open",
        },
    )


def asked(question: str, options: Sequence[str]) -> str:
    lines = [f"({letter}) {option}" for letter, option in zip(letters_of(options), options, strict=True)]
    return "\n".join([question.strip(), *lines])


def with_images(question: str, row: Mapping[str, Any]) -> tuple[str, list[int]]:
    """The question with a marker where an image is first named, and the numbers of these images in order.

    Named again, an image is not shown again: "image 2" is left in its place. Without any marker all images
    of the row stand in front; beside markers, an image that none names is left out, as the authors do.
    """
    numbers: list[int] = []

    def marked(found: re.Match[str]) -> str:
        number = int(found[1])
        if number in numbers:
            return f"image {number}"
        numbers.append(number)
        return IMAGE_MARKER

    question = _NUMBERED.sub(marked, question)
    return question, numbers or [number for number in range(1, 8) if row.get(f"image_{number}")]


def listed(options: Any, name: str) -> tuple[str, ...]:
    """The options: a list, or the text of one, as the tables have it. Nothing in it is run."""
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            options = None
    if not isinstance(options, list | tuple):
        raise ValueError(f"The options of {name} are no list. Fetch the data again.")  # noqa: TRY004
    return tuple(map(str, options))


def _golds(answer: Any) -> tuple[str, ...]:
    """An open question may have several right answers: `['24/7', '3.429']`."""
    if isinstance(answer, str) and answer.startswith("[") and answer.endswith("]"):
        try:
            found = ast.literal_eval(answer)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return (answer,)
        return tuple(map(str, found)) or (answer,)
    if isinstance(answer, list | tuple):
        return tuple(map(str, answer))
    return (str(answer),)


def _subject(name: str) -> str:
    """`validation_Art_Theory_7` is of Art_Theory."""
    return "_".join(name.split("_")[1:-1])
