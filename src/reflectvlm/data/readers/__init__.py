"""Ready readers for public data sets, in the layouts in which their authors and the hub give them out.

A reader is a `Source`: `dataset(Geo170K("Geo170K"))` gives its samples, `questions(Geo170K("Geo170K"))` its
questions with their images unread, and every `reflectvlm data` tool takes `geo170k:Geo170K` for a file. Rows
are plain rows in all of them (`id`, `question`, `answer`, `images`), and what else a source knows stands in
columns of its own: each reader's docstring is its row schema, as it comes and as it leaves.

Nothing is downloaded. Where a file is missing, the error names what was looked for and where it comes from.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reflectvlm.data.readers.asked import questions
    from reflectvlm.data.readers.geo170k import Geo170K
    from reflectvlm.data.readers.geometry3k import Geometry3K
    from reflectvlm.data.readers.llava_cot import LlavaCot
    from reflectvlm.data.readers.mathvision import MathVisionRows
    from reflectvlm.data.readers.mmk12 import MMK12
    from reflectvlm.data.readers.polymath import PolyMath
    from reflectvlm.data.readers.scemqa import SceMQA
    from reflectvlm.data.readers.virl39k import ViRL39K

_HOME = {
    "Geo170K": "geo170k",
    "Geometry3K": "geometry3k",
    "LlavaCot": "llava_cot",
    "MMK12": "mmk12",
    "MathVisionRows": "mathvision",
    "PolyMath": "polymath",
    "SceMQA": "scemqa",
    "ViRL39K": "virl39k",
    "questions": "asked",
}

__all__ = [
    "MMK12",
    "Geo170K",
    "Geometry3K",
    "LlavaCot",
    "MathVisionRows",
    "PolyMath",
    "SceMQA",
    "ViRL39K",
    "named",
    "questions",
]

NAMES = {
    "llava_cot": "LlavaCot",
    "geometry3k": "Geometry3K",
    "mathvision": "MathVisionRows",
    "polymath": "PolyMath",
    "scemqa": "SceMQA",
    "geo170k": "Geo170K",
    "mmk12": "MMK12",
    "virl39k": "ViRL39K",
}
"""What a command calls them: `source=geo170k:FOLDER`."""


def named(text: str) -> Any:
    """The source that `geo170k:FOLDER` or `geometry3k:FOLDER:test` names; anything else goes the way of
    `dataset()`, by its suffix or what lies in the folder."""
    from reflectvlm.data.sources import pick

    name, colon, rest = text.partition(":")
    if not colon or name not in NAMES:
        _check_path(text, name if colon else "")
        return pick(text)
    folder, colon, part = rest.rpartition(":")
    reader = getattr(import_module(f"{__name__}.{_HOME[NAMES[name]]}"), NAMES[name])
    if not colon or "/" in part:
        return reader(rest)
    return reader(folder, part)


def _check_path(text: str, name: str) -> None:
    """What `dataset()` could say nothing helpful about."""
    from pathlib import Path

    from reflectvlm.recipe_check import RecipeError, nearest

    here = Path(text)
    if name and not here.exists() and (near := nearest(name, NAMES)):
        raise RecipeError(f"{text!r} names no known data set. Did you mean {near}?")
    if here.is_dir() and not any(_may_hold_rows(one) for one in here.rglob("*")):
        raise RecipeError(
            f"{text!r} holds no file of rows. Name a .jsonl, .csv or .parquet file, or its folder."
        )


def _may_hold_rows(path: Any) -> bool:
    """Also as the `datasets` library writes and reads them; a link to a folder is not looked into."""
    kinds = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".tar", ".zip")
    if path.is_symlink() and path.is_dir():
        return True
    return str(path.name).lower().removesuffix(".gz").endswith(kinds)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
