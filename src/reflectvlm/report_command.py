"""`reflectvlm report RUN [against=RUN2] [out=FILE.html] [attention=N]`: a run as one HTML file. See
`cli_help`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectvlm.generate_options import Given
from reflectvlm.recipe_check import RecipeError

_KEYS = ("run", "against", "out", "attention")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the words after `report` say."""

    run: Path
    against: Path | None = None
    out: Path | None = None
    """None: `report.html` in the run's folder."""
    attention: int = 0
    """Answers of each run whose attention over the image is computed."""

    @classmethod
    def read(cls, words: Sequence[str]) -> Asked:
        given = Given.parsed(words, "report", _KEYS, above=(), several=("run",), bare="run")
        runs = given.all("run")
        if not runs:
            raise RecipeError("report needs the folder of a run, e.g. report runs/lookback_rl.")
        if len(runs) > 1:
            raise RecipeError(
                f"report takes one run, got {runs[0]!r} and {runs[1]!r}. Two runs beside each other: "
                "against=RUN2."
            )
        count = given.value("attention", int, 0)
        if count < 0:
            raise RecipeError(f"attention is {count}. It must be a whole number of answers, 0 or more.")
        return cls(
            run=Path(runs[0]).expanduser(),
            against=_path(given, "against"),
            out=_path(given, "out"),
            attention=count,
        )


def report(words: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    asked = Asked.read(words)
    out = asked.out or asked.run / "report.html"
    if out.is_dir() or not (out.parent.is_dir() or asked.out is None):
        raise RecipeError(f"out is {str(out)!r}. Give the name of a file in a folder that exists.")
    if out.suffix.lower() != ".html":
        raise RecipeError(
            f"out is {str(out)!r}. The report is HTML: give a name that ends in .html. A browser prints "
            "it to PDF."
        )
    from reflectvlm.report.page import page
    from reflectvlm.report.payload import payload
    from reflectvlm.report.reading import read_run
    from reflectvlm.train.table import say

    runs = [read_run(path) for path in (asked.run, asked.against) if path is not None]
    heats = []
    if asked.attention:
        from reflectvlm.report.looks import looks_of

        heats = [looks_of(run, asked.attention) for run in runs]
    made = page(payload(runs, heats)).encode()
    aside = out.with_name(f".{out.name}.tmp")
    aside.write_bytes(made)
    os.replace(aside, out)
    answers = sum(len(run.answers) for run in runs)
    say(f"{out}: {answers:,} answers, {len(made) / 1e6:.1f} MB; open it in a browser")
    return 0


def _path(given: Given, key: str) -> Path | None:
    text = given.text(key)
    return None if text is None else Path(text).expanduser()
