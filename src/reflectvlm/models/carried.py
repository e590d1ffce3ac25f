"""What a saved model says about its own use: its re-attention and its instruction, in its config.json.

    "reflectvlm": {"reattention": {"kind": "VisualRoute", "m": 50.0, …},
                   "instruction": {"text": "…", "place": "user", "system": "…"}}

Stock `from_pretrained` keeps the key and ignores it. A folder from a hub must never make code run:
a kind is looked up among three classes of this library, and every value is held against the types
of its fields. Left out: a `Reattention` of your own, which has to be given where the model is used.
"""

from __future__ import annotations

import dataclasses
import logging
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from reflectvlm.protocols import Reattention
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.types import Instruction

KEY = "reflectvlm"
KINDS: Mapping[str, type] = {kind.__name__: kind for kind in (Implicit, VisualCopy, VisualRoute)}

Plain: TypeAlias = Any
"""What JSON can write."""

log = logging.getLogger("reflectvlm")


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a model was trained with."""

    reattention: Reattention | None = None
    """None: one of the user's own, which a config cannot hold, or none was said."""
    instruction: Instruction | None = None


def carry(config: Any, reattention: Reattention | None, instruction: Instruction | None) -> None:
    """Writes both into a model's config, in place of what an earlier run wrote there."""
    values: dict[str, Plain] = {}
    if type(reattention) in KINDS.values():
        values["reattention"] = {"kind": type(reattention).__name__, **_fields(reattention)}
    elif reattention is not None:
        log.warning(
            "The saved model will not say that it uses %s: only %s can stand in a config. "
            "Give it wherever the model is used, with reattention=….",
            type(reattention).__name__,
            ", ".join(KINDS),
        )
    if instruction is not None:
        values["instruction"] = _fields(instruction)
    setattr(config, KEY, values)


def carried(config: Any) -> Carried | None:
    """What `carry` wrote into the config; None if nobody did. Raises ValueError for anything else."""
    values = getattr(config, KEY, None)
    if values is None:
        return None
    values = _mapping(values, KEY, ("reattention", "instruction"))
    reattention, instruction = values.get("reattention"), values.get("instruction")
    return Carried(
        reattention=None if reattention is None else _reattention(reattention),
        instruction=None if instruction is None else _made(Instruction, instruction, f"{KEY}.instruction"),
    )


def _reattention(values: Plain) -> Reattention:
    where = f"{KEY}.reattention"
    values = _mapping(values, where, None)
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise _wrong(f"{where}.kind", kind, f"It must be one of {', '.join(KINDS)}")
    made: Reattention = _made(KINDS[kind], {k: v for k, v in values.items() if k != "kind"}, where)
    return made


def _made(kind: type, values: Plain, where: str) -> Any:
    """An object of `kind`, from JSON."""
    hints = get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    values = _mapping(values, where, fields)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise _wrong(f"{where}.{name}", value, f"That is no value of {kind.__name__}.{name}")
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except ValueError as error:
        raise _wrong(where, values, str(error).rstrip(".")) from error


def _mapping(value: Plain, where: str, known: Sequence[str] | None) -> Mapping[str, Plain]:
    """`value`, if it is an object with no other keys than the known ones."""
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "It must be an object")
    for key in value:
        if known is not None and key not in known:
            raise _wrong(f"{where}.{key}", value[key], f"The keys here are {', '.join(known) or 'none'}")
    return value


def _wrong(where: str, value: Plain, rule: str) -> ValueError:
    shown = repr(value)
    return ValueError(
        f"config.json: {where} is {shown if len(shown) <= 80 else f'{shown[:79]}…'}. {rule}. "
        f"Correct it, or delete {KEY!r} from the model's config.json and give reattention= and instruction= "
        "at use."
    )


def _fields(value: Any) -> dict[str, Plain]:
    return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _plain(value: Any) -> Plain:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    return [_plain(item) for item in value]


def _fits(value: Plain, hint: Any) -> bool:
    """Whether a value out of JSON has the type of a field: the few kinds of type that fields have."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
