"""GeoMath, as Look-Back names it: about 820 problems of geometry, some with options, most with a number.

It very likely is Reason-RFT's "Structure Perception" test set (arXiv 2503.20752), whose rule is the official
one here: the text of the first `<answer>…</answer>`, or the whole reply without one, is right if it is the
gold answer, or if math-verify finds them equal (asked with the arguments exchanged). Accuracy over all,
and apart over problems with options (the gold answer is a letter from A to D) and without.

math-verify gets at most the last 2,000 characters of a text. Left out: the script's `enhance`, which counts
a gold answer anywhere in the reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectvlm.eval.tasks.figures import accuracies, unscored
from reflectvlm.eval.tasks.files import first, folders, hub_rows, json_rows, missing, unique
from reflectvlm.eval.tasks.settling import settled
from reflectvlm.eval.tasks.sharegpt import sharegpt_items
from reflectvlm.eval.types import Ask, Item, Manner, Mark, Reply, Summary
from reflectvlm.rewards.maths import Equal

_LONGEST = 2000
_LOOKBACK = "GeoMath/GeoMath-data.json"
_ROWS = "Structure-Perception-id-test-820.json"
_PICTURES = ("test_images", "images")


@dataclass(frozen=True, kw_only=True)
class GeoMath:
    """Example: `GeoMath().load(Path("data"))`"""

    asked: Manner = "official"
    """`official` takes Reason-RFT's rows where they are, else Look-Back's; `lookback` only the latter."""
    timeout: float = 4.0
    """Seconds that the comparison of one answer may take; one that takes longer is wrong."""

    @property
    def name(self) -> str:
        return "geomath"

    def load(self, data_dir: Path) -> list[Item]:
        if self.asked == "official" and (items := _reason_rft(data_dir)):
            return items
        if file := first(data_dir, _LOOKBACK):
            return sharegpt_items(file)
        ways = ["the hub's ShuoY/Look-Back-eval, unzipped into it: GeoMath/GeoMath-data.json and its images"]
        if self.asked == "official":
            ways.append(
                f"the hub's tanhuajie2001/Reason-RFT-CoT-Dataset: geomath/test_jsons/{_ROWS} and "
                "its images below geomath/ or geomath/test_images/"
            )
        raise missing("GeoMath", data_dir, *ways)

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:  # noqa: ARG002
        found = settled([_decided(reply) for reply in replies], self.timeout)
        return [
            Mark(value=float(right), answer=_answer(reply.text)[0][-_LONGEST:], note=note)
            for reply, (right, note) in zip(replies, found, strict=True)
        ]

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        by = {"kind": lambda item: ["choice" if _gold(item) in ("A", "B", "C", "D") else "non_choice"]}
        return Summary(headline="accuracy", values=accuracies(items, marks, by), unscored=unscored(marks))


def _gold(item: Item) -> str:
    return item.lookback_answer if item.lookback_answer is not None else item.answer


def _answer(text: str) -> tuple[str, bool]:
    """The answer, and whether it stood in a tag."""
    start = text.find("<answer>")
    end = text.find("</answer>", start) if start >= 0 else -1
    return (text[start + len("<answer>") : end].strip(), True) if end >= 0 else (text.strip(), False)


def _decided(reply: Reply) -> bool | Equal:
    """Right, wrong, or a question for math-verify."""
    answer, tagged = _answer(reply.text)
    gold = _gold(reply.item)
    if answer == (gold if tagged else gold.strip()):
        return bool(answer)
    return Equal("exchanged_equal", gold, answer[-_LONGEST:]) if answer and gold.strip() else False


def _reason_rft(data_dir: Path) -> list[Item]:
    for folder in folders(data_dir, "geomath", "GeoMath", "Reason-RFT-CoT-Dataset"):
        if file := first(folder, _ROWS, f"test_jsons/{_ROWS}"):
            return _items(json_rows(file), folder)
        if rows := hub_rows(folder, "test"):
            return _items(rows, folder)
    return []


def _items(rows: Sequence[Mapping[str, Any]], root: Path) -> list[Item]:
    names = unique([str(row.get("id", "")) for row in rows])
    return [_item(row, name, root) for row, name in zip(rows, names, strict=True)]


def _item(row: Mapping[str, Any], name: str, root: Path) -> Item:
    gold, image = str(row["solution"]), row.get("image", ())
    images = image if isinstance(image, list) else [image]
    return Item(
        id=name,
        question=str(row["problem"]),
        answer=gold.strip(),
        images=tuple(_found(one, root) for one in images),
        root=root,
        lookback_answer=gold if gold != gold.strip() else None,
    )


def _found(image: Any, root: Path) -> Any:
    """A path below `root`: the archives of images may have been unpacked in several places."""
    if not isinstance(image, str):
        return image
    return next((f"{place}/{image}" for place in _PICTURES if (root / place / image).exists()), image)
