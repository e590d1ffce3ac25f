"""`reflectvlm data overlap FILE with=OTHER[,OTHER…]`: which rows evaluation sets have, too."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reflectvlm.curate.contamination import EvaluationIndex, Overlapping, Tally
from reflectvlm.curate.evaluation_sets import INDEX, PARTS, EvaluationSets, answer_of, placed
from reflectvlm.curate.hashes import image_hash
from reflectvlm.curate.overlap_report import Report, report_files, write_report
from reflectvlm.generate_options import Given
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.printing import put

if TYPE_CHECKING:
    from reflectvlm.types import Sample

HELP = """reflectvlm data overlap FILE with=OTHER[,OTHER…] [out=overlap] [key=value …]

  reflectvlm data overlap rows.jsonl with=mathvista,pope data_dir=data
  reflectvlm data overlap rows.jsonl with=test.jsonl with.question=problem out=shared

Which rows of FILE are in an evaluation set, by runs of words and by hashes of images. OTHER is a
benchmark's name (mathvista, mathverse, digits, …), whose files lie below data_dir, or a file, folder,
NAME:FOLDER of a ready reader or name on the hub. Writes out.md and out.json, rows side by side.

  data_dir=data            where benchmarks' files lie
  columns.question= .answer= .images= .id= .messages=       columns of FILE (images=null: there are none)
  with.question= .answer= .images= .id= .messages=          columns of OTHER files
  split= with.split=       of a folder or a name on the hub      root= with.root=   folder of image paths
  max_rows=                only the first rows of FILE
  n=8 share=0.5            a question is found if so much of its runs of n words is
  common=10                runs that more questions of one set have are its template, and left out
  distance=4 tint=3        bits of 64 in which near images differ; distance=null: only the same pixels
"""

_KEYS = (
    "with",
    "out",
    "data_dir",
    "max_rows",
    "split",
    "root",
    "with.split",
    "with.root",
    *INDEX,
    *(f"{of}.{part}" for of in ("columns", "with") for part in PARTS),
)


def run(words: Sequence[str]) -> int:
    """Runs the command; 0 whatever is found."""
    asked = Asked.read(words)
    settings = asked.given.fields(EvaluationIndex, INDEX)
    EvaluationIndex(held=(), **settings)  # what is wrong with them is said before an hour of hashing
    rows = placed(asked.file, asked.given, "", asked.most)
    held = asked.sets.held(lambda name, count: put(f"{name}: {count:,} evaluation rows\n"))
    index = EvaluationIndex(held=held, **settings)
    tally = Tally()
    pictures = 0
    for sample, position, why, _ in rows:
        if sample is None:
            tally.rows += 1
            tally.unread.append(why)
            continue
        hashes = tuple(image_hash(image) for image in sample.images)
        pictures += bool(hashes)
        hits = index.hits(sample.question, _more(sample), hashes)
        answer = answer_of(sample, asked.answer)
        tally.add(Overlapping(position, sample.id, sample.question, answer, tuple(hits)))
    report = Report(
        file=asked.file, index=index, tally=tally, unread=asked.sets.unread, doubts=asked.sets.doubts(held)
    )
    blind = [name for name, (_, seen) in report.sets.items() if not seen]
    report = dataclasses.replace(report, blind=(*([] if pictures else [asked.file]), *blind))
    put("".join(f"{line}\n" for line in report.lines()))
    if asked.out is not None:
        put("".join(f"written: {file}\n" for file in write_report(report, asked.out)))
    return 0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the words say."""

    file: str
    sets: EvaluationSets
    given: Given
    out: Path | None

    @classmethod
    def read(cls, words: Sequence[str]) -> Asked:
        files = [word for word in words if "=" not in word or os.path.exists(os.path.expanduser(word))]
        if len(files) != 1:
            raise RecipeError(
                f"data overlap takes one file of rows, got {len(files)}: "
                "data overlap rows.jsonl with=mathvista"
            )
        given = Given.parsed([word for word in words if word not in files], "data overlap", _KEYS, above=())
        sets = EvaluationSets(given=given, key="with")
        if not sets.names:
            raise RecipeError(
                "data overlap needs with=…: benchmarks' names or files, e.g. with=mathvista,mine.jsonl"
            )
        out = Path(os.path.expanduser(given.text("out") or "")) if "out" in given else None
        for file in report_files(out) if out is not None else ():
            if file.exists():
                raise RecipeError(f"{file} is there already. Name another out=FILE.")
            if not file.parent.is_dir():
                raise RecipeError(
                    f"out={out}: there is no folder {file.parent}. Make it, or name another out=FILE."
                )
        return cls(file=os.path.expanduser(files[0]), sets=sets, given=given, out=out)

    @property
    def answer(self) -> str:
        return self.given.text("columns.answer") or "answer"

    @property
    def most(self) -> int | None:
        most: int | None = self.given.value("max_rows", int)
        return most


def _more(sample: Sample) -> str:
    return "\n".join(value for value in sample.columns.values() if isinstance(value, str))
