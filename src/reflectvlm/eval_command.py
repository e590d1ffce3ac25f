"""`reflectvlm eval`: benchmarks by name, or a recipe that says which and how. See `cli_help`.

    eval model=runs/NAME/model tasks=mathvista,pope data_dir=data
    eval recipe=lookback_eval model=… tasks=mathvista sampling.max_tokens=512

With a recipe, `tasks=` chooses among its tasks and `resume=` says how to start; all else are its keys.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reflectvlm.eval.ask_options import ask_of
from reflectvlm.eval.named import TASKS, make_task, task_names
from reflectvlm.eval.types import MissingData
from reflectvlm.generate_options import COMMON, POLICY, SAMPLING, Given
from reflectvlm.recipe_check import EVALUATES, RecipeError, check_recipe, nearest

if TYPE_CHECKING:
    from reflectvlm.eval.suite import Suite

log = logging.getLogger("reflectvlm")

KEYS = (
    "tasks",
    "data_dir",
    "out",
    "resume",
    "samples",
    "batch",
    "limit",
    "scorers",
    "answer_from",
    "ask",
)


def evaluate(words: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    recipes = [word.removeprefix("recipe=") for word in words if word.startswith("recipe=")]
    if len(recipes) > 1:
        raise RecipeError(f"eval runs one recipe, got {', '.join(recipes)}.")
    others = [word for word in words if not word.startswith("recipe=")]
    made = of_recipe(recipes[0], others) if recipes else of_words(words)
    try:
        return made.run()
    except MissingData as error:
        raise in_lines(error) from error


def in_lines(error: MissingData) -> MissingData:
    """What to fetch as a line for each, and the error that they belong to."""
    head, *ways = str(error).split("\n")
    for way in ways:
        log.info("%s", way)
    return MissingData(f"{head.removesuffix(':')}, as the lines above say." if ways else head)


def of_words(words: Sequence[str]) -> Suite:
    """The suite that the words alone describe."""
    given = Given.parsed(words, "eval", (*COMMON, *POLICY, *SAMPLING, *KEYS), ("reattention", "ask", *TASKS))
    for key, example in (("model", "runs/NAME/model, tiny, or a hub name"), ("tasks", "mathvista,pope")):
        if key not in given:
            raise RecipeError(f"eval needs {key}=…: {example}. Or recipe=lookback_eval; --help explains.")
    names = task_names(str(given.text("tasks")))
    for name in TASKS:
        if name not in names and (keys := given.below(name)):
            raise RecipeError(
                f"{name}.{next(iter(keys))} is given, but tasks has no {name}. Add it, or leave it out."
            )
    tasks = {name: make_task(name, given.below(name)) for name in names}
    scorers = given.text("scorers")
    from reflectvlm.eval.suite import Suite, folder_of
    from reflectvlm.generate_command import Plan

    plan = Plan.read(given)
    out = given.text("out")
    return Suite(
        plan=plan,
        tasks=tasks,
        out=Path(out).expanduser() if out else folder_of(plan.path, "eval"),
        data_dir=Path(given.text("data_dir") or "data").expanduser(),
        scorers=None if scorers is None else [name.strip() for name in scorers.split(",")],
        ask=ask_of(given),
        answer_from=given.text("answer_from") or "auto",
        samples=given.value("samples", int, 1),
        batch=given.value("batch", int, 16),
        limit=given.value("limit", int),
        resume=given.value("resume", Literal["auto", "never"], "never"),
    )


def of_recipe(recipe: str, words: Sequence[str]) -> Suite:
    """The suite of a recipe with overrides."""
    from reflectvlm.building import instantiated
    from reflectvlm.config import compose

    own = [word for word in words if word.startswith(("tasks=", "resume="))]
    if flag := next((word for word in words if word.startswith("-") or "=" not in word), None):
        raise RecipeError(f"{flag!r} is no key=value; there are no dashes.")
    said = Given.parsed(own, "eval", ("tasks", "resume"), ())
    if (top := compose(recipe).values.get("_target_")) != EVALUATES:  # before a word about its keys
        raise RecipeError(
            f"{recipe} is no evaluation: its _target_ is {top!r}. `reflectvlm recipes` lists those that are; "
            "`train` runs the others."
        )
    values = dict(compose(recipe, [word for word in words if word not in own]).values)
    values["tasks"] = _chosen(values.get("tasks"), said.text("tasks"), recipe)
    if "resume" in said:
        values["resume"] = said.value("resume", Literal["auto", "never"])
    check_recipe(values)
    try:
        made: Suite = instantiated({"suite": values}, "")["suite"]
    except RecipeError as error:
        raise RecipeError(str(error).removeprefix("suite: ").replace("suite.", "", 1)) from error
    return made


def _chosen(tasks: Any, wanted: str | None, recipe: str) -> Mapping[str, Any]:
    """Those of a recipe's tasks that are asked for, in the recipe's order."""
    if not isinstance(tasks, Mapping) or not tasks:
        raise RecipeError(f"{recipe} has no tasks. It needs tasks: {{NAME: {{_target_: …}}}}.")
    if wanted is None:
        return tasks
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if name not in tasks:
            near = nearest(name, tasks)
            hint = f" Did you mean {near}?" if near else " Others go without a recipe: eval model=… tasks=…"
            raise RecipeError(f"{recipe} has no task {name!r}, only {', '.join(tasks)}.{hint}")
    return {name: task for name, task in tasks.items() if name in names}
