"""A run writes its recipe and overrides down as text, so neither may hold a secret.

Refused are the value of an environment variable that is named like a secret, however it got there
(`${oc.env:HF_TOKEN}`, or a shell that put it in), and an address with a password or a known kind of token in
it. What needs a secret reads its variable itself, when it needs it. Left out: secrets that are in no variable
and no address, because nothing tells them from other text; and what is spelled like a path, a repository's
name or a special token of a tokenizer, which variables such as MODEL_KEY hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from reflectvlm.recipe_check import RecipeError, leaves

_WORDS = "KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASS|PASSPHRASE|PAT|CREDENTIALS?"
_NAMED = re.compile(rf"(?:^|_)(?:API|ACCESS)?(?:{_WORDS})(?:_|$)", re.IGNORECASE)
_SHORTEST = 16
"""Characters: a shorter value may well be a word that a recipe has of its own."""
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://([^/\s@?#]+)@", re.IGNORECASE)
_TOKEN = re.compile(
    r"(?:hf_|api_org_|sk-|gh[opsur]_|github_pat_|glpat-|xox[a-z]-|pypi-|nvapi-)\S{8,}|[0-9a-f]{40}",
    re.IGNORECASE,
)
"""Tokens that tell by their beginning what they are; and 40 hex digits, as of wandb."""
_PATH = re.compile(r"(?:[A-Za-z]:)?(?:~|\.{1,2})?[\w .-]*(?:[/\\][\w .-]+)+[/\\]?")
_RANDOM = re.compile(r"(?=.*[a-z])(?=.*[A-Z])[A-Za-z0-9/]{32,}")
"""What base64 looks like, whose slashes make no path: long, of both cases, and no '-', '_' or '.'."""


def check_no_secrets(values: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
    """Raises RecipeError for a value that must not be written down; the text does not show it."""
    environment = os.environ if environment is None else environment
    secrets = {
        name: value for name, value in environment.items() if _NAMED.search(name) and _is_secret(value)
    }
    for key, value in leaves(values):
        text = str(value)
        for name, secret in secrets.items():
            if secret in text:
                raise RecipeError(
                    f"{key} holds the value of the environment variable {name}, and a run's folder keeps its "
                    "recipe as text. Leave it out; what needs it reads the variable itself."
                )
        if any(_is_login(found) for found in _ADDRESS.findall(text)):
            raise RecipeError(
                f"{key} is an address with a password or token in it, and a run's folder keeps its recipe as "
                "text. Take it out of the address; log in by environment variable or by the tool's own login."
            )


def _is_secret(value: str) -> bool:
    if _TOKEN.match(value):
        return True
    if len(value) < _SHORTEST or "<|" in value or os.path.exists(value):
        return False
    return not _PATH.fullmatch(value) or _RANDOM.fullmatch(value) is not None


def _is_login(user: str) -> bool:
    """Whether what stands in front of an address's '@' is more than a user's name."""
    _, _, password = user.partition(":")
    return bool(password) or _TOKEN.match(user) is not None
