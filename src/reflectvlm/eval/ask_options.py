"""What `ask=` and `ask.FIELD=` say: the language model that helps an official rule (`asking.py`).

ask=http://localhost:8000/v1 ask.model=NAME ask.key_env=JUDGE_KEY ask.cache=judge.jsonl
ask=judge.jsonl            what one said before: its cache, or a record
"""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

from reflectvlm.eval.types import Ask
from reflectvlm.generate_options import Given, value_of
from reflectvlm.recipe_check import RecipeError, nearest


def ask_of(given: Given) -> Ask | None:
    """None where nobody is to be asked."""
    where, settings = given.text("ask"), given.below("ask")
    first = next(iter(settings), "")
    if where is None:
        if settings:
            raise RecipeError(
                f"ask.{first} is given, and ask is not. Add ask=http://HOST:PORT/v1, or a file."
            )
        return None
    from reflectvlm.eval.asking import HttpAsk, RecordedAsk

    if "://" not in where:
        if settings:
            raise RecipeError(
                f"ask.{first} is a setting of a server, and ask is the file {where!r}. Leave it out."
            )
        return RecordedAsk(path=where)
    known = [one.name for one in fields(HttpAsk) if one.init and one.name != "url"]
    hints = get_type_hints(HttpAsk)
    for name in settings:
        if name not in known:
            near = nearest(name, known)
            hint = f"Did you mean ask.{near}?" if near else f"It has {', '.join(known)}."
            raise RecipeError(f"ask.{name} is no setting of a server that is asked. {hint}")
    if "model" not in settings:
        raise RecipeError("ask needs ask.model=NAME: which model the server is to ask.")
    values = {name: value_of(f"ask.{name}", text, hints[name]) for name, text in settings.items()}
    return HttpAsk(url=where, **values)
