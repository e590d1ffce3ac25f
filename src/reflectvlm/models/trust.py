"""What a model folder may bring: weights as safetensors, and no code unless it was asked for.

Two things in a folder can run code when it is loaded: a class of its own, named by `auto_map` in its
configuration, or an attention kernel named there, which is fetched and run (both are `code_of`); and weights
as a pickle (`.bin`, `.pt`), which are never loaded. The stock image processor is always used, so an
`auto_map` of its own configuration never comes to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class CodeRefused(ValueError):
    """Loading this model would run code that comes with it, and nobody has asked for that."""


def refuse_code(path: str, source: str) -> None:
    """Raises `CodeRefused` if loading the model from `source`, asked for as `path`, would run such code."""
    found = ", ".join(code_of(source))
    if found:
        raise CodeRefused(
            f"{path!r} comes with code of its own that loading it would run: {found}. Read that code; then "
            "trust_remote_code=true (in a recipe policy.trust_remote_code=true) runs it, or delete those "
            "entries to have the stock classes."
        )


def code_of(source: str) -> Iterator[str]:
    """Every entry of a model's configuration that names code, with its file."""
    from transformers import PretrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        config, _ = PretrainedConfig.get_config_dict(source)
    except OSError:  # none there or not readable, which the loader says better
        config = {}
    for file, values in (("config.json", config), ("tokenizer_config.json", get_tokenizer_config(source))):
        yield from (f"{file}: {entry}" for entry in _code_in(values))


def _code_in(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("auto_map"):
        yield f"auto_map {_cut(values['auto_map'])}"
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(values.get(key)):  # stock ones are single words; this is a repository
            yield f"{key} {_cut(values[key])}"


def no_safetensors(path: str, source: str) -> ValueError:
    """What to say about a model that has no safetensors file."""
    names = sorted(file.name for pattern in _PICKLES for file in Path(source).glob(pattern))
    what = f"has its weights as {', '.join(names[:3])} only" if names else "has no weights as safetensors"
    return ValueError(
        f"{path!r} {what}. Other formats are pickles, which can run any code when they are read, so nothing "
        "but .safetensors is. Convert them where you trust them (load them with transformers and "
        "save_pretrained), or take a revision that has safetensors."
    )


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
