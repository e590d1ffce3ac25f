"""The words that `data coldstart` and `data distill` share: the source, the method, the folder, the price."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reflectvlm.curate.calls import Prices
from reflectvlm.curate.evaluation_sets import INDEX, PARTS
from reflectvlm.curate.splice import METHODS, Method
from reflectvlm.curate.stages import rows_digest
from reflectvlm.curate.types import Question
from reflectvlm.data.digits import Digits
from reflectvlm.data.rows import Columns
from reflectvlm.generate_options import Given
from reflectvlm.recipe_check import RecipeError, nearest

COLUMNS = ("columns.question", "columns.answer", "columns.images", "columns.id", "columns.messages")
KEYS = (
    "source",
    "root",
    "max_rows",
    "max_bad",
    *COLUMNS,
    "model",
    "teacher",
    "judges",
    "votes",
    "out",
    "cache",
    "method",
    "instruction",
    "temperature",
    "max_tokens",
    "seed",
    "price",
    "estimate",
    "rows_at_once",
    "without",
    "data_dir",
    *(f"without.{part}" for part in (*PARTS, "split", "root", *INDEX)),
)
DIGITS_ROWS = 400
"""Pages of source=digits, unless max_rows says otherwise."""
DIGITS_SEED = 11
"""Pages are those of the recipes' cold starts: `seed: [11, seed]`."""


def questions_of(given: Given) -> list[Question]:
    """The source's rows, their images unread; of source=digits pages made now."""
    source = given.text("source")
    if source is None:
        raise RecipeError(
            f"{_needs('source')}: a file or folder of rows, NAME:FOLDER of a known data set, or digits."
        )
    count = given.value("max_rows", int)
    if count is not None and count < 1:
        raise RecipeError(f"max_rows is {count}. It must be at least 1.")
    if source == "digits":
        if read := [key for key in (*COLUMNS, "root", "max_bad") if key in given]:
            raise RecipeError(f"{read[0]} is given, but source=digits is no file that is read. Leave it out.")
        return digit_questions(count or DIGITS_ROWS, seed_of(given))
    from reflectvlm.data.readers import questions

    columns: dict[str, Any] = dict(given.below("columns"))
    rows = questions(
        os.path.expanduser(source),
        columns=Columns(**columns),
        name=source_name(source),
        root=given.text("root"),
        max_rows=count,
        max_bad=given.value("max_bad", float, 0.05),
    )
    return list(rows)


def source_name(source: str) -> str:
    """Of a ready reader its own, `geometry3k` of `geometry3k:FOLDER:test`; else the file's or folder's."""
    from reflectvlm.data.readers import NAMES

    reader, colon, _ = source.partition(":")
    return reader if colon and reader in NAMES else Path(source).name


def digit_questions(count: int, seed: int) -> list[Question]:
    """Pages of digits as questions; their columns say what stands on them."""
    pages = Digits(split="train", size=count, seed=[DIGITS_SEED, seed])
    return [
        Question(
            id=page.id,
            question=page.question,
            answer=page.answer,
            images=tuple(_png(image) for image in page.images),
            source="digits",
            columns=page.columns,
        )
        for page in pages
    ]


def source_digest(questions: Sequence[Question], column: str | None = None) -> str:
    """A name for the rows, for the folder's card, with the column that answers come from. Of images that lie
    elsewhere the names count."""

    def parts() -> Iterator[tuple[Any, ...]]:
        for one in questions:
            own = () if column is None else (repr(one.columns.get(column)),)
            yield (one.id, one.question, one.answer, *own, *(_named(image) for image in one.images))

    return rows_digest(parts())


def instruction_text(name: str) -> str:
    """The text of an instruction's name, a .txt file, or none."""
    from reflectvlm.data.instructions import instruction

    return "" if name.lower() in ("none", "null") else instruction(name).text


def seed_of(given: Given) -> int:
    seed = given.value("seed", int, 0)
    if seed < 0:
        raise RecipeError(f"seed is {seed}. It must be 0 or more.")
    return int(seed)


def out_of(given: Given) -> Path:
    out = given.text("out")
    if out is None:
        raise RecipeError(f"{_needs('out')}: the folder for the rows, their images and the report.")
    return Path(os.path.expanduser(out))


def method_of(given: Given, default: Method | None = None) -> Method:
    method = given.text("method") or default
    if method is None:
        raise RecipeError(f"{_needs('method')}: {', '.join(METHODS)}.")
    for known in METHODS:
        if method == known:
            return known
    near = nearest(method, METHODS)
    raise RecipeError(
        f"method is {method!r}. It must be {', '.join(METHODS)}." + (f" Did you mean {near}?" if near else "")
    )


def rows_of(given: Given) -> int:
    rows = int(given.value("rows_at_once", int, 64))
    if rows < 1:
        raise RecipeError(f"rows_at_once is {rows}. It must be at least 1.")
    return rows


def cache_of(given: Given) -> Path:
    cache = given.text("cache")
    return Path(os.path.expanduser(cache)) if cache else out_of(given) / "replies"


def prices_of(given: Given) -> Prices:
    """`price=2.5:10`: money per million tokens asked and said."""
    text = given.text("price")
    if text is None:
        return Prices()
    low, _, high = text.partition(":")
    try:
        return Prices(prompt=float(low), reply=float(high))
    except ValueError as error:
        raise RecipeError(
            f"price is {text!r}. It is money per million tokens asked and said: price=2.5:10."
        ) from error


def _named(image: Any) -> Any:
    if isinstance(image, Mapping):
        return image.get("bytes") or image.get("path") or ""
    return bytes(image) if isinstance(image, bytearray | memoryview) else image


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _needs(key: str) -> str:
    return f"The command needs {key}="
