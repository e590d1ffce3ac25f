"""MMStar (arXiv 2403.20330): 1,500 single-choice questions that need the image, in 6 x 3 categories.

The official rule reads the first letters of a reply alone: `B…`, `(B…`, `option B…`, `the answer is B…`. The
figure is the mean over rows; `lmms_eval/l2_macro` is what lmms-eval calls the average, the mean of the
18 fine categories' means, which differs because these are not of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectvlm.data.rows import Row
from reflectvlm.eval.tasks.figures import accuracies, mean, unscored
from reflectvlm.eval.tasks.files import first, hub_rows, missing, table_rows
from reflectvlm.eval.tasks.groups import cell, grouped, of, stored_image
from reflectvlm.eval.types import Ask, Item, Mark, Reply, Summary

_BEFORE = ("", "(", "option ", "the answer is ")
_WAYS = (
    "the Hub's Lin-Chen/MMStar: MMStar/mmstar.parquet (or val-….parquet, or a folder that save_to_disk "
    "wrote)",
    "VLMEvalKit's table: MMStar/MMStar.tsv, with the options in columns A to D and images in base64",
)


@dataclass(frozen=True, kw_only=True)
class MMStar:
    """Example: `MMStar().load(Path("eval_data"))` reads `eval_data/MMStar`."""

    @property
    def name(self) -> str:
        return "mmstar"

    def load(self, data_dir: Path) -> list[Item]:
        root = first(data_dir, "MMStar", "mmstar") or data_dir / "MMStar"
        table = first(root, "MMStar.tsv")
        rows = table_rows(table) if table else hub_rows(root, "val") or hub_rows(root, "mmstar")
        if not rows:
            raise missing("MMStar", data_dir, *_WAYS)
        return [_item(row) for row in rows]

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:
        """Nothing is left for a language model."""
        del ask
        return [_mark(reply) for reply in replies]

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        values = accuracies(items, marks, {name: of(name) for name in ("category", "l2_category")})
        fine = grouped(items, marks, "l2_category")
        values["lmms_eval/l2_macro"] = mean(mean(mark.value for _, mark in rows) for rows in fine.values())
        return Summary(headline="accuracy", values=values, unscored=unscored(marks))


def first_letter(reply: str, answer: str) -> str:
    """The letter in the first place where the answer may stand; empty if none holds a letter.

    Official places are tried for the right answer one by one, so that "(B" is read behind the bracket.
    """
    said = reply.lower().strip().replace("\n", " ")
    answer = answer.lower().strip()
    places = [len(start) for start in _BEFORE if said.startswith(start) and len(said) > len(start)]
    if any(said[place] == answer for place in places):
        return answer
    return said[places[-1]] if places else ""


def _mark(reply: Reply) -> Mark:
    letter = first_letter(reply.text, reply.item.answer)
    return Mark(value=float(letter == reply.item.answer.lower().strip()), answer=letter.upper())


def _item(row: Row) -> Item:
    options = [(letter, cell(row, letter)) for letter in "ABCD" if cell(row, letter)]
    lines = [cell(row, "question").strip(), *(f"{letter}: {option}" for letter, option in options)]
    return Item(
        id=cell(row, "index"),
        question="\n".join(lines),
        answer=cell(row, "answer").strip(),
        images=(stored_image(row.get("image")),),
        choices=tuple(option for _, option in options),
        columns={"category": cell(row, "category"), "l2_category": cell(row, "l2_category")},
    )
