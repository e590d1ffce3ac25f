"""The words after `reflectvlm generate`: `key=value`, each held against the field it will fill.

A recipe's grammar (`config.py`) would make a user quote every question twice; here a value is the text
behind the first '='. Only what the words say is checked; images, rows and models check themselves.

Quotes around a whole value are not part of it: `reattention.trigger='<back>'`. `stop` is a list, with commas
between its texts and quotes around those that hold one: `stop=A,B` is two texts, `stop="'A, B',C"` too.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from reflectvlm.recipe_check import RecipeError, nearest

if TYPE_CHECKING:
    from reflectvlm.protocols import Reattention
    from reflectvlm.types import Instruction, SamplingParams

COMMON = ("model", "reattention", "instruction", "instruction.place", "seed", "device")
POLICY = ("dtype", "min_pixels", "max_pixels", "trust_remote_code")
SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop")
ONE = ("image", "question")
FILE = ("data", "out", "resume", "batch", "split", "root", "max_rows", "max_bad")
COLUMNS = ("columns.question", "columns.images", "columns.id", "columns.messages")
GENERATE = (*COMMON, *POLICY, *SAMPLING, *ONE, *FILE, *COLUMNS)
SEVERAL = ("image", "stop", "columns.images")
"""Keys that may be given more than once."""
KINDS = {"implicit": "Implicit", "copy": "VisualCopy", "route": "VisualRoute"}
"""What `reattention=` says, and the classes of `reattention.py`."""

_NULL = ("null", "none")
_LISTED = re.compile(r"""\s*(?:'([^']+)'|"([^"]+)"|([^,'"\s](?:[^,]*[^,\s])?))\s*(,|\Z)""")
"""One text of a list, in quotes of one kind or without, and the comma behind it."""


@dataclass(frozen=True)
class Given:
    """The values by key, in the order of the words; every key is known."""

    values: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, words: Sequence[str]) -> Given:
        given = cls.parsed(words, "generate", GENERATE)
        _check_together(given)
        return given

    @classmethod
    def parsed(
        cls,
        words: Sequence[str],
        command: str,
        known: Sequence[str],
        above: Sequence[str] = ("reattention",),
        several: Sequence[str] = (),
        bare: str | None = None,
    ) -> Given:
        """The words of any command that has some of these keys. `above` are names with settings of their own
        below them, as reattention.m; `several` are further keys that may be given more than once; `bare` is
        the key of a path that needs none: a word without '=', or the name of what exists."""
        values: dict[str, tuple[str, ...]] = {}
        for word in words:
            if word.startswith("-"):
                without = word.lstrip("-")
                hint = f" Write {without}." if "=" in without else ""
                raise RecipeError(f"{word!r} is no key=value; there are no dashes.{hint}")
            key, equals, value = word.partition("=")
            if bare is not None and (not equals or os.path.lexists(word)):
                key, equals, value = bare, "=", word
            if not equals:
                raise RecipeError(f'{word!r} is no key=value; quote what has spaces: question="…".')
            _check_key(key, command, known, above)
            if key in values and key not in (*SEVERAL, *several):
                raise RecipeError(f"{key} is given twice: {values[key][0]!r} and {value!r}. Give it once.")
            values[key] = (*values.get(key, ()), *_texts(key, value))
        return cls(values)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def text(self, key: str) -> str | None:
        return self.values[key][0] if key in self.values else None

    def all(self, key: str) -> tuple[str, ...]:
        return self.values.get(key, ())

    def value(self, key: str, hint: Any, default: Any = None) -> Any:
        """The value as one of a field's type."""
        return value_of(key, self.values[key][0], hint) if key in self.values else default

    def fields(self, kind: Any, names: Sequence[str]) -> dict[str, Any]:
        """Those of the named parameters of a class or function that are given."""
        hints = get_type_hints(kind)
        return {name: value_of(name, self.values[name][0], hints[name]) for name in names if name in self}

    def below(self, key: str) -> dict[str, str]:
        """`reattention.m=25` for the key reattention: m -> 25."""
        names = [name for name in self.values if name.startswith(f"{key}.")]
        return {name.removeprefix(f"{key}."): self.values[name][0] for name in names}


def sampling_of(given: Given) -> SamplingParams:
    """Greedy, unless the words say otherwise."""
    from reflectvlm.generator import GREEDY
    from reflectvlm.types import SamplingParams

    numbers = given.fields(SamplingParams, [name for name in SAMPLING if name != "stop"])
    return dataclasses.replace(GREEDY, **numbers, stop=given.all("stop"))


def instruction_of(given: Given, carried: Instruction | None) -> tuple[Instruction, str]:
    """What is asked beside the question, and who says so."""
    from reflectvlm.data.instructions import instruction
    from reflectvlm.types import Instruction

    name = given.text("instruction")
    if name is None:
        chosen, whence = (carried, "as the model's config says") if carried else (Instruction(), "")
    else:
        chosen = Instruction() if name.lower() in _NULL else instruction(name)
        whence = "as given"
    if (place := given.text("instruction.place")) is not None:
        where = value_of("instruction.place", place, Literal["user", "system"])
        chosen = dataclasses.replace(chosen, place=where)
    return chosen, whence


def reattention_of(given: Given, carried: Reattention | None) -> tuple[Reattention, str]:
    """How the model looks again, and who says so: the words, the model's config, or nobody."""
    from reflectvlm import reattention

    name, settings = given.text("reattention"), given.below("reattention")
    made: Any
    if name is not None:
        made, whence = getattr(reattention, KINDS[_kind(name)])(), "as given"
    elif carried is not None:
        made, whence = carried, "as the model's config says"
    else:
        made, whence = reattention.Implicit(), "because the model's config names none"
    if not settings:
        return made, whence
    values = {name: _setting(name, text, made, whence) for name, text in settings.items()}
    if name is None:
        whence += f", with {', '.join(settings)} as given"
    return dataclasses.replace(made, **values), whence


def value_of(key: str, text: str, hint: Any) -> Any:
    """A value's text as one of a type: the few kinds of type that fields have."""
    kinds = _alternatives(hint)
    if types.NoneType in kinds and text.lower() in _NULL:
        return None
    for kind in kinds:
        try:
            return _parsed(text, kind)
        except ValueError:
            continue
    raise RecipeError(f"{key} is {text!r}. It must be {' or '.join(map(_said, kinds))}.")


def described(value: Any) -> str:
    """An object with those of its settings that are not the usual ones: `VisualRoute(m=25)`."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    shown = [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(shown)})"


# -- checks ---------------------------------------------------------------------------------------


def _check_key(key: str, command: str, known: Sequence[str], above: Sequence[str]) -> None:
    owner, dot, name = key.partition(".")
    if key in known or (dot and owner in above and name):
        return
    settings = [f"reattention.{name}" for name in ("m", "trigger", "limit", "images")]
    near = nearest(key, (*known, *(settings if "reattention" in above else ())))
    below = " and ".join(f"{name}.FIELD" for name in above)
    hint = (
        f"Did you mean {near}?" if near else f"It knows {', '.join(known)}{f' and {below}' if below else ''}."
    )
    raise RecipeError(f"{command} has no key {key!r}. {hint}")


def _check_together(given: Given) -> None:
    if "model" not in given:
        raise RecipeError("generate needs model=PATH: tiny, a folder or a hub name.")
    if "data" not in given and "question" not in given and "image" not in given:
        raise RecipeError('generate needs question="…" and image=FILE, or data=ROWS out=ANSWERS.')
    if "data" not in given and "image" not in given and not str(given.text("question")).strip():
        raise RecipeError('question is empty, and there is no image. Give question="…", image=FILE or both.')
    single, several = ([key for key in keys if key in given] for keys in (ONE, (*FILE, *COLUMNS)))
    if "data" in given and single:
        raise RecipeError(f"{single[0]} and data are both given. Ask one question, or a file of them.")
    if "data" not in given and several:
        raise RecipeError(f"{several[0]} belongs to a file of rows. Add data=ROWS, or leave it out.")
    if "data" in given and "out" not in given:
        raise RecipeError("data needs out=FILE: where the answers go, one JSON object per line.")


def _kind(name: str) -> str:
    if name not in KINDS:
        near = nearest(name, KINDS)
        hint = f" Did you mean {near}?" if near else ""
        raise RecipeError(f"reattention is {name!r}. It must be {', '.join(KINDS)}.{hint}")
    return name


def _setting(name: str, text: str, made: Any, whence: str) -> Any:
    key, owner = f"reattention.{name}", type(made).__name__
    hints = get_type_hints(type(made))
    if hints.get(name) is str and text.lower() in _NULL:
        raise RecipeError(
            f"{key} is {text}, and {owner} needs one. To show no image again: reattention=implicit."
        )
    if name in hints:
        return value_of(key, text, hints[name])
    if not hints:
        raise RecipeError(f"{key} is no setting of {owner}, {whence}. Add reattention=copy or =route.")
    near = nearest(name, hints)
    hint = f"Did you mean reattention.{near}?" if near else f"It has {', '.join(hints)}."
    raise RecipeError(f"{key} is no setting of {owner}, {whence}. {hint}")


# -- texts as values ------------------------------------------------------------------------------


def _texts(key: str, value: str) -> list[str]:
    """What one word says, without quotes: one text, for `stop` perhaps several."""
    if key == "question":
        return [value]
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""  # as a recipe's grammar has it
    bare = value[1:-1] if quoted else value
    if not bare or (key != "stop" and not bare.strip()):
        raise RecipeError(f"{key} is empty. Give {key}=VALUE, or leave it out.")
    return _listed(key, value) if key == "stop" else [bare]


def _listed(key: str, value: str) -> list[str]:
    """`a,'b, c'` -> `a` and `b, c`."""
    found: list[str] = []
    at = 0
    while part := _LISTED.match(value, at):
        found.append(part[1] or part[2] or part[3])
        at = part.end()
        if not part[4]:
            return found
    raise RecipeError(
        f"{key} is {value!r}. It is one text, or several with commas between them; put a text with a comma, "
        f"a quote or outer spaces in quotes: {key}=\"'a, b',c\"."
    )


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, text last: every value is one."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    flat = [one for member in members for one in (_alternatives(member) if len(members) > 1 else [member])]
    return sorted(flat, key=lambda kind: kind is str)


def _parsed(text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
    elif get_origin(kind) is not None:
        inner = text.strip().removeprefix("[").removesuffix("]")
        return tuple(_parsed(part.strip(), get_args(kind)[0]) for part in inner.split(","))
    elif kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif kind in (int, float, str):
        return kind(text)
    raise ValueError(text)


def _said(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) is not None:
        return "whole numbers such as 0,2"
    return {bool: "true or false", int: "a whole number", float: "a number", types.NoneType: "null"}.get(
        kind, "a text"
    )
