"""A composed recipe held against the signatures it will call, before anything is built.

So that `optimizer.lrr` or `steps=abc` is one sentence with a remedy, said before a model is loaded.
Only names and plain types (int, float, bool, str) are checked here; values check themselves in the
constructors. Knows no Hydra, and imports only what the recipe names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

MISSING = "???"
"""What stands in a recipe where the user has to give a value."""

EVALUATES = "reflectvlm.eval.suite.suite"
"""The top of a recipe that evaluates a model (`eval_command.py`)."""

_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
}


class RecipeError(ValueError):
    """What a user wrote in a recipe or an override is wrong; the text is one line."""


def check_recipe(values: Mapping[str, Any]) -> None:
    """Raises RecipeError for the first value still missing, target unknown or argument wrong."""
    if values.get("_target_") is None:
        raise RecipeError(
            "The recipe has no _target_. Its top names the trainer: _target_: reflectvlm.train.rl.RLTrainer, "
            "or defaults: [_rl, …] to take it from there."
        )
    for key, value in leaves(values):
        if isinstance(value, str) and value == MISSING:
            raise RecipeError(f"{key} has no value yet. Give it with {key}=…")
    _check_node(values, "")


def check_trains(values: Mapping[str, Any]) -> None:
    """Raises RecipeError for a recipe of an evaluation, which has no trainer."""
    if values.get("_target_") == EVALUATES:
        raise RecipeError(
            "This recipe evaluates a model and trains none. Run it by `reflectvlm eval recipe=… model=PATH`; "
            "`reflectvlm recipes` lists those that train."
        )


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping and no list."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from leaves(value, _join(key, str(name)))
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from leaves(value, f"{key}[{number}]")
    else:
        yield key, node


def arguments(target: str, key: str = "") -> dict[str, inspect.Parameter]:
    """The parameters of what a `_target_` names; empty if it does not tell."""
    found = locate(target, key)
    try:
        return dict(inspect.signature(found).parameters)
    except (ValueError, TypeError):  # some built-in types have no signature
        return {}


def locate(target: str, key: str = "") -> Callable[..., Any]:
    """`"package.module.name"` -> the object."""
    where = _join(key, "_target_")
    parts = str(target).split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
                continue
            raise RecipeError(
                f"{where}: importing {module} needs {error.name}, which is not installed."
            ) from error
        for place, name in enumerate(parts[cut:], start=cut):
            if not hasattr(found, name):
                owner, near = ".".join(parts[:place]), nearest(name, dir(found))
                hint = f" Did you mean {owner}.{near}?" if near else ""
                raise RecipeError(f"{where} is {target!r}, but {owner} has no {name!r}.{hint}")
            found = getattr(found, name)
        if not callable(found):
            raise RecipeError(f"{where} is {target!r}, which cannot be called. Name a class or a function.")
        return found
    raise RecipeError(
        f"{where} is {target!r}, which cannot be imported. Write package.module.name of a class or function."
    )


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `word` most likely stands for."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def _check_node(node: Any, key: str) -> None:
    if isinstance(node, Mapping):
        if "_target_" in node:
            _check_call(node, key)
        for name, value in node.items():
            _check_node(value, _join(key, str(name)))
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            _check_node(value, f"{key}[{number}]")


def _check_call(node: Mapping[str, Any], key: str) -> None:
    target = str(node["_target_"])
    short = target.rpartition(".")[2]
    known = arguments(target, key)
    given = {name: value for name, value in node.items() if not name.startswith("_")}
    if not known or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    for name, value in given.items():
        if name not in known:
            near = nearest(name, known)
            hint = f"Did you mean {_join(key, near)!r}?" if near else f"It takes {', '.join(known)}."
            raise RecipeError(f"{_join(key, name)} is no argument of {short}. {hint}")
        _check_type(_join(key, name), value, known[name], short)
    if node.get("_partial_") or "_args_" in node:
        return
    for name, parameter in known.items():
        optional = parameter.default is not parameter.empty or parameter.kind is parameter.VAR_POSITIONAL
        if name not in given and not optional:
            full = _join(key, name)
            raise RecipeError(
                f"{full} is missing: {short} needs it. Write it into the recipe, or give +{full}=…"
            )


def _check_type(key: str, value: Any, parameter: inspect.Parameter, owner: str) -> None:
    if isinstance(value, Mapping) and "_target_" in value:
        return  # what the call returns is not known yet
    annotation = parameter.annotation
    text = getattr(annotation, "__name__", None) if isinstance(annotation, type) else str(annotation)
    wanted = {part.strip() for part in str(text).split("|")}
    if not wanted <= _PLAIN.keys():
        return
    fits = any(isinstance(value, _PLAIN[name]) for name in wanted)
    if fits and not (isinstance(value, bool) and "bool" not in wanted):
        return
    raise RecipeError(f"{key} is {value!r}, but {owner} wants {' or '.join(sorted(wanted))}.")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
