"""Benchmarks by name: `mathvista` -> `tasks.mathvista.MathVista`, imported when it is asked for.

A name is what the command line and the names of files say; a class is what a recipe names by `_target_`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from reflectvlm.eval.types import Task
from reflectvlm.generate_options import value_of
from reflectvlm.recipe_check import RecipeError, locate, nearest

TASKS: Mapping[str, str] = {
    "mathvista": "mathvista.MathVista",
    "mathverse": "mathverse.MathVerse",
    "mathvision": "mathvision.MathVision",
    "wemath": "wemath.WeMath",
    "geomath": "geomath.GeoMath",
    "hallusionbench": "hallusionbench.HallusionBench",
    "tallyqa": "tallyqa.TallyQA",
    "mme": "mme.MME",
    "mmmu": "mmmu.MMMU",
    "mmmu_pro": "mmmu_pro.MMMUPro",
    "mmbench": "mmbench.MMBench",
    "mmstar": "mmstar.MMStar",
    "chair": "chair.CHAIR",
    "pope": "pope.POPE",
    "mmhal": "mmhal.MMHalBench",
    "digits": "builtin.Digits",
    "shapes": "builtin.Shapes",
}
_PACKAGE = "reflectvlm.eval.tasks"


def task_names(text: str) -> tuple[str, ...]:
    """`"mathvista, pope"` -> both names, each once."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise RecipeError(f"tasks names none. Give one or several of {', '.join(TASKS)}.")
    for name in names:
        _check_name(name)
    if len(set(names)) < len(names):
        raise RecipeError(f"tasks is {text!r}, which names one twice. Name each once.")
    return tuple(names)


def task_class(name: str) -> type[Any]:
    _check_name(name)
    found = locate(f"{_PACKAGE}.{TASKS[name]}")
    assert isinstance(found, type)
    return found


def make_task(name: str, settings: Mapping[str, str] | None = None) -> Task:
    """The benchmark with some of its fields as words say them: `make_task("mmmu", {"split": "dev"})`."""
    kind = task_class(name)
    values = {key: _value(name, kind, key, text) for key, text in (settings or {}).items()}
    try:
        made = kind(**values)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{name}: {error}") from error
    assert isinstance(made, Task)
    return made


def settings_of(task: Task) -> dict[str, Any]:
    """Fields that are not as usual, by name, as JSON gives them back; what words cannot say is an object."""
    if not dataclasses.is_dataclass(task):
        return {}
    usual = type(task)()
    values = {field.name: getattr(task, field.name) for field in dataclasses.fields(task) if field.init}
    return {name: _plain(value) for name, value in values.items() if value != getattr(usual, name)}


def _value(name: str, kind: type[Any], key: str, text: str) -> Any:
    fields: Sequence[str] = [field.name for field in dataclasses.fields(kind) if field.init]
    if key not in fields:
        near = nearest(key, fields)
        hint = f"Did you mean {name}.{near}?" if near else f"It has {', '.join(fields) or 'none'}."
        raise RecipeError(f"{name}.{key} is no setting of {kind.__name__}. {hint}")
    return value_of(f"{name}.{key}", text, get_type_hints(kind)[key])


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, str | bool | int | float) else {"is": repr(value)}


def _check_name(name: str) -> None:
    if name in TASKS:
        return
    near = nearest(name, TASKS)
    hint = f" Did you mean {near}?" if near else ""
    raise RecipeError(f"No task is called {name!r}, only {', '.join(TASKS)}.{hint}")
