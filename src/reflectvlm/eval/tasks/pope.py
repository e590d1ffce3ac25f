"""POPE (arXiv 2305.10355): is there such an object in the image? Three ways to choose absent ones.

The official rule takes the reply up to its first full stop, drops commas, and says no if one of its words is
No, no or not; everything else is yes, an empty reply too. Yes is the positive class. Reported for each of
the three sets: accuracy, precision, recall, F1 and the share of yes among the *predictions*; the
headline is the mean of the three F1.

lmms-eval takes the share of yes from the labels, which makes it 0.5 whatever a model says. VLMEvalKit has
a third reading, Unknown, which is No in F1 and wrong in accuracy; where another scorer's marks have neither
yes nor no, the row here is wrong in both, and counts as the answer that the label is not.

A row without a reply is wrong: a missed Yes, or a false one where the label is No, since the official rule
reads an empty text as yes. So it lowers recall or precision, and F1, beside accuracy, by every scorer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeGuard, get_args

from reflectvlm.data.records import open_json_lines
from reflectvlm.data.rows import Row
from reflectvlm.eval.tasks.figures import mean, unscored
from reflectvlm.eval.tasks.files import first, hub_rows, missing, table_rows
from reflectvlm.eval.tasks.groups import (
    cell,
    grouped,
    images_by_index,
    row_index,
    shared_image,
    stored_image,
)
from reflectvlm.eval.types import Ask, Item, Mark, Reply, Summary

Subset = Literal["all", "random", "popular", "adversarial"]
SETS = ("random", "popular", "adversarial")
_NO = frozenset({"No", "not", "no"})
_WAYS = (
    "github.com/AoiDragon/POPE, folder output/coco: POPE/coco_pope_random.json, POPE/coco_pope_popular.json, "
    "POPE/coco_pope_adversarial.json, one JSON object a line; with COCO's val2014.zip unpacked to "
    "POPE/val2014/COCO_val2014_000000000042.jpg … (images/ will do; 500 of them are asked about)",
    "the Hub's lmms-lab/POPE: POPE/Full/random-….parquet, popular-…, adversarial-…, or "
    "POPE/data/test-….parquet (or a folder that save_to_disk wrote)",
    "VLMEvalKit's table, whose rows its results count: POPE/POPE.tsv, with images in base64",
)


@dataclass(frozen=True, kw_only=True)
class POPE:
    """Example: `POPE(subset="random").load(Path("eval_data"))` reads `eval_data/POPE`."""

    subset: Subset = "all"

    def __post_init__(self) -> None:
        if self.subset not in get_args(Subset):
            raise ValueError(
                f"POPE.subset is {self.subset!r}. It must be one of {', '.join(get_args(Subset))}."
            )

    @property
    def name(self) -> str:
        return "pope" if self.subset == "all" else f"pope_{self.subset}"

    @property
    def sets(self) -> tuple[str, ...]:
        return SETS if self.subset == "all" else (self.subset,)

    def load(self, data_dir: Path) -> list[Item]:
        root = first(data_dir, "POPE", "pope") or data_dir / "POPE"
        items: list[Item] = []
        for name in self.sets:
            found = _of_release(root, name) or _of_table(root, name) or _of_hub(root, name)
            if not found:
                raise missing(f"POPE ({name})", data_dir, *_WAYS)
            items += found
        return items

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:
        """Nothing is left for a language model."""
        del ask
        return [_mark(reply) for reply in replies]

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        values: dict[str, float | None] = {"accuracy": mean(mark.value for mark in marks)}
        parts = grouped(items, marks, "set")
        each = {name: _figures(rows) for name, rows in parts.items()}
        for figure in ("f1", "yes_ratio"):
            values[figure] = mean(figures[figure] for figures in each.values())
        values |= {f"{key}/{name}": figures[key] for name, figures in each.items() for key in figures}
        return Summary(headline="f1", values=values, unscored=unscored(marks), mean=False)


def said(reply: str) -> str:
    """`yes` or `no`: the official reading. Words are parted by spaces alone: "no\\n" is not "no"."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if _NO.intersection(words) else "yes"


def _mark(reply: Reply) -> Mark:
    answer = said(reply.text)
    note = "" if reply.text.strip() else "the reply is empty, which the official rule takes for yes"
    return Mark(value=float(answer == reply.item.answer.lower()), answer=answer, note=note)


def _figures(rows: Sequence[tuple[Item, Mark]]) -> dict[str, float | None]:
    """Of the scored rows of one set. Precision is None where nobody said yes; F1 is then 0."""
    scored = [
        (item.answer == "Yes", _positive(item, mark), mark) for item, mark in rows if mark.value is not None
    ]
    hits = sum(gold and yes for gold, yes, _ in scored)
    predicted = sum(yes for _, yes, _ in scored)
    positive = sum(gold for gold, _, _ in scored)
    return {
        "accuracy": mean(mark.value for _, _, mark in scored),
        "precision": hits / predicted if predicted else None,
        "recall": hits / positive if positive else None,
        "f1": 2 * hits / (predicted + positive) if predicted + positive else None,
        "yes_ratio": predicted / len(scored) if scored else None,
    }


def _positive(item: Item, mark: Mark) -> bool:
    """Whether the reply counts as yes: what is right says what the label says, and what is wrong the other,
    whatever was taken for its answer, and where nobody answered."""
    return (item.answer == "Yes") == (mark.value == 1)


def _of_release(root: Path, name: str) -> list[Item]:
    file = f"coco_pope_{name}.json"
    path = first(root, file, f"output/coco/{file}", f"coco/{file}", f"{file}l")
    if path is None:
        return []
    lines = open_json_lines(path)
    return [_item(lines[place], lines.position(place), name, root) for place in range(len(lines))]


def _of_table(root: Path, name: str) -> list[Item]:
    """VLMEvalKit keeps a question that several sets ask once, and names them all: `random,popular`."""
    path = first(root, "POPE.tsv")
    if path is None:
        return []
    rows = table_rows(path)
    images = images_by_index(rows)
    chosen = [row for row in rows if name in cell(row, "category").replace(" ", "").split(",")]
    found = []
    for row in chosen:
        index = str(row_index(row))
        own = {**row, "image": stored_image(shared_image(row, images)), "question_id": index}
        found.append(_item(own, f"{path.name}, index {index}", name, root, index))
    return found


def _of_hub(root: Path, name: str) -> list[Item]:
    """A table for each set, or one for all, whose rows another tool may count."""
    saved = first(root, "dataset_info.json", "dataset_dict.json", "state.json")
    apart = None if saved else hub_rows(root, name)
    rows = enumerate(apart or hub_rows(root, "test") or [])
    chosen = [(place, row) for place, row in rows if cell(row, "category") in (name, "")]
    return [
        _item(row, f"POPE {name}, row {place + 1}", name, root, None if apart else str(place))
        for place, row in chosen
    ]


def _item(row: Row, position: str, name: str, root: Path, index: str | None = None) -> Item:
    gold = (cell(row, "label") or cell(row, "answer")).strip().capitalize()
    if gold not in ("Yes", "No"):
        raise ValueError(f"{position}: the label is {gold!r}, not yes or no. Fetch POPE again.")
    image = row.get("image")
    return Item(
        id=f"{name}/{cell(row, 'question_id')}",
        question=(cell(row, "text") or cell(row, "question")).strip(),
        answer=gold,
        images=(_path(root, image) if _is_path(image) else stored_image(image),),
        root=root,
        columns={"set": name} if index is None else {"set": name, "index": index},
    )


def _is_path(image: object) -> TypeGuard[str]:
    return isinstance(image, str) and not image.startswith("data:")


def _path(root: Path, name: str) -> str:
    folder = first(root, "val2014", "images")
    return f"{folder.name}/{name}" if folder else name
