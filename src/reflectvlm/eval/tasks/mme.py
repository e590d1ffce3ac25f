"""MME (arXiv 2306.13394): 1,187 images with two yes-no questions each, in 14 categories.

The official rule: a reply says yes or no by its first four characters alone, else it is "other", which is
wrong. A category's score is 100 x (share of questions right + share of images with both right), at most
200; perception is the sum of ten categories, cognition of four. With `asked="lookback"` the rows of
Look-Back's own file, which name no category: accuracy alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from reflectvlm.eval.tasks.figures import mean, unscored
from reflectvlm.eval.tasks.files import first, hub_rows, missing
from reflectvlm.eval.tasks.groups import all_right, cell, grouped, stored_image
from reflectvlm.eval.types import Ask, Item, Manner, Mark, Reply, Summary

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_IMAGES = (".jpg", ".png", ".jpeg")
_WAYS = (
    "the Hub's lmms-lab/MME: MME/data/test-….parquet (or a folder that save_to_disk wrote)",
    "the authors' release, by request at github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (branch "
    "Evaluation): MME/MME_Benchmark_release_version/count/0001.jpg and 0001.txt …, a folder for each "
    "category; where it has images/ and questions_answers_YN/, they stay",
)
_LOOKBACK = "Look-Back's own rows, from its eval_data: MME/MME.json, with the images that it names beside it"


@dataclass(frozen=True, kw_only=True)
class MME:
    """Example: `MME().load(Path("eval_data"))` reads `eval_data/MME`."""

    asked: Manner = "official"

    def __post_init__(self) -> None:
        if self.asked not in get_args(Manner):
            raise ValueError(f"MME.asked is {self.asked!r}. It must be one of {', '.join(get_args(Manner))}.")

    @property
    def name(self) -> str:
        return "mme" if self.asked == "official" else "mme_lookback"

    def load(self, data_dir: Path) -> list[Item]:
        root = first(data_dir, "MME", "mme") or data_dir / "MME"
        if self.asked == "lookback":
            return _lookback(root / "MME.json", data_dir)
        if rows := hub_rows(root, "test"):
            items = _of_rows(rows)
        else:
            release = first(root, "MME_Benchmark_release_version") or root
            categories = (*PERCEPTION, *COGNITION)
            items = [item for category in categories for item in _of_folder(release, category)]
        if not items:
            raise missing("MME", data_dir, *_WAYS)
        _check_pairs(items, root)
        return items

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:
        """Nothing is left for a language model."""
        del ask
        answers = [said(reply.text) for reply in replies]
        return [
            Mark(value=float(answer == reply.item.answer.lower()), answer=answer)
            for reply, answer in zip(replies, answers, strict=True)
        ]

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        accuracy = mean(mark.value for mark in marks)
        if self.asked == "lookback":
            return Summary(headline="accuracy", values={"accuracy": accuracy}, unscored=unscored(marks))
        values: dict[str, float | None] = {"accuracy": accuracy}
        scores: dict[str, float | None] = {}
        for category, rows in grouped(items, marks, "category").items():
            right = mean(mark.value for _, mark in rows)
            pairs: dict[str, list[Mark]] = {}
            for item, mark in rows:
                pairs.setdefault(str(item.columns["image"]), []).append(mark)
            both = mean(all_right(pair) for pair in pairs.values())
            score = None if right is None or both is None else 100 * (right + both)
            values |= {
                f"score/{category}": score,
                f"accuracy/{category}": right,
                f"accuracy_plus/{category}": both,
            }
            scores[category] = score
        parts = {"perception": PERCEPTION, "cognition": COGNITION}
        for part, categories in parts.items():
            values[part] = _sum([scores[c] for c in categories if c in scores])
        values["total"] = _sum(list(scores.values()))
        return Summary(headline="total", values=values, unit="points", unscored=unscored(marks), mean=False)


def _sum(scores: Sequence[float | None]) -> float | None:
    """None without a category, or where one is not scored: fewer categories make no worse a model."""
    known = [score for score in scores if score is not None]
    return sum(known) if known and len(known) == len(scores) else None


def said(reply: str) -> str:
    """`yes`, `no` or `other`: the official reading. "Now" is no, because its first letters are."""
    start = reply.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _lookback(file: Path, data_dir: Path) -> list[Item]:
    from reflectvlm.eval.tasks.sharegpt import sharegpt_items

    if not file.is_file():
        raise missing("MME as Look-Back asks it", data_dir, _LOOKBACK)
    return sharegpt_items(file)


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> list[Item]:
    seen: Counter[str] = Counter()
    items = []
    for row in rows:
        place = cell(row, "question_id")
        seen[place] += 1
        image = stored_image(row.get("image"))
        items.append(
            _item(cell(row, "category"), place, seen[place], str(row["question"]), str(row["answer"]), image)
        )
    return items


def _of_folder(root: Path, category: str) -> list[Item]:
    folder = root / category
    questions = folder / "questions_answers_YN"
    questions = questions if questions.is_dir() else folder
    items = []
    for file in sorted(questions.glob("*.txt")):
        name = _image_of(folder, file.stem)
        place = f"{category}/{Path(name).name}"
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        for number, line in enumerate(lines, start=1):
            question, tab, answer = line.rstrip().rpartition("\t")
            if not tab:
                raise ValueError(f"{file}:{number} has no tab between question and answer. Fetch it again.")
            items.append(_item(category, place, number, question, answer, name, root))
    return items


def _image_of(folder: Path, stem: str) -> str:
    """Relative to the release. Where there is no such file, the name it should have."""
    inside = folder / "images" if (folder / "images").is_dir() else folder
    found = (inside / f"{stem}{suffix}" for suffix in _IMAGES)
    file = next((one for one in found if one.is_file()), inside / f"{stem}.jpg")
    return str(file.relative_to(folder.parent))


def _item(
    category: str, place: str, number: int, question: str, answer: str, image: object, root: Path = Path()
) -> Item:
    gold = answer.strip().rstrip(".").capitalize()
    if gold not in ("Yes", "No"):
        raise ValueError(f"MME's {place} has the answer {answer!r}, not Yes or No. Fetch the data again.")
    return Item(
        id=f"{place}/{number}",
        question=question.strip(),
        answer=gold,
        images=(image,),
        root=root,
        columns={"category": category, "image": place},
    )


def _check_pairs(items: Sequence[Item], root: Path) -> None:
    counts = Counter(str(item.columns["image"]) for item in items)
    if odd := next((place for place, count in counts.items() if count != 2), None):
        raise ValueError(
            f"MME's image {odd} in {root} has {counts[odd]} questions. Every image has two: fetch the data "
            "again."
        )
