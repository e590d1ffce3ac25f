"""From a recipe's values to its trainer: everything is built from the parts that check themselves up to
those that cost time, so that a mistake is told as early as can be. Stages are in `chain.py`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from reflectvlm import stages
from reflectvlm.config import STAGES, Composed
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.recipe_check import RecipeError, check_recipe, check_trains, locate
from reflectvlm.train.distill import Distiller
from reflectvlm.train.rl import RLTrainer
from reflectvlm.train.sft import SFTTrainer
from reflectvlm.types import Sample

Runnable: TypeAlias = RLTrainer | SFTTrainer | Distiller

SOURCES = ("data_from", "start_from")
_APART = ("_target_", "policy", *SOURCES, STAGES)
_SLOW = ("data", "evaluation", "test")  # may read files: built after all that only checks itself


def draft_of(values: Mapping[str, Any], *, slow: bool) -> Runnable:
    """The trainer with stand-ins for its policy, for rows that a stage is still to make, and, unless
    `slow`, for all that reads files."""
    check_trains(values)
    check_recipe(_without_sources(values))
    rest = sorted((key for key in values if key not in _APART), key=_SLOW.__contains__)
    unread = [key for key in _SLOW if key in values and not slow]
    parts: dict[str, Any] = dict.fromkeys(unread)
    if "data" in values and (values.get("data_from") or not slow):
        parts["data"] = Unread()
    parts |= instantiated({key: values[key] for key in rest if key not in parts}, "")
    blank = object.__new__(QwenVL)  # stands in for the policy, which no constructor looks into
    try:
        draft = locate(values["_target_"])(policy=blank, **parts)
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    if not isinstance(draft, Runnable):
        raise RecipeError(
            f"The recipe's _target_ is {values['_target_']!r}, which makes no trainer and no distiller."
        )
    return draft


def completed(draft: Runnable, values: Mapping[str, Any], record: str, composed: Composed) -> Runnable:
    """The draft with its policy, and with the rows of a stage."""
    parts: dict[str, Any] = {}
    if isinstance(draft.data, Unread):
        parts["data"] = instantiated(values["data"], "data")
    parts["policy"] = instantiated(values["policy"], "policy")
    output = dataclasses.replace(draft.output, recipe_yaml=record, overrides=composed.overrides)
    try:
        return dataclasses.replace(draft, output=output, **parts)
    except ValueError as error:  # about rows that were not there before
        raise RecipeError(str(error)) from error


def instantiated(node: Mapping[str, Any], key: str) -> Any:
    try:
        return instantiate(OmegaConf.create(dict(node)), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if not isinstance(cause, ValueError | TypeError | OSError):
            raise (cause or error) from None
        inner = re.search(r"full_key: (\S+)", str(error))
        where = ".".join(part for part in (key, inner.group(1) if inner else "") if part)
        raise RecipeError(f"{where}: {cause}" if where else str(cause)) from cause


def record(recipe: str, values: Mapping[str, Any]) -> str:
    """What the run's folder keeps: a recipe that gives the same run. `resume` says how a process was
    started, not what the run is."""
    values = dict(values)
    if isinstance(values.get("output"), dict):
        values["output"] = {key: value for key, value in values["output"].items() if key != "resume"}
    return f"# {recipe}, composed\n{OmegaConf.to_yaml(OmegaConf.create(values))}"


class Unread(Sequence[Sample]):
    """Stands in for data that is not read yet."""

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError(f"row {index} of data that was not read")


def _without_sources(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is called when it is built; rows that a stage is still to make have some path."""
    plain = {key: value for key, value in values.items() if key not in (*SOURCES, STAGES)}
    if values.get("data_from") and isinstance(values.get("data"), Mapping):
        plain["data"] = {**values["data"], "path": stages.ROWS}
    return plain
