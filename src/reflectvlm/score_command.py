"""`reflectvlm score FILE`: replies that are there are scored again, by us, by whoever wrote them. No model is
loaded, and torch is not imported. See `cli_help`.

    score evals/mine/predictions-mathvista.jsonl data_dir=data
    score results/MathVista.xlsx task=mathvista data_dir=data against=evals/mine/predictions-mathvista.jsonl

Without a task, or where its data are not there, the gold answers in the file count, and the official rule is
"not scored".
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectvlm.eval.ask_options import ask_of
from reflectvlm.eval.compare import comparison
from reflectvlm.eval.made_with import Rows, limit_of
from reflectvlm.eval.matching import Matched, matched
from reflectvlm.eval.named import TASKS, make_task
from reflectvlm.eval.others import read_predictions
from reflectvlm.eval.predictions import Predictions, items_of
from reflectvlm.eval.result import TaskResult, score_task, write_result
from reflectvlm.eval.scorers import AUTO, Scorer, make_scorers, place_asked_for
from reflectvlm.eval.table import notes, table_of, write_table
from reflectvlm.eval.types import Item, MissingData, Task
from reflectvlm.eval_command import in_lines
from reflectvlm.generate_options import Given
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.table import say

log = logging.getLogger("reflectvlm")

KEYS = ("task", "data_dir", "scorers", "against", "answer_from", "out", "ask", "limit")


def score(words: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    if len(files) != 1:
        raise RecipeError(
            f"score needs one file of predictions, got {len(files)}. Write: reflectvlm score FILE "
            f"task=mathvista; "
            "a second one goes by against=FILE."
        )
    given = Given.parsed([word for word in words if word not in files], "score", KEYS, ("ask", *TASKS))
    first, *others = _inputs(given, read_predictions(files[0]))
    result = first.scored()
    title = f"{first.predictions.path}, {first.predictions.kind}"
    table_of([result], title).show()
    lines = notes([result])
    for other in others:
        against, name = other.scored(), str(given.text("against"))
        comparison(against, result, name, str(first.predictions.path)).show()
        lines += [f"against {name}: {line}" for line in notes([against])]
    for line in lines:
        say(line)
    if (out := given.text("out")) is not None:
        folder = Path(out).expanduser()
        about = {"file": str(first.predictions.path), "written by": first.predictions.kind}
        write_result(result, folder, {"made_with": dict(first.predictions.card), **about})
        write_table([result], title, about, folder)
        say(f"All of it is in {folder}")
    return 0


@dataclass(frozen=True)
class _Input:
    """A file whose replies are matched to items, and its scorers: nothing is left that could be wrong."""

    name: str
    task: Task | None
    predictions: Predictions
    matched: Matched
    scorers: Sequence[Scorer]

    def scored(self) -> TaskResult:
        return score_task(self.name, self.task, self.matched, self.predictions.missing, self.scorers)


def _inputs(given: Given, predictions: Predictions) -> list[_Input]:
    """The file, and that of `against`: all that the words name is read and checked before a row is scored."""
    files = [predictions]
    if (other := given.text("against")) is not None:
        files.append(read_predictions(other))
    if (out := given.text("out")) is not None and Path(out).expanduser().is_file():
        raise RecipeError(f"out={out} is a file. Name a folder: several files are written.")
    limit = limit_of(given)
    name, task, items = _task(given, files)
    made: dict[str, Sequence[Scorer]] = {}
    found = []
    for file in files:
        _check_task(name if items is not None else None, file)
        place = _place(given, file)
        if place not in made:
            made[place] = make_scorers(_names(given), answer_from=place, ask=ask_of(given))
        rows = matched(items_of(file.lines)[:limit] if items is None else items, file)
        found.append(_Input(name, task, file, rows, made[place]))
    return found


def _task(given: Given, files: Sequence[Predictions]) -> tuple[str, Task | None, Sequence[Item] | None]:
    """The benchmark that the words or the first file's card name, and its items; None where nobody knows."""
    said = given.text("task")
    named = said or files[0].card.get("task")
    if named is None or (said is None and named not in TASKS):
        if stray := next((key for key in given.values if key.partition(".")[0] in TASKS), None):
            raise RecipeError(f"{stray} is given without its task. Add task={stray.partition('.')[0]}.")
        log.info("no task is named: the gold answers in the file count. task=NAME adds the official rule")
        return files[0].path.stem, None, None
    name = str(named)
    rows = Rows.asked(given, files[0], name)
    task = make_task(name, rows.settings)
    try:
        items = task.load(rows.folder)[: rows.limit]
    except MissingData as error:
        if said is not None or "data_dir" in given:
            raise in_lines(error) from error
        log.warning(
            "%s is scored by the gold answers in the file alone; for its own rule %s", name, error.short
        )
        return name, None, None
    for other in files[1:]:
        rows.check_other(other)
    return name, task, items


def _check_task(name: str | None, predictions: Predictions) -> None:
    """Two benchmarks may count their rows alike; a card says which it was. A recipe's own names are not
    known here."""
    made = predictions.card.get("task")
    if name is not None and made in TASKS and made != name:
        raise ValueError(
            f"{predictions.path} was made with the task {made}, as its card says, not {name}. Give "
            f"task={made}, or another file."
        )


def _place(given: Given, predictions: Predictions) -> str:
    """The strict scorer looks where the replies were told to answer, as the card says."""
    place = given.text("answer_from") or AUTO
    if place == AUTO:
        place = place_asked_for(str(predictions.card.get("instruction.text") or ""))
    return place


def _names(given: Given) -> list[str] | None:
    names = given.text("scorers")
    return None if names is None else [name.strip() for name in names.split(",")]
