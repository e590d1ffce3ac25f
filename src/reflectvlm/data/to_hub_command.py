"""`reflectvlm data to-hub FILE out=FOLDER`: Parquet with the images inside, and a data card. No upload."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from reflectvlm.curate.types import Question
from reflectvlm.data.findings import Tally
from reflectvlm.data.readers.asked import questions
from reflectvlm.data.to_hub import Published
from reflectvlm.data.tool_words import ROWS, Words
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.table import say

KEYS = (*ROWS, "out", "title", "name", "as", "shard_mb", "max_bad", "contamination")

HELP = """\
reflectvlm data to-hub FILE out=FOLDER [title="My traces"] [columns.question=problem]

  reflectvlm data to-hub cold/rows.jsonl out=hub title="My traces"
  reflectvlm data to-hub cold/rows.jsonl out=hub contamination=overlap.json as=validation

  A folder that the hub takes and dataset("FOLDER") reads: Parquet files with the images inside, and README.md
  with columns, counts, lengths and sources; licence and origin are left for you to fill in.

  as=train         name of the split               shard_mb=500   size of a file
  name=SOURCE      what the rows' column `source` says
  contamination=FILE  a report of `data overlap`, put into the card
  max_bad=0.05     largest share of rows that may be left out
"""


def run(words: list[str]) -> int:
    """Runs the command and returns its exit code."""
    read = Words.read(words, "to-hub", KEYS)
    source, columns, root = read.source, read.columns, read.root
    max_bad, max_rows = read.given.value("max_bad", float, 0.05), read.whole("max_rows", None)
    name = read.given.text("name") or ""

    def rows() -> Iterator[Question]:
        return questions(
            source, columns=columns, root=root, name=name, max_bad=max_bad, max_rows=max_rows, tally=Tally()
        )

    published = Published(
        title=read.given.text("title") or Path(read.file).name.split(".")[0],
        split=read.given.text("as") or "train",
        shard_mb=read.whole("shard_mb", 500) or 500,
        contamination=_note(read.given.text("contamination")),
    )
    out = read.out()
    card = published(rows, out)
    say(f"{card.rows:,} rows in {card.shards} files of {out}; fill in the licence in {out / 'README.md'}")
    return 0


def _note(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"contamination={path} cannot be read ({type(error).__name__}).") from error
