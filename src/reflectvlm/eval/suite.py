"""Several benchmarks put to one model, and the table that comes of them: what `reflectvlm eval` runs.

    FOLDER/predictions-TASK.jsonl   the replies, with a card of what they were made with beside them
    FOLDER/scores-TASK.json, differing-TASK.jsonl   see `result.py`
    FOLDER/table.md                 all tasks, side by side by each scorer

A recipe's `_target_` is `suite`, whose arguments are plain values; the command line fills the same. All data
are looked for before a model is loaded.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reflectvlm.answer_card import ABOUT, Card
from reflectvlm.eval.answering import Answering, PredictionFile
from reflectvlm.eval.matching import matched
from reflectvlm.eval.named import settings_of
from reflectvlm.eval.others import read_predictions
from reflectvlm.eval.result import TaskResult, score_task, write_result
from reflectvlm.eval.scorers import AUTO, NAMES, Scorer, make_scorers, place_asked_for
from reflectvlm.eval.table import notes, table_of, write_table
from reflectvlm.eval.types import Ask, Item, MissingData, Task
from reflectvlm.generate_command import Plan, carried_by
from reflectvlm.generator import GREEDY
from reflectvlm.protocols import Reattention
from reflectvlm.reattention import Implicit
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.table import say
from reflectvlm.types import Instruction, SamplingParams

log = logging.getLogger("reflectvlm")


@dataclass(frozen=True, kw_only=True, eq=False)
class Suite:
    """Example: `Suite(plan=plan, tasks={"digits": Digits()}, out=Path("evals/mine")).run()`"""

    plan: Plan
    """What answers."""
    tasks: Mapping[str, Task]
    out: Path
    data_dir: Path = Path("data")
    scorers: Sequence[str] | None = None
    """Names, in the order of the table's columns. None: all that are installed."""
    ask: Ask | None = None
    """Helps rules that need a language model."""
    answer_from: str = AUTO
    """Where the strict scorer looks, as `Strict.answer_from`; auto: where the instruction puts the answer."""
    samples: int = 1
    batch: int = 16
    limit: int | None = None
    """Only so many of each task's first items."""
    resume: Literal["auto", "never"] = "never"

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("The evaluation has no tasks. Name at least one.")
        for name, value in (("samples", self.samples), ("batch", self.batch), ("limit", self.limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}. It must be at least 1.")
        if self.samples > 1 and not self.plan.sampling.temperature:
            raise ValueError(
                f"samples is {self.samples} and temperature is 0, where all replies to an item are the same. "
                "Give temperature=1, or samples=1."
            )
        if self.resume not in ("auto", "never"):
            raise ValueError(f"resume is {self.resume!r}. It must be auto or never.")

    def run(self) -> int:
        """Answers, scores, writes and prints. The exit code: 0, or that of a stop."""
        scorers = self.made_scorers()
        items = self.load()
        files = {
            name: PredictionFile.open(self.predictions(name), self.card(name), self.resume) for name in items
        }
        generator = functools.cache(self.plan.generator)
        results = []
        for name, asked in items.items():
            code = Answering(generator, asked, files[name], self.samples, self.batch).run()
            if code:
                return code
            results.append(self.score(name, asked, scorers))
        title = f"{self.plan.path}, {len(results)} task{'s' if len(results) > 1 else ''}"
        write_table(results, title, self.about(), self.out)
        table_of(results, title).show()
        for line in notes(results):
            say(line)
        say(f"All of it is in {self.out}")
        return 0

    def made_scorers(self) -> list[Scorer]:
        place = self.answer_from
        if place == AUTO:
            place = place_asked_for(self.plan.instruction.text)
        return make_scorers(self.scorers, answer_from=place, ask=self.ask)

    def load(self) -> dict[str, Sequence[Item]]:
        """Items by task. Raises one `MissingData` for all that is missing, with a line for each."""
        found: dict[str, Sequence[Item]] = {}
        missing: dict[str, MissingData] = {}
        for name, task in self.tasks.items():
            try:
                found[name] = task.load(self.data_dir)[: self.limit]
            except MissingData as error:
                missing[name] = error
        if len(missing) == 1:
            raise next(iter(missing.values()))
        if missing:
            head = (
                f"{len(missing)} of {len(self.tasks)} benchmarks are not in {self.data_dir}. Give "
                "data_dir=…, or put them there (tasks=NAME alone tells all ways):"
            )
            raise MissingData("\n".join([head, *(f"- {name}: {one.short}" for name, one in missing.items())]))
        return found

    def predictions(self, name: str) -> Path:
        return self.out / f"predictions-{name}.jsonl"

    def card(self, name: str) -> Card:
        """What the replies to a task are made with. The batch decides nothing of it."""
        about = {key: value for key, value in self.plan.card(self.batch).items() if key != "batch"}
        settings = {f"task.{key}": value for key, value in settings_of(self.tasks[name]).items()}
        rows = {"data_dir": str(self.data_dir.absolute()), "limit": self.limit}
        return {"task": name, **settings, **about, ABOUT: rows}

    def about(self) -> Card:
        """The same for all tasks."""
        card = {key: value for key, value in self.plan.card(self.batch).items() if key != "batch"}
        return {"model": self.plan.path, **{k: v for k, v in card.items() if k != "model"}}

    def score(self, name: str, items: Sequence[Item], scorers: Sequence[Scorer]) -> TaskResult:
        predictions = read_predictions(self.predictions(name))
        result = score_task(name, self.tasks[name], matched(items, predictions), predictions.missing, scorers)
        write_result(result, self.out, {"data_dir": str(self.data_dir), "made_with": dict(self.card(name))})
        return result


def suite(
    *,
    model: str,
    tasks: Mapping[str, Task],
    name: str = "eval",
    out: str | None = None,
    data_dir: str = "data",
    reattention: Reattention | None = None,
    instruction: Instruction | None = None,
    sampling: SamplingParams = GREEDY,
    scorers: Sequence[str] = NAMES,
    ask: Ask | None = None,
    answer_from: str = AUTO,
    samples: int = 1,
    batch: int = 16,
    limit: int | None = None,
    resume: Literal["auto", "never"] = "never",
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
) -> Suite:
    """A suite from a recipe's values. What is None is what the model carries or, of `load_policy`, its
    default."""
    said = carried_by(model, trust_remote_code)
    made = {"dtype": dtype, "min_pixels": min_pixels, "max_pixels": max_pixels}
    settings: dict[str, Any] = {key: value for key, value in made.items() if value is not None}
    if trust_remote_code:
        settings["trust_remote_code"] = True
    if seed < 0:
        raise RecipeError(f"seed is {seed}. It must be 0 or more.")
    plan = Plan(
        path=model,
        reattention=reattention or said.reattention or Implicit(),
        instruction=instruction or said.instruction or Instruction(),
        sampling=sampling,
        settings={"seed": seed, "device": device, **settings},
    )
    carries = "as the model's config says"
    plan.say(
        "as the recipe says" if reattention else carries if said.reattention else "because nobody names one",
        "as the recipe says" if instruction else carries if said.instruction else "",
    )
    return Suite(
        plan=plan,
        tasks=tasks,
        out=Path(out) if out else folder_of(model, name),
        data_dir=Path(data_dir).expanduser(),
        scorers=tuple(scorers),
        ask=ask,
        answer_from=answer_from,
        samples=samples,
        batch=batch,
        limit=limit,
        resume=resume,
    )


def folder_of(model: str, name: str) -> Path:
    """Where an evaluation goes when nobody says: `runs/NAME/eval` for a run's model, else `evals/MODEL`."""
    path = Path(model).expanduser()
    if path.name == "model" and path.is_dir():
        return path.parent / name
    return Path("evals") / (path.name or "model") / ("" if name == "eval" else name)
