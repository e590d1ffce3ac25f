"""The data card of a published set: what a program can say, and blanks for what only its maker knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reflectvlm.curate.types import Question

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
FILL = "TO BE FILLED IN"


@dataclass
class Lengths:
    """Fewest, mean and most characters; nothing is kept of the texts."""

    count: int = 0
    total: int = 0
    least: int = 0
    most: int = 0

    def add(self, length: int) -> None:
        self.least = length if not self.count else min(self.least, length)
        self.most = max(self.most, length)
        self.count += 1
        self.total += length

    def __str__(self) -> str:
        mean = self.total / self.count if self.count else 0
        return f"{self.least:,} | {mean:,.0f} | {self.most:,}"


@dataclass
class Card:
    """Figures of a set, gathered row by row."""

    rows: int = 0
    images: Counter[int] = field(default_factory=Counter)
    """Rows by their number of images."""
    sources: Counter[str] = field(default_factory=Counter)
    having: Counter[str] = field(default_factory=Counter)
    """Rows that have each column."""
    lengths: dict[str, Lengths] = field(default_factory=dict)
    image_bytes: int = 0
    shards: int = 0

    def add(self, row: Question, columns: Mapping[str, Any]) -> None:
        self.rows += 1
        self.images[len(row.images)] += 1
        source = columns.get("source")
        self.sources[source if isinstance(source, str) and source else "not named"] += 1
        texts = {"question": row.question, "answer": row.answer, **columns}
        for name, value in texts.items():
            self.having[name] += value is not None
            if isinstance(value, str):
                self.lengths.setdefault(name, Lengths()).add(len(value))


def card_text(
    title: str, split: str, card: Card, features: Any, kinds: Mapping[str, str], contamination: str | None
) -> str:
    """Markdown with the hub's front matter."""
    import yaml

    size = next((name for most, name in _SIZES if card.rows < most), "n>1M")
    front = {
        "configs": [{"config_name": "default", "data_files": [{"split": split, "path": f"{split}-*"}]}],
        "dataset_info": {
            "features": features._to_yaml_list(),
            "splits": [{"name": split, "num_examples": card.rows}],
        },
        "license": "unknown",
        "pretty_name": title,
        "size_categories": [size],
        "task_categories": ["visual-question-answering"],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {title}\n",
        f"{card.rows:,} rows in {card.shards} Parquet file{'s' * (card.shards != 1)}, split `{split}`. "
        'Read it with `reflectvlm.dataset("FOLDER")` or `datasets.load_dataset`.\n',
        _licence(),
        _schema(card, kinds),
        _lengths(card),
        _images(card),
        _sources(card),
        "## Overlap with evaluation sets\n\n"
        + (
            contamination
            or "Nobody looked for it. `reflectvlm data overlap` compares rows with any evaluation set."
        )
        + "\n",
    ]
    return "\n".join(parts)


def _licence() -> str:
    return (
        "## Licence and origin\n\n"
        f"- Licence of this collection: {FILL} (and `license:` above)\n"
        f"- Licence of the images and questions it was made from, by source: {FILL}\n"
        f"- Terms of the model that wrote the traces, if one did: {FILL}\n"
        f"- Who made it, when, and for what: {FILL}\n"
    )


def _schema(card: Card, kinds: Mapping[str, str]) -> str:
    told = {
        "id": "text; one of its own for each row",
        "question": "text; `<image>` stands where an image does, without it images stand first",
        "answer": "text; the gold answer",
        "images": "list of images, the files as they were",
        **{name: "JSON text" if kind == "json" else kind for name, kind in kinds.items()},
    }
    lines = [
        f"| {_cell(name)} | {what} | {card.having.get(name, card.rows):,} |" for name, what in told.items()
    ]
    return "\n".join(["## Columns\n", "| column | what | rows that have it |", "|---|---|---:|", *lines, ""])


def _lengths(card: Card) -> str:
    lines = [f"| {_cell(name)} | {found} |" for name, found in card.lengths.items()]
    return "\n".join(
        ["## Characters\n", "| column | fewest | mean | most |", "|---|---:|---:|---:|", *lines, ""]
    )


def _images(card: Card) -> str:
    lines = [f"| {count} | {rows:,} |" for count, rows in sorted(card.images.items())]
    return "\n".join(["## Images\n", "| in a row | rows |", "|---:|---:|", *lines, ""])


def _sources(card: Card) -> str:
    lines = [f"| {_cell(name)} | {rows:,} |" for name, rows in card.sources.most_common(50)]
    return "\n".join(["## Sources\n", "| source | rows |", "|---|---:|", *lines, ""])


def _cell(text: str) -> str:
    """A name on one line of a table, whatever is in it."""
    plain = "".join(c if c.isprintable() else "?" for c in text[:80])
    return plain.replace("|", "\\|").replace("<", "&lt;")
