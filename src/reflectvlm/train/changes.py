"""What differs between the recipe of a run and the one that takes it up again, and what of it may.

A checkpoint belongs to its model, its rows and the order they come in; those stay. What a step merely
reads anew each time may be turned while a run goes on: rates, lengths, weights, how long it lasts. Such a
change is told and kept (`recipe.1.yaml` is the earlier recipe), and from there on it is another run than
the one that was never changed. `output` changes no result and is not compared.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from reflectvlm.train.table import Table

MayChange: TypeAlias = Callable[[str], bool]
"""Whether a run may go on with another value of this key."""

_MAY_CHANGE = re.compile(
    r"""steps | optimizer\.(?!_target_|bits).+ | micro_tokens | engine\.(max_rows|decode)
    | sampling\.(?!_target_).+
    | group_size | prompts_per_step | rows_per_step | updates_per_step | epochs_per_step
    | max_prompt_tokens | max_tokens | row_rules\..+ | drop_truncated | keep_equal_groups
    | dynamic_sampling\.(?!_target_).+ | advantage\.(?!_target_).+ | objective\.(?!kl|_target_).+
    | rubric\.(weights\..+ | max_failures | max_failed_share)
    | on_nonfinite | max_nonfinite | evaluation(\..+)? | tag
    | workers | prefetch | overlap_rewards | partial\.(?!_target_).+ | engine\.long_tail(\..+)?
    | compute(\..+)? | policy\.(feature_cache(\..+)?|prefix_attention)""",
    re.VERBOSE,
)


def settings(trainer: Any) -> str:
    """A trainer's own settings in the form of a recipe, for runs that have none: what can be written down
    of its fields. Model and rows, which are told by their content, and evaluations are left out."""
    import yaml

    lines = {
        name: _plain(getattr(trainer, name))
        for name in (field.name for field in dataclasses.fields(trainer) if field.init)
        if name not in ("policy", "data", "output", "evaluation", "test", "engine")
    }
    head = "# settings of a trainer that was made in Python; this is no recipe that can be run\n"
    return head + yaml.safe_dump(lines, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Numbers, texts and nests of them; objects by their fields, functions and all else by name."""
    if value is None or isinstance(value, bool):
        return value
    # YAML takes no kinds of these, such as numpy's float64 or an enum's text.
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    kind = getattr(value, "__qualname__", type(value).__qualname__)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return kind
    shown = [field.name for field in dataclasses.fields(value) if field.init and field.repr]
    return {"_target_": kind} | {name: _plain(getattr(value, name)) for name in shown}


class Change(NamedTuple):
    """One setting that differs."""

    key: str
    old: str
    new: str
    allowed: bool


def of_a_trainer(key: str) -> bool:
    """What may change between two parts of one training run."""
    return _MAY_CHANGE.fullmatch(key) is not None


def nothing(key: str) -> bool:  # noqa: ARG001
    """For runs that are only right as a whole."""
    return False


def changes(recorded: Path, recipe: str | None, may_change: MayChange = nothing) -> list[Change]:
    """Every setting outside of `output` that differs, the refused ones first. Nothing is compared where
    one of the two has no recipe."""
    if recipe is None or not recorded.is_file():
        return []
    old, new = _settings(recorded.read_text(encoding="utf-8")), _settings(recipe)
    absent = "(not given)"
    found = [
        Change(key, old.get(key, absent), new.get(key, absent), may_change(key))
        for key in dict.fromkeys([*old, *new])
        if old.get(key, absent) != new.get(key, absent)
    ]
    return sorted(found, key=lambda change: (change.allowed, change.key))


def check(
    recorded: Path, recipe: str | None, may_change: MayChange, *, finished: bool = False
) -> list[Change]:
    """The changes, if a run may go on with all of them; else a ValueError that names those it may not. A
    finished run goes on only if it is given more steps."""
    found = changes(recorded, recipe, may_change)
    if finished and found and not _longer(found):
        raise ValueError(
            f"{recorded.parent} is finished, and was started with another recipe: {_line(found)}. "
            "Give it more steps to go on with it, or start anew with resume=never."
        )
    if refused := [change for change in found if not change.allowed]:
        also = len(found) - len(refused)
        rest = f" ({also} other change{'s' * (also > 1)} would be allowed)" if also else ""
        raise ValueError(
            f"{recorded.parent} is {'' if finished else 'un'}finished and was started with another recipe: "
            f"{_line(refused)}{rest}. "
            "Go on with the old values, start anew with resume=never, or delete that folder."
        )
    return found


def _longer(found: Sequence[Change]) -> bool:
    steps = [(one.old, one.new) for one in found if one.key == "steps"]
    return any(old.isdigit() and new.isdigit() and int(new) > int(old) for old, new in steps)


def table(found: Sequence[Change], run: Path) -> Table:
    made = Table(f"{run} goes on with other settings", ("setting", "before", "now"))
    for change in found:
        made.add(change.key, _cut(change.old), _cut(change.new))
    return made


def _line(found: Sequence[Change]) -> str:
    shown = ", ".join(f"{one.key} {_cut(one.old)} → {_cut(one.new)}" for one in found[:8])
    return f"{shown} and {len(found) - 8} more" if len(found) > 8 else shown


def _settings(text: str) -> dict[str, str]:
    """Dotted key -> value as text, so that a NaN equals itself."""
    import yaml

    values = yaml.safe_load(text)
    if isinstance(values, Mapping):
        values = {key: value for key, value in values.items() if key != "output"}
    return dict(_flat(values, ""))


def _flat(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, repr(node)


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
