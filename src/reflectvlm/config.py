"""Recipes: composing them with overrides, and building the trainer they describe.

A recipe is a trainer's constructor call written down as flat YAML. This file and `cli.py` are the
only ones that know Hydra; past `load_recipe` there are plain objects. Whatever a user wrote wrong is
a `RecipeError` of one line.

Left out: sweeps over several values (a shell loop does it) and Hydra's launchers and run folders.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reflectvlm import stages
from reflectvlm.recipe_check import RecipeError, arguments, check_recipe, leaves, locate, nearest
from reflectvlm.recipe_files import find_recipe, recipes_folder

if TYPE_CHECKING:
    from reflectvlm.train.rl import RLTrainer
    from reflectvlm.train.sft import SFTTrainer

log = logging.getLogger("reflectvlm")

GROUPS = ("policy", "data")
"""Nodes that are chosen whole: `policy=tiny` takes recipes/policy/tiny.yaml."""

SHORT_NAMES = {name: f"output.{name}" for name in ("resume", "save_every", "eval_every", "root", "keep")}
"""Short names on the command line, and the keys they stand for."""

_OUTPUT = "reflectvlm.train.run.Output"
_APART = ("_target_", "policy", "start_from")
_SLOW = ("data", "evaluation", "test")  # may read files: built after all that only checks itself


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A recipe with its overrides, every reference resolved. Nothing is built yet."""

    recipe: str
    overrides: tuple[str, ...]
    values: dict[str, Any]
    yaml: str


def load_recipe(recipe: str, *overrides: str) -> RLTrainer | SFTTrainer:
    """The trainer that a recipe describes, ready to `run()` or to take apart.

    `recipe` is a name (`reflectvlm recipes` lists them) or the path of a YAML file. If the recipe
    starts from another one, that one is run first, unless its model is already there.

    Example: `load_recipe("lookback_rl", "steps=3", "variant=solution").run()`
    """
    composed = compose(recipe, overrides)
    return _build(composed.values, _record(composed), composed.overrides)


def compose(recipe: str, overrides: Sequence[str] = ()) -> Composed:
    """The recipe's values after overrides. Raises RecipeError for anything a user wrote wrong."""
    folder, name = find_recipe(recipe)
    long = [_long_name(override) for override in overrides]
    parsed = [_parse(override) for override in long]
    _check_choices(folder, parsed)
    chosen = [o for o, p in zip(long, parsed, strict=True) if _is_choice(p)]
    try:
        shown = _hydra(folder, name, chosen)
        for override in parsed:
            _check_key(override, shown, recipe)
        config = _hydra(folder, name, long)
        if "output" in config and isinstance(config.output, DictConfig) and "_target_" not in config.output:
            OmegaConf.update(config, "output._target_", _OUTPUT, force_add=True)
        values = OmegaConf.to_container(config, resolve=True)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_yaml_problem(error, recipe)) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"Recipe {recipe!r}: {_one_line(error)}") from error
    assert isinstance(values, dict)
    text = OmegaConf.to_yaml(OmegaConf.create(values))
    return Composed(recipe=recipe, overrides=tuple(overrides), values=values, yaml=text)  # type: ignore[arg-type]


# -- composing ------------------------------------------------------------------------------------


def _hydra(folder: Path, name: str, overrides: Sequence[str]) -> DictConfig:
    ours = recipes_folder().absolute()
    search = [] if folder.absolute() == ours else [f"hydra.searchpath=[{_quoted(f'file://{ours}')}]"]
    with initialize_config_dir(str(folder.absolute()), version_base="1.3", job_name="reflectvlm"):
        return hydra_compose(name, overrides=[*search, *overrides])


def _quoted(text: str) -> str:
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def _long_name(override: str) -> str:
    """`resume=auto` -> `++output.resume=auto`: added where a recipe does not show it."""
    name, equals, value = override.partition("=")
    return f"++{SHORT_NAMES[name]}={value}" if equals and name in SHORT_NAMES else override


def _parse(override: str) -> Override:
    if "=" not in override and not override.startswith("~"):
        raise RecipeError(f"{override!r} is no override. Write key=value, e.g. steps=10.")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        key = override.partition("=")[0]
        raise RecipeError(
            f"Cannot read the value in {override!r}. Put a text with commas, brackets, '=', '~' or quotes "
            f"in two kinds of quotes: \"{key}='…'\"."
        ) from error
    if parsed.is_sweep_override():
        raise RecipeError(
            f"{override!r} has several values, and a run takes one. A list is written "
            f'"{parsed.key_or_group}=[a,b]", a text with a comma "{parsed.key_or_group}=\'a,b\'".'
        )
    return parsed


def _is_choice(override: Override) -> bool:
    return override.key_or_group in GROUPS and isinstance(override.value(), str)


def _check_choices(folder: Path, overrides: Sequence[Override]) -> None:
    for override in filter(_is_choice, overrides):
        group, choice = override.key_or_group, str(override.value())
        found = sorted(
            {file.stem for at in (recipes_folder(), folder) for file in (at / group).glob("*.yaml")}
        )
        if choice not in found:
            near = nearest(choice, found)
            hint = f"Did you mean {group}={near}?" if near else f"Keys of it are set with {group}.key=value."
            raise RecipeError(f"{group} has no choice {choice!r}, only {', '.join(found)}. {hint}")


def _check_key(override: Override, shown: DictConfig, recipe: str) -> None:
    """A key must be shown in the recipe, unless `+` adds it."""
    key = override.key_or_group
    exists = _has(shown, key)
    if override.is_add() and not override.is_force_add() and exists and not _is_choice(override):
        raise RecipeError(f"{key} is in recipe {recipe!r} already. Change it without the '+': {key}=…")
    if exists or override.is_add() or override.is_force_add():
        return
    raise RecipeError(_unknown_key(key, shown, recipe))


def _unknown_key(key: str, shown: DictConfig, recipe: str) -> str:
    """The sentence about a key that is not shown: whether a '+' adds it, or which one was meant."""
    hidden = _hidden_keys(shown)
    if key in hidden:
        return f"{key} is not shown in recipe {recipe!r}. Add it with a '+': +{key}=…"
    known = [*_all_keys(shown), *SHORT_NAMES, *hidden]
    last = key.rpartition(".")[2]
    near = nearest(key, known) or next((one for one in known if one.rpartition(".")[2] == last), None)
    hint = f"Did you mean {'+' if near in hidden else ''}{near}? " if near else ""
    return f"Recipe {recipe!r} has no key {key!r}. {hint}`reflectvlm show recipe={recipe}` shows all."


def _has(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, DictConfig):
        return name in node or OmegaConf.is_missing(node, name)
    return OmegaConf.select(config, key) is not None


def _all_keys(config: DictConfig) -> list[str]:
    plain = OmegaConf.to_container(config, resolve=False)
    found = {key for key, _ in leaves(plain) if "_target_" not in key}
    inner = {key[: dot.start()] for key in found for dot in re.finditer(r"\.", key)}
    return sorted(found | inner)


def _hidden_keys(config: DictConfig) -> list[str]:
    """Arguments that some node of the recipe takes and does not show."""
    found: list[str] = []
    for key in ("", *_all_keys(config)):
        node = OmegaConf.select(config, key) if key else config
        if isinstance(node, DictConfig) and "_target_" in node:
            takes = arguments(str(node["_target_"]), key)
            found += [f"{key}.{name}" if key else name for name in takes if name not in node]
    return found


def _yaml_problem(error: yaml.MarkedYAMLError, recipe: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{mark.name}:{mark.line + 1}" if mark else recipe
    return f"{where}: no valid YAML: {error.problem or error.context}. Look at that line and the one above."


def _one_line(error: Exception) -> str:
    """An error's first paragraph, without the pictures and search paths that follow."""
    if found := re.match(r"Could not override '(\w+)'. No match in the defaults list", str(error)):
        key = found.group(1)
        return f"it writes its {key} out, so none can be chosen. Change single keys: {key}.<key>=value."
    paragraph = re.split(r"\n\s*\n|\nConfig search path|\nSee https|\n\s*object_type", str(error).strip())[0]
    return re.sub(r"\s+", " ", paragraph).replace("full_key:", "at").rstrip(".") + "."


# -- building -------------------------------------------------------------------------------------


def _record(composed: Composed) -> str:
    """What the run's folder keeps: a recipe that gives the same run. `resume` says how a process was
    started, not what the run is."""
    values = {**composed.values}
    if isinstance(values.get("output"), dict):
        values["output"] = {key: value for key, value in values["output"].items() if key != "resume"}
    return f"# {composed.recipe}, composed\n{OmegaConf.to_yaml(OmegaConf.create(values))}"


def _build(values: Mapping[str, Any], record: str, overrides: Sequence[str]) -> RLTrainer | SFTTrainer:
    """Everything but the policy is built first, so that a mistake is told before a model is loaded or
    a cold start runs."""
    from reflectvlm.models.qwen_vl import QwenVL
    from reflectvlm.train.rl import RLTrainer
    from reflectvlm.train.sft import SFTTrainer

    check_recipe({key: value for key, value in values.items() if key != "start_from"})
    rest = sorted((key for key in values if key not in _APART), key=_SLOW.__contains__)
    parts = _instantiate({key: values[key] for key in rest}, "")
    blank = object.__new__(QwenVL)  # stands in for the policy, which no constructor looks into
    try:
        draft = locate(values["_target_"])(policy=blank, **parts)
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    if not isinstance(draft, RLTrainer | SFTTrainer):
        raise RecipeError(f"The recipe's _target_ is {values['_target_']!r}, which makes no trainer.")
    output = dataclasses.replace(draft.output, recipe_yaml=record, overrides=tuple(overrides))
    policy = _instantiate(_with_start(values)["policy"], "policy")
    return dataclasses.replace(draft, policy=policy, output=output)


def _instantiate(node: Mapping[str, Any], key: str) -> Any:
    try:
        return instantiate(OmegaConf.create(dict(node)), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if not isinstance(cause, ValueError | TypeError | OSError):
            raise (cause or error) from None
        inner = re.search(r"full_key: (\S+)", str(error))
        where = ".".join(part for part in (key, inner.group(1) if inner else "") if part)
        raise RecipeError(f"{where}: {cause}" if where else str(cause)) from cause


def _with_start(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without `start_from`, whose model has become the policy's path."""
    rest = {key: value for key, value in values.items() if key != "start_from"}
    start = values.get("start_from")
    if start is None:
        return rest
    if not isinstance(start, Mapping) or not {"recipe"} <= set(start) <= {"recipe", "overrides"}:
        raise RecipeError(
            f"start_from is {start!r}. Write {{recipe: name, overrides: [key=value, …]}}, or null."
        )
    return {**rest, "policy": {**rest["policy"], "path": str(_start_model(start, rest["policy"]))}}


def _start_model(start: Mapping[str, Any], policy: Mapping[str, Any]) -> Path:
    """The model of the recipe that this one starts from, found in the cache or made there."""
    recipe = str(start["recipe"])
    stage = compose(recipe, tuple(map(str, start.get("overrides") or ())))
    theirs, ours = ((node or {}).get("path") for node in (stage.values.get("policy"), policy))
    if theirs != ours:
        raise RecipeError(
            f"policy.path is {ours!r}, but start_from would replace it by what {recipe} makes of {theirs!r}. "
            f"Give start_from=null to start from {ours!r} as it is, "
            f"or \"start_from.overrides=['policy.path={ours}']\" to begin with it there."
        )
    values = _with_start(stage.values)
    folder = stages.stages_folder() / stages.stage_name(recipe, values)
    if model := stages.finished_model(folder):
        log.info("cold start %s found in %s", recipe, folder)
        return model
    log.info("cold start %s runs first, in %s; later runs find it there", recipe, folder)
    output = {**(values.get("output") or {}), "root": str(folder.parent), "resume": "auto"}
    values |= {"name": folder.name, "variant": "", "output": {"_target_": _OUTPUT, **output}}
    result = _build(values, _record(stage), stage.overrides).run()
    if not result.finished:
        raise stages.StageStopped(
            f"cold start {recipe} was stopped; the same command goes on with it", result.exit_code
        )
    return result.model
