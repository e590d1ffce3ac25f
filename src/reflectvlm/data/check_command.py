"""`reflectvlm data check FILE`: every problem of a file of rows, by row and field, with counts.

Exit code 1 if there is a problem, else 0; with `strict=true` warnings count as well.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from reflectvlm.data.check import Checked, FileCheck
from reflectvlm.data.fetch import ImageLimits
from reflectvlm.data.findings import Finding, Tally
from reflectvlm.data.tool_words import ROWS, Words
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.table import say

JSON = "--json"
LIMITS = ("limits.max_pixels", "limits.max_aspect", "limits.max_bytes", "limits.urls", "limits.timeout")
LENGTH = ("model", "max_tokens", "instruction", "min_pixels", "max_pixels")
KEYS = (*ROWS, *LIMITS, *LENGTH, "images", "show", "out", "strict", "batch")

HELP = """\
reflectvlm data check FILE [images=true] [columns.question=problem] [--json]

  reflectvlm data check rows.jsonl images=true
  reflectvlm data check train.parquet columns.question=problem model=tiny max_tokens=1024

  All that is wrong with rows of a .jsonl, .csv, .tsv (each also .gz) or .parquet file or a folder: by row and
  field, with counts. Memory does not grow with the file. Exit code 1 if there is a problem.

  images=true          decode every image; without, paths must name files and nothing is opened
  columns.NAME=COLUMN  question, answer, images, id, messages; null for none
  show=5               rows named of each kind          out=FILE.jsonl  every finding, one a line
  model=M max_tokens=N prompts over the limit, with images=true; instruction=, min_pixels=, max_pixels=
  batch=N              told if fewer rows can be used   strict=true     warnings make the exit code 1, too
  split= subset= root= max_rows= limits.max_pixels= limits.max_bytes= limits.max_aspect= limits.urls=
"""


def run(words: list[str]) -> int:
    """Runs the command and returns its exit code."""
    read = Words.read(words, "check", KEYS, (JSON,))
    check = _check(read)
    with ExitStack() as stack:
        every: IO[str] | None = None
        if (name := read.given.text("out")) is not None:
            every = stack.enter_context(_new_file(Path(name).expanduser()))
        tally = Tally(show=read.whole("show", 5, 0) or 0, every=every)
        checked = check(read.source, tally)
    if JSON in read.flags:
        say(json.dumps(as_json(read.file, checked, tally), ensure_ascii=False))
    else:
        for line in lines(read.file, checked, tally):
            say(line)
    wrong = tally.total("problem") + tally.total("warning") * read.given.value("strict", bool, False)
    return 1 if wrong else 0


def _new_file(path: Path) -> IO[str]:
    try:
        return path.open("x", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"out={path} cannot be made ({error.strerror}). Name a new file.") from error


def _check(read: Words) -> FileCheck:
    given = read.given
    images = given.value("images", bool, False)
    limits = {name: given.value(f"limits.{name}", _LIMIT[name]) for name in given.below("limits")}
    return FileCheck(
        columns=read.columns,
        limits=ImageLimits(**limits),
        root=read.root,
        images=images,
        length=_length(read, images),
        batch=read.whole("batch", 1) or 1,
        max_rows=read.whole("max_rows", None),
    )


_LIMIT: dict[str, Any] = {
    "max_pixels": int,
    "max_aspect": float,
    "max_bytes": int,
    "urls": bool,
    "timeout": float,
}


def _length(read: Words, images: bool) -> Any:
    given = read.given
    limit = read.whole("max_tokens", None)
    named = [key for key in LENGTH if key in given]
    if not named:
        return None
    if limit is None or "model" not in given:
        raise RecipeError(f"{named[0]} counts tokens, which needs model=M and max_tokens=N together.")
    if not images and read.columns.image_names and read.columns.messages is None:
        raise RecipeError(
            "max_tokens counts visual tokens, whose number follows from an image: add images=true."
        )
    from reflectvlm.data.instructions import instruction
    from reflectvlm.data.prompt_length import PromptLength
    from reflectvlm.data.prompt_maker import PromptMaker

    name = given.text("instruction")
    maker = PromptMaker.load(
        str(given.text("model")),
        instruction=None if name is None else instruction(name),
        min_pixels=read.whole("min_pixels", None),
        max_pixels=read.whole("max_pixels", None),
    )
    return PromptLength(maker=maker, limit=limit)


# -- what is said ---------------------------------------------------------------------------------


def lines(file: str, checked: Checked, tally: Tally) -> list[str]:
    rate = checked.rows / checked.seconds if checked.seconds else 0
    problems, warnings = tally.total("problem"), tally.total("warning")
    found = [
        f"{file}: {checked.rows:,} rows, {checked.bad:,} cannot be used; {problems:,} problems, "
        f"{warnings:,} warnings ({checked.seconds:.1f} s, {rate:,.0f} rows a second)"
    ]
    for weight in ("problem", "warning"):
        for column, reason, count, first in tally.kinds(weight):
            found.append(f"{weight}: {column or 'line'}: {reason}: {count:,}")
            found += [f"  {finding.line}" for finding in first]
            if first and count > len(first) and weight == "problem":
                found.append(f"  … and {count - len(first):,} more (show=N names more, out=FILE all)")
    return found


def as_json(file: str, checked: Checked, tally: Tally) -> dict[str, Any]:
    return {
        "file": file,
        "rows": checked.rows,
        "bad_rows": checked.bad,
        "rows_without_images": checked.without_images,
        "seconds": round(checked.seconds, 3),
        "columns": checked.columns,
        "problems": tally.total("problem"),
        "warnings": tally.total("warning"),
        "kinds": [
            {
                "weight": weight,
                "field": column,
                "reason": reason,
                "count": count,
                "first": [_told(finding) for finding in first],
            }
            for weight in ("problem", "warning")
            for column, reason, count, first in tally.kinds(weight)
        ],
    }


def _told(finding: Finding) -> dict[str, str]:
    return {"position": finding.position, "detail": finding.detail}
