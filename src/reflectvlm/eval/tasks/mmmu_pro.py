"""MMMU-Pro (arXiv 2409.02813): 1,730 of MMMU's questions with ten options, with four, and as a screenshot.

Replies are read by the authors' second rule (`mmmu_answers.choice_pro`). The overall figure is the mean of
the accuracies with ten options and of screenshots; four options count only by themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from reflectvlm.eval.tasks.figures import accuracies, mean, unscored
from reflectvlm.eval.tasks.files import first, hub_rows, missing
from reflectvlm.eval.tasks.groups import cell, grouped, of, stored_image
from reflectvlm.eval.tasks.mmmu import DOMAIN_OF, letter_mark, listed, mmmu_item
from reflectvlm.eval.tasks.mmmu_answers import choice_pro
from reflectvlm.eval.types import Ask, Item, Mark, Reply, Summary

Setting = Literal["overall", "standard10", "standard4", "vision"]
FOLDERS = {
    "standard10": "standard (10 options)",
    "standard4": "standard (4 options)",
    "vision": "vision",
}
_SCREENSHOT = "The image holds a question and its options. Which option is right?"


@dataclass(frozen=True, kw_only=True)
class MMMUPro:
    """Example: `MMMUPro(setting="vision").load(Path("eval_data"))` reads `eval_data/MMMU_Pro/vision`."""

    setting: Setting = "overall"

    def __post_init__(self) -> None:
        if self.setting not in get_args(Setting):
            raise ValueError(
                f"MMMUPro.setting is {self.setting!r}. It must be one of {', '.join(get_args(Setting))}."
            )

    @property
    def name(self) -> str:
        return "mmmu_pro" if self.setting == "overall" else f"mmmu_pro_{self.setting}"

    @property
    def settings(self) -> tuple[str, ...]:
        return ("standard10", "vision") if self.setting == "overall" else (self.setting,)

    def load(self, data_dir: Path) -> list[Item]:
        root = first(data_dir, "MMMU_Pro", "mmmu_pro") or data_dir / "MMMU_Pro"
        items = []
        for setting in self.settings:
            folder = root / FOLDERS[setting]
            rows = hub_rows(folder, "test")
            if not rows:
                where = f"MMMU_Pro/{FOLDERS[setting]}"
                raise missing(
                    f"MMMU-Pro ({setting})",
                    data_dir,
                    f"the Hub's MMMU/MMMU_Pro: {where}/test-….parquet (or a folder that save_to_disk wrote)",
                )
            items += [_item(row, setting) for row in rows]
        return items

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:
        """Nothing is left for a language model."""
        del ask
        found = [choice_pro(reply.text, reply.item.choices, reply.item.id) for reply in replies]
        return [letter_mark(reply.item, *one) for reply, one in zip(replies, found, strict=True)]

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        values = accuracies(items, marks, {name: of(name) for name in ("domain", "subject")})
        parts = grouped(items, marks, "setting")
        each = {setting: mean(mark.value for _, mark in rows) for setting, rows in parts.items()}
        values |= {f"accuracy/{setting}": value for setting, value in each.items()}
        # Not the mean over rows: the same here, but not where rows of one of the two are not scored.
        values["accuracy"] = mean(each.values()) if None not in each.values() else None
        return Summary(headline="accuracy", values=values, unscored=unscored(marks), mean=False)


def _item(row: Mapping[str, Any], setting: str) -> Item:
    if setting != "vision":
        item = mmmu_item(row)
        columns = {**item.columns, "setting": setting}
        return dataclasses.replace(item, id=f"{setting}/{item.id}", columns=columns)
    name, subject = cell(row, "id"), cell(row, "subject")
    return Item(
        id=f"{setting}/{name}",
        question=_SCREENSHOT,
        answer=cell(row, "answer"),
        images=(stored_image(row.get("image")),),
        choices=listed(row["options"], name),
        columns={"subject": subject, "domain": DOMAIN_OF.get(subject, ""), "setting": setting},
    )
