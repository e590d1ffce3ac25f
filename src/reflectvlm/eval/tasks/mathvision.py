r"""MATH-Vision (arXiv 2402.14804): 3,040 rows in `test`, 1,532 with options, 304 in `testmini`.

The answer of a reply: a letter from A to E that the reply ends with (` B.`, ` (B).`) or begins with (a line
`B` or `(B)`), or the number behind the last `is `; else what follows `the answer is` and the like up to the
end of its sentence, where there is no box; else the last box. It is cleaned of LaTeX's dressing and compared
with the gold answer and with the text of the gold option: in lower case, as tuples, and as numbers to two
decimals (`mathvision_answers.py`). The official script evaluates the reply's text with Python for
that; here sympy reads it in a process that can be killed, and nothing is evaluated.

So formulas are read by another grammar than the official one's, and the few that Python's `math` cannot
compute though sympy can (an absolute value) may count here. What is too hard to read is wrong, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reflectvlm.eval.tasks.figures import accuracies, unscored
from reflectvlm.eval.tasks.files import first, folders, hub_rows, json_rows, missing, table_rows
from reflectvlm.eval.tasks.mathvision_answers import answer_of, equality
from reflectvlm.eval.tasks.mmmu import listed
from reflectvlm.eval.tasks.settling import settled
from reflectvlm.eval.types import Ask, Item, Manner, Mark, Reply, Summary


@dataclass(frozen=True, kw_only=True)
class MathVision:
    """Example: `MathVision(split="testmini").load(Path("data"))`"""

    split: Literal["test", "testmini"] = "test"
    asked: Manner = "official"
    """`lookback` reads the table `MathVision.tsv`, whose questions hold their options."""
    timeout: float = 4.0
    """Seconds that the comparison of one answer may take; one that takes longer is wrong."""

    def __post_init__(self) -> None:
        if self.asked == "lookback" and self.split != "test":
            raise ValueError(
                f"MathVision(asked='lookback') has split={self.split!r}. "
                "Its table is the test set: leave it out."
            )

    @property
    def name(self) -> str:
        return "mathvision" if self.split == "test" else f"mathvision_{self.split}"

    def load(self, data_dir: Path) -> list[Item]:
        if self.asked == "lookback":
            return _lookback_items(data_dir)
        rows, root = _rows(data_dir, self.split)
        return [_item(row, root) for row in rows]

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:  # noqa: ARG002
        answers = [answer_of(reply.text) for reply in replies]
        golds = [_golds(reply.item) for reply in replies]
        questions = [
            equality(gold, answer) for gold2, answer in zip(golds, answers, strict=True) for gold in gold2
        ]
        found = iter(settled(questions, self.timeout))
        marks = []
        for answer, gold2 in zip(answers, golds, strict=True):
            verdicts = [next(found) for _ in gold2]
            notes = [note for _, note in verdicts if note]
            right = any(value for value, _ in verdicts)
            marks.append(
                Mark(value=float(right), answer=answer[:2000], note="" if right else "".join(notes[:1]))
            )
        return marks

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        def subject(item: Item) -> str:
            return str(item.columns["subject"])

        def level(item: Item) -> str:
            return str(item.columns["level"])

        by: dict[str, Callable[[Item], list[str]]] = {
            "subject": lambda item: [subject(item)] if subject(item) else [],
            "level": lambda item: [level(item)] if level(item) else [],
            "subject and level": lambda item: [f"{subject(item)} {level(item)}"] if level(item) else [],
        }
        return Summary(headline="accuracy", values=accuracies(items, marks, by), unscored=unscored(marks))


def _golds(item: Item) -> tuple[str, str]:
    """The gold answer, and the text of its option."""
    gold = item.columns["gold"]
    place = ord(gold) - ord("A") if len(gold) == 1 else -1
    return gold, item.choices[place] if 0 <= place < len(item.choices) else ""


def _rows(data_dir: Path, split: str) -> tuple[Sequence[Mapping[str, Any]], Path]:
    names = ("mathvision", "MathVision")
    wanted = [f"{name}/{inner}{split}.jsonl" for name in names for inner in ("", "data/")]
    if file := first(data_dir, *wanted):
        # In the official repository the images are beside the folder `data`.
        return json_rows(file), file.parent.parent if file.parent.name == "data" else file.parent
    for root in folders(data_dir, *names):
        if rows := hub_rows(root, split):
            return rows, root
    raise missing(
        "MATH-Vision",
        data_dir,
        f"the hub's MathLLMs/MathVision: mathvision/data/{split}-….parquet",
        f"github.com/mathllm/MATH-V: mathvision/data/{split}.jsonl, mathvision/images/1.jpg …",
    )


def _item(row: Mapping[str, Any], root: Path) -> Item:
    options = tuple(map(str, row.get("options") or ()))
    gold, stored = str(row["answer"]), row.get("decoded_image")
    return Item(
        id=str(row["id"]),
        question="\n".join([str(row["question"]), *_shown(options)]),
        answer=gold.strip(),
        images=(stored if stored is not None else row["image"],),
        root=root,
        choices=options,
        lookback_answer=gold if gold != gold.strip() else None,
        columns={"gold": gold, "subject": row.get("subject") or "", "level": _level(row)},
    )


def _shown(options: Sequence[str]) -> list[str]:
    """Options that are only the letters A to E stand in the picture and are not listed, as officially."""
    if not options or "".join(options) == "ABCDE":
        return []
    return ["Choices:", *(f"({chr(ord('A') + place)}) {text}" for place, text in enumerate(options))]


def _level(row: Mapping[str, Any]) -> str:
    """The hub keeps the levels as texts, some tables as 3.0."""
    value = row.get("level")
    return str(int(float(value))) if value not in (None, "") else ""


def _lookback_items(data_dir: Path) -> list[Item]:
    file = first(data_dir, "mathvision/MathVision.tsv")
    if file is None:
        raise missing(
            "MATH-Vision in Look-Back's form",
            data_dir,
            "the hub's ShuoY/Look-Back-eval, unzipped into it: mathvision/MathVision.tsv, "
            "mathvision/images/1.jpg …",
            "VLMEvalKit's MathVision.tsv as mathvision/MathVision.tsv, which holds the images",
        )
    return [_lookback_item(row, file.parent) for row in table_rows(file)]


def _lookback_item(row: Mapping[str, Any], root: Path) -> Item:
    name, encoded = str(row["index"]), row.get("image")
    path = f"images/{name}.jpg"
    within = encoded and not (root / path).exists()
    return Item(
        id=name,
        question=str(row["question"]),
        answer=str(row["answer"]).strip(),
        images=(f"data:image/jpeg;base64,{encoded}" if within else path,),
        root=root,
        choices=listed(row["choices"], name) if row.get("choices") else (),
        columns={
            "gold": str(row["answer"]),
            "subject": row.get("category") or "",
            "level": _level(row),
        },
    )
