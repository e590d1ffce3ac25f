"""Teachers as commands name them, and settings behind commas.

    teacher=rule                    teacher=rule,wrong=0.5,seed=3
    teacher=local:runs/x/model      teacher=local:tiny,batch=8
    teacher=recorded:replies.jsonl
    teacher=http://localhost:8000/v1,model=NAME,key_env=VAR,requests_per_minute=60,extra.top_p=0.9

A setting is a field of the teacher's class. An API key is never given: `key_env` names its variable.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_type_hints

from reflectvlm.generate_options import value_of
from reflectvlm.recipe_check import RecipeError, nearest

if TYPE_CHECKING:
    from reflectvlm.curate.types import Question, Teacher

FORMS = "rule, local:PATH, recorded:FILE or http://host:port/v1,model=NAME"
_COMMA = re.compile(r",(?=[A-Za-z_][\w.-]*=)")  # one in a path or an address separates nothing
_SECRET = re.compile(
    r"(?:api|secret|private)key\Z|(?:access|auth)token\Z|(?:authorization|password|secret|bearer)\Z"
)
_SECRETS = ("key", "token", "auth")  # alone: `max_tokens` and `stop_token` are none
_NOT_GIVEN = ("limits", "questions", "load", "path", "url", "extra")


def teacher(text: str, questions: Sequence[Question] = (), key: str = "teacher") -> Teacher:
    """The teacher that a word names. `questions` are the rows it will be asked about: the rule knows them;
    `key` is what it was given as, for errors.

    Example: `teacher("http://localhost:8000/v1,model=Qwen2.5-VL-7B-Instruct")`
    """
    head, *rest = _COMMA.split(text)
    settings = dict(_setting(word, key) for word in rest)
    if len(settings) < len(rest):
        raise RecipeError(f"{key}={head} has a setting that is given twice. Give each once.")
    kind, _, where = head.partition(":")
    try:
        return _made(kind, where, head, settings, questions, key)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def check_model(text: str, key: str) -> None:
    """That the folder of a `local:` teacher is there, before anything is asked. RecipeError: it is not."""
    head = _COMMA.split(text)[0]
    kind, _, where = head.partition(":")
    if kind != "local":
        return
    from reflectvlm.models.loading import find_model

    try:
        find_model(os.path.expanduser(where))
    except FileNotFoundError as error:
        raise RecipeError(f"{key}={head}: {error}") from error


def _made(
    kind: str, where: str, head: str, settings: Mapping[str, str], questions: Sequence[Question], key: str
) -> Teacher:
    if head == "rule":
        from reflectvlm.curate.teachers.rule import RuleTeacher

        return RuleTeacher(questions=questions, **_values(RuleTeacher, head, settings, key))
    if kind in ("http", "https"):
        from reflectvlm.curate.teachers.http import HttpTeacher

        if "model" not in settings:
            raise RecipeError(f"{key}={head} needs the model's name: {key}={head},model=NAME.")
        return HttpTeacher(url=head, **_values(HttpTeacher, head, settings, key))
    if kind == "local" and where:
        from reflectvlm.curate.teachers.local import LocalTeacher

        return LocalTeacher(path=where, **_values(LocalTeacher, head, settings, key))
    if kind == "recorded" and where:
        from reflectvlm.curate.teachers.recorded import RecordedTeacher

        return RecordedTeacher(path=where, **_values(RecordedTeacher, head, settings, key))
    raise RecipeError(f"{key} is {head!r}. It must be {FORMS}.")


def _setting(word: str, key: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    for found in (name, *_names_in(_json(value), name)):
        if _is_secret(found):
            # Not repeated here: it is what must not be written down.
            raise RecipeError(
                f"{key} has no setting {found}. Export the key and name its variable: key_env=VAR."
            )
    return name, value


def _is_secret(name: str) -> bool:
    """Whatever it is spelled like: `x-api-key`, `openai_api_key`, `accessToken`, `headers.Authorization`."""
    last = re.sub(r"[^a-z]", "", name.rpartition(".")[2].lower())
    return last in _SECRETS or _SECRET.search(last) is not None


def _names_in(value: Any, above: str) -> Iterator[str]:
    """Those of a JSON object, at every depth."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield f"{above}.{name}"
            yield from _names_in(one, f"{above}.{name}")
    elif isinstance(value, list):
        for one in value:
            yield from _names_in(one, above)


def _values(kind: Any, head: str, settings: Mapping[str, str], key: str) -> dict[str, Any]:
    hints = get_type_hints(kind)
    known = [one.name for one in dataclasses.fields(kind) if one.init and one.name not in _NOT_GIVEN]
    values: dict[str, Any] = {}
    for name, text in settings.items():
        if name.startswith("extra.") and "extra" in hints:
            values.setdefault("extra", {})[name.removeprefix("extra.")] = _json(text)
        elif name in known:
            values[name] = value_of(f"{key}'s {name}", text, hints[name])
        else:
            near = nearest(name, known)
            hint = f"Did you mean {near}?" if near else f"It has {', '.join(known) or 'none'}."
            raise RecipeError(f"{key}={head} has no setting {name!r}. {hint}")
    return values


def _json(text: str) -> Any:
    """A number, a truth value, null; else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
