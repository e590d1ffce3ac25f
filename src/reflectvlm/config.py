"""Recipes: composing them with overrides. What is built from the values is in `building.py`.

A recipe is a trainer's constructor call written down as flat YAML. This file and `building.py` are the
only ones that know Hydra; past `load_recipe` there are plain objects. Whatever a user wrote wrong is
a `RecipeError` of one line.

Left out: sweeps over several values (a shell loop does it) and Hydra's launchers and run folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reflectvlm.no_secrets import check_no_secrets
from reflectvlm.recipe_check import RecipeError, arguments, leaves, nearest
from reflectvlm.recipe_files import find_recipe, recipes_folder

if TYPE_CHECKING:
    from reflectvlm.building import Runnable

GROUPS = ("policy", "data", "compute")
"""Nodes that are chosen whole: `policy=tiny` takes recipes/policy/tiny.yaml."""

SHORT_NAMES = {
    name: f"output.{name}" for name in ("resume", "save_every", "eval_every", "root", "keep", "max_minutes")
}
"""Short names on the command line, and the keys they stand for."""

OUTPUT = "reflectvlm.train.run.Output"
STAGES = "stages"
"""The node of a recipe that holds overrides for its stages: `{qwen_la_brpo: [steps=20]}`."""
EVERY = "*"
"""Instead of a stage's name: all stages that know the key."""
_OF_STAGE = re.compile(r"([\w.-]+|\*):(.+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A recipe with its overrides, every reference resolved. Nothing is built yet."""

    recipe: str
    overrides: tuple[str, ...]
    values: dict[str, Any]
    yaml: str


def load_recipe(recipe: str, *overrides: str) -> Runnable:
    """The trainer that a recipe describes, ready to `run()` or to take apart.

    `recipe` is a name (`reflectvlm recipes` lists them) or the path of a YAML file. If the recipe
    starts from another one or takes its rows from one, that one is run first, unless what it makes is
    already there. An override for such a stage, however deep, has its recipe's name in front.

    Example: `load_recipe("lookback_rl", "steps=3", "variant=solution", "lookback_sft:steps=9").run()`
    """
    from reflectvlm.chain import build

    return build(compose(recipe, overrides))


def compose(recipe: str, overrides: Sequence[str] = ()) -> Composed:
    """The recipe's values after overrides. Raises RecipeError for anything a user wrote wrong."""
    folder, name = find_recipe(recipe)
    own, told = _split(overrides, short_name(recipe))
    own = [*taken(recipe, told.get(EVERY, ())), *own]  # what goes to every stage goes to the last one too
    long = [_long_name(override) for override in own]
    parsed = [_parse(override) for override in long]
    _check_choices(folder, parsed)
    chosen = [o for o, p in zip(long, parsed, strict=True) if _is_choice(p)]
    with _readable(recipe):
        shown = _hydra(folder, name, chosen)
        for override in parsed:
            _check_key(override, shown, recipe)
        config = _hydra(folder, name, long)
        if "output" in config and isinstance(config.output, DictConfig) and "_target_" not in config.output:
            OmegaConf.update(config, "output._target_", OUTPUT, force_add=True)
        values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    if STAGES in values or told:
        values[STAGES] = _joined(values.get(STAGES), told)
    check_no_secrets(values)  # type: ignore[arg-type]
    text = OmegaConf.to_yaml(OmegaConf.create(values))
    return Composed(recipe=recipe, overrides=tuple(overrides), values=values, yaml=text)  # type: ignore[arg-type]


def taken(recipe: str, overrides: Sequence[str]) -> list[str]:
    """Those of the overrides whose key the recipe shows or, with a '+', could be given."""
    if not overrides:
        return []
    folder, name = find_recipe(recipe)
    with _readable(recipe):
        shown = _hydra(folder, name, [])

    def takes(override: str) -> bool:
        parsed = _parse(_long_name(override))
        if parsed.is_add() and not parsed.is_force_add():
            return parsed.key_or_group in _hidden_keys(shown)
        return _has(shown, parsed.key_or_group)

    return [override for override in overrides if takes(override)]


def key_of(override: str) -> str:
    """The key of an override without what stands in front of it: `optimizer.lr` of `+optimizer.lr=1`."""
    return str(_parse(_long_name(override)).key_or_group)


def short_name(recipe: str) -> str:
    """The name by which overrides address a recipe: without folder and .yaml."""
    return Path(recipe).stem if "/" in recipe or recipe.endswith(".yaml") else recipe


def of_stage(word: str) -> tuple[str, str] | None:
    """`qwen_la_brpo:steps=9` -> (recipe, override); None for an override of the recipe itself."""
    found = _OF_STAGE.fullmatch(word)
    return (found[1], found[2]) if found else None


# -- composing ------------------------------------------------------------------------------------


@contextmanager
def _readable(recipe: str) -> Iterator[None]:
    """What reading a recipe may raise, as a RecipeError."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_yaml_problem(error, recipe)) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):  # Hydra wraps this too
            raise KeyboardInterrupt from error
        raise RecipeError(f"Recipe {recipe!r}: {_one_line(error)}") from error


def _split(overrides: Sequence[str], name: str) -> tuple[list[str], dict[str, list[str]]]:
    """The overrides of the recipe called `name`, and those of its stages by recipe."""
    own: list[str] = []
    told: dict[str, list[str]] = {}
    for word in overrides:
        found = of_stage(word)
        if found and found[0] == name:
            own.append(found[1])
        elif found:
            told.setdefault(found[0], []).append(found[1])
        else:
            own.append(word)
    return own, told


def _joined(written: Any, told: dict[str, list[str]]) -> dict[str, list[str]]:
    """What a recipe tells its stages, and what was added to it."""
    before = {} if written is None else written
    if not isinstance(before, dict) or not all(
        lines is None or isinstance(lines, list) for lines in before.values()
    ):
        raise RecipeError(f"{STAGES} is {written!r}. Write {{recipe: [key=value, …]}}.")
    names = map(str, {**before, **told})
    return {name: [*map(str, before.get(name) or ()), *told.get(name, [])] for name in names}


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
