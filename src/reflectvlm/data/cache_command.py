"""`reflectvlm data cache FILE model=M out=FOLDER`: prompts tokenised and images resized once."""

from __future__ import annotations

from reflectvlm.data.cache_build import CacheBuild
from reflectvlm.data.prompt_maker import PromptMaker
from reflectvlm.data.tool_words import ROWS, Words
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.lock import lock, unlock
from reflectvlm.train.table import say

KEYS = (*ROWS, "model", "out", "instruction", "min_pixels", "max_pixels", "shard_rows", "max_bad")

HELP = """\
reflectvlm data cache FILE model=M out=FOLDER [instruction=…] [min_pixels=… max_pixels=…]

  reflectvlm data cache rows.jsonl model=Qwen/Qwen2.5-VL-7B-Instruct out=cached
  reflectvlm data cache rows.jsonl model=tiny out=cached max_pixels=100352 shard_rows=500

  Tokenised prompts and resized images in memory-mapped files: reflectvlm.data.cached.cached("FOLDER") is a
  data source for trainers. Killed, the same words go on. Another model, limit or instruction, and rows or
  images that changed since, are refused.

  shard_rows=2000  rows of a file          max_bad=0.05  largest share of rows that may be left out
"""


def run(words: list[str]) -> int:
    """Runs the command and returns its exit code."""
    read = Words.read(words, "cache", KEYS)
    given, out = read.given, read.out()
    if "max_rows" in given:
        raise RecipeError("data cache takes the whole file: leave max_rows out.")
    model = given.text("model")
    if model is None:
        raise RecipeError("data cache needs model=…: whose tokenizer and image processor make the prompts.")
    build = CacheBuild(
        maker=_maker(read, model),
        columns=read.columns,
        root=read.root,
        shard_rows=read.whole("shard_rows", 2000) or 2000,
        max_bad=given.value("max_bad", float, 0.05),
    )
    out.mkdir(parents=True, exist_ok=True)
    busy = out / ".lock"
    try:
        lock(busy)
    except RuntimeError as error:
        raise RecipeError(str(error)) from error
    try:
        card = build(read.source, out, lambda shard, rows: say(f"shard {shard + 1}: {rows:,} rows"))
    finally:
        unlock(busy)
    left = sum(card.reasons.values())
    why = ", ".join(f"{reason} {count:,}" for reason, count in card.reasons.items())
    say(
        f"{card.rows:,} rows in {card.shards} shards of {out}"
        + (f"; {left:,} left out: {why}" if left else "")
    )
    return 0


def _maker(read: Words, model: str) -> PromptMaker:
    from reflectvlm.data.instructions import instruction

    name = read.given.text("instruction")
    return PromptMaker.load(
        model,
        instruction=None if name is None else instruction(name),
        min_pixels=read.whole("min_pixels", None),
        max_pixels=read.whole("max_pixels", None),
    )
