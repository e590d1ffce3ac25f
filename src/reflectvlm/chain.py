"""Building what a recipe describes, and before it the stages it is made from.

    start_from: {recipe: …, overrides: […]}    that recipe's model becomes policy.path
    data_from:  {recipe: …, overrides: […]}    that recipe's rows become data.path
    stages:     {recipe: [key=value, …]}       overrides for stages, however deep; "*": all that have the key

Stages nest. Each is kept in a folder named by what decides its result (`stages.py`) and found there the
next time. Mistakes in any of them are told before the first one runs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from reflectvlm import stages
from reflectvlm.building import SOURCES, Runnable, completed, draft_of, record
from reflectvlm.config import EVERY, OUTPUT, STAGES, Composed, compose, key_of, short_name, taken
from reflectvlm.recipe_check import MISSING, RecipeError, arguments, locate, nearest
from reflectvlm.train.distill import Distiller
from reflectvlm.train.ranks import Ranks

log = logging.getLogger("reflectvlm")

Told: TypeAlias = Mapping[str, Sequence[str]]
"""Overrides by recipe; those of EVERY go to all stages that know their key."""
Key: TypeAlias = Literal["start_from", "data_from"]

_MAKES: dict[Key, str] = {"data_from": "rows", "start_from": "a model"}
_NODES: dict[Key, str] = {"data_from": "data", "start_from": "policy"}
"""Whose `path` it is."""


def build(composed: Composed) -> Runnable:
    """The trainer of a composed recipe; its stages are run unless what they make is there.

    Everything but the policy and rows of a stage is built first, so that a mistake is told before a
    model is loaded or a stage runs.
    """
    limit = (composed.values.get("output") or {}).get("max_minutes")
    chain = Chain(told=composed.values.get(STAGES) or {}, max_minutes=limit)
    chain.check(composed)
    draft = draft_of(composed.values, slow=True)
    return completed(draft, chain.resolved(composed), record(composed.recipe, composed.values), composed)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of a recipe's stages."""

    key: Key
    recipe: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The stages of one recipe or of several, each composed and looked for once."""

    told: Told
    max_minutes: float | None = None
    """Limit of the whole command, stages included."""
    _composed: dict[tuple[str, tuple[str, ...]], Composed] = field(default_factory=dict, init=False)
    _made: dict[tuple[str, tuple[str, ...]], Path] = field(default_factory=dict, init=False)
    _read: set[tuple[str, tuple[str, ...]]] = field(default_factory=set, init=False)
    _taken: dict[str, list[str]] = field(default_factory=dict, init=False)

    def stage(self, recipe: str, overrides: Sequence[str] = ()) -> Composed:
        """A stage's recipe with its own overrides and those it was told."""
        key = (recipe, tuple(overrides))
        if key not in self._composed:
            own = [*overrides, *self._of_every(recipe), *self.told.get(short_name(recipe), ())]
            self._composed[key] = compose(recipe, own)
        return self._composed[key]

    @property
    def recipes(self) -> set[str]:
        """The recipes of all stages seen so far."""
        return {recipe for recipe, _ in self._composed}

    def _of_every(self, recipe: str) -> list[str]:
        if recipe not in self._taken:
            self._taken[recipe] = taken(recipe, self.told.get(EVERY, ()))
        return self._taken[recipe]

    def check(self, *runs: Composed, named: bool = False) -> None:
        """Raises RecipeError for the first mistake in any run or stage that can be seen without reading
        data. `named`: it says whose mistake it is, also of one in a run itself."""
        found = {short_name(run.recipe) for run in runs}
        for run in runs:
            with _named(run.recipe) if named else nullcontext():
                _check_rows_wanted(run.values)
                draft_of(run.values, slow=False)
            found |= self._check_below(run, ())
        self._check_told(found, {run.recipe for run in runs})

    def _check_told(self, found: set[str], runs: set[str]) -> None:
        """An override that reaches nobody is a misspelt one. `found`: names of runs and stages."""
        for name in self.told:
            if name not in found and name != EVERY:
                near = nearest(name, found)
                hint = f" Did you mean {near!r}?" if near else ""
                raise RecipeError(
                    f"{name}:… is told to a stage, but the stages here are {', '.join(sorted(found))}.{hint}"
                )
        for override in self.told.get(EVERY, ()):
            if not any(override in self._of_every(recipe) for recipe in self.recipes | runs):
                raise RecipeError(
                    f"No stage has a key {key_of(override)!r}, nor has a recipe that is run: "
                    f"{', '.join(sorted(found))}; "
                    "`reflectvlm show recipe=…` shows the keys of one."
                )

    def _check_below(self, run: Composed, above: tuple[Source, ...]) -> set[str]:
        found: set[str] = set()
        for source in _sources(run.values):
            if source in above:
                raise RecipeError(f"{source.recipe} is made from itself. Change its {source.key}.")
            with _named(source.recipe):
                stage = self.stage(source.recipe, source.overrides)
            _check_source(source, stage.values, run.values)
            with _named(source.recipe):
                _check_rows_wanted(stage.values)
                if STAGES in stage.values:
                    raise RecipeError(
                        f"{STAGES} has no effect in a stage. Write it into the recipe that is run."
                    )
                draft_of(stage.values, slow=False)
                found |= {short_name(source.recipe)} | self._check_below(stage, (*above, source))
        return found

    def resolved(self, run: Composed, above: tuple[Composed, ...] = ()) -> dict[str, Any]:
        """The values without sources: what they make is named where it is used. `above` are recipes that
        wait for this one."""
        values = {key: value for key, value in run.values.items() if key not in (*SOURCES, STAGES)}
        for source in _sources(run.values):
            node, made = _NODES[source.key], self.model if source.key == "start_from" else self.rows
            path = made(source.recipe, source.overrides, above)
            values[node] = {**values[node], "path": str(path)}
        return values

    def identity(self, recipe: str, overrides: Sequence[str] = ()) -> str:
        """Names what a stage makes by what it is made from, without making it: like the name of its folder
        in the cache, but a stage before it counts by its own identity, not by what came of it."""
        stage = self.stage(recipe, overrides)
        values = dict(stage.values)
        for source in _sources(values):
            node = _NODES[source.key]
            # In brackets, so that it is never a folder's name.
            made = f"<{self.identity(source.recipe, source.overrides)}>"
            values[node] = {**values[node], "path": made}
        return stages.stage_name(recipe, values)

    def model(self, recipe: str, overrides: Sequence[str] = (), above: tuple[Composed, ...] = ()) -> Path:
        """The folder of the model that a stage makes."""
        return self._product(recipe, tuple(overrides), above, stages.finished_model)

    def rows(self, recipe: str, overrides: Sequence[str] = (), above: tuple[Composed, ...] = ()) -> Path:
        """The file of the rows that a stage makes."""
        return self._product(recipe, tuple(overrides), above, stages.finished_rows)

    def _product(
        self,
        recipe: str,
        overrides: tuple[str, ...],
        above: tuple[Composed, ...],
        find: Callable[[Path], Path | None],
    ) -> Path:
        """What a stage makes, found in the cache or made there."""
        key = (recipe, overrides)
        if key not in self._made:
            stage = self.stage(*key)
            values = self.resolved(stage, (*above, stage))
            rows = Path(values["data"]["path"]) if stage.values.get("data_from") else None
            folder = stages.stages_folder() / stages.stage_name(recipe, values, rows)
            # Another job may finish it at this very moment: all processes of this one must see the same.
            if made := Ranks.joined().from_first(partial(find, folder)):
                log.info("stage %s found in %s", short_name(recipe), folder)
            else:
                self._read_data(above)
                made = _run(stage, values, folder, find, self.max_minutes)
            self._made[key] = made
        return self._made[key]

    def _read_data(self, waiting: Sequence[Composed]) -> None:
        """Reads once what the recipes that wait for a stage will read: a path that leads nowhere is told
        before the stage runs, not after it."""
        for one in waiting:
            key = (one.recipe, one.overrides)
            if key not in self._read:
                with _named(one.recipe):
                    draft_of(one.values, slow=True)
                self._read.add(key)


def _run(
    stage: Composed,
    values: Mapping[str, Any],
    folder: Path,
    find: Callable[[Path], Path | None],
    max_minutes: float | None,
) -> Path:
    """Runs a stage, or goes on with it, in its folder of the cache."""
    name = short_name(stage.recipe)
    log.info("stage %s runs first, in %s; later runs find it there", name, folder)
    # The folder's name says that this is the run begun there, whatever else has changed in the recipe.
    recorded = folder / "recipe.yaml"
    kept = recorded.read_text(encoding="utf-8") if recorded.is_file() else record(stage.recipe, values)
    output = {
        "_target_": OUTPUT,
        **(values.get("output") or {}),
        "root": str(folder.parent),
        "resume": "auto",
        **({} if max_minutes is None else {"max_minutes": max_minutes}),
    }
    values = {**values, "name": folder.name, "variant": "", "output": output}
    result = completed(draft_of(values, slow=True), values, kept, stage).run()
    if not result.finished:
        raise stages.StageStopped(
            f"stage {name} was stopped; the same command goes on with it", result.exit_code
        )
    made = find(result.folder)
    assert made is not None, f"{result.folder} is finished and not finished"
    return made


# -- what a recipe says of its stages -------------------------------------------------------------


def _sources(values: Mapping[str, Any]) -> Iterator[Source]:
    for key in _MAKES:
        node = values.get(key)
        if node is None:
            continue
        if not isinstance(node, Mapping) or not {"recipe"} <= set(node) <= {"recipe", "overrides"}:
            raise RecipeError(
                f"{key} is {node!r}. Write {{recipe: name, overrides: [key=value, …]}}, or null."
            )
        # A setting that is null is written None where it stands inside of an override.
        given = [re.sub(r"=None$", "=null", str(override)) for override in node.get("overrides") or ()]
        yield Source(key=key, recipe=str(node["recipe"]), overrides=tuple(given))


def _check_source(source: Source, stage: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    makes = "rows" if _class(stage) is Distiller else "a model"
    if makes != _MAKES[source.key]:
        raise RecipeError(
            f"{source.key} names {source.recipe}, which makes {makes}. Name a recipe that makes "
            f"{_MAKES[source.key]}."
        )
    if source.key == "start_from":
        _check_same_start(source, stage, values)


def _check_same_start(source: Source, stage: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    theirs, ours = ((one.get("policy") or {}).get("path") for one in (stage, values))
    if theirs != ours:
        raise RecipeError(
            f"policy.path is {ours!r}, but start_from would replace it by what {source.recipe} makes of "
            f"{theirs!r}. Give start_from=null to start from {ours!r} as it is, "
            f"or {short_name(source.recipe)}:policy.path={ours} to begin with it there."
        )


def _check_rows_wanted(values: Mapping[str, Any]) -> None:
    """The rows of a stage need a reader that has no file of its own."""
    if values.get("data_from") is None:
        return
    data = values.get("data") or {}
    target = str(data.get("_target_"))
    if "path" not in arguments(target, "data"):
        raise RecipeError(
            f"data_from gives data.path, but data is {target.rpartition('.')[2]}, which reads no file. "
            "Choose data=rows, or give data_from=null."
        )
    if data.get("path") not in (None, MISSING):
        raise RecipeError(
            f"data.path is {data['path']!r}, but data_from would replace it by the rows of another recipe. "
            "Give data_from=null to take your own."
        )


def _class(values: Mapping[str, Any]) -> Any:
    target = values.get("_target_")
    return None if target is None else locate(str(target))


@contextmanager
def _named(recipe: str) -> Iterator[None]:
    """Whose mistake it is, and how to give a stage a value."""
    try:
        yield
    except RecipeError as error:
        name = short_name(recipe)
        if isinstance(error, StageError):  # deeper, and named there
            raise
        raise StageError(f"stage {name}: {error} A stage is given a value by {name}:key=….") from error


class StageError(RecipeError):
    """A mistake in a stage's recipe; the text names the stage."""
