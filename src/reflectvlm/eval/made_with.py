"""Which rows replies are to: what the words of `score` say, over what the card beside the file says.

A card keeps the task's settings, where its data were and how many rows were asked (`answer_card.py`), so that
none of it has to be said again. Where words and card disagree the words count, and a line says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectvlm.eval.predictions import Predictions
from reflectvlm.generate_options import Given
from reflectvlm.recipe_check import RecipeError

log = logging.getLogger("reflectvlm")

_TASK = "task."


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Of one task."""

    name: str
    settings: Mapping[str, str]
    """Fields of the task, as words."""
    folder: Path
    limit: int | None

    @classmethod
    def asked(cls, given: Given, predictions: Predictions, name: str) -> Rows:
        kept, about = _settings(predictions, name), _about(predictions, name)
        said = given.below(name)
        for key in sorted(kept.keys() & said.keys()):
            _tell(f"{name}.{key}", said[key], kept[key], predictions)
        limit = limit_of(given)
        if "limit" in given and "limit" in about:
            _tell("limit", limit, about["limit"], predictions)
        elif about.get("limit") is not None:
            limit = int(about["limit"])
            log.info("limit=%d, as the card of %s says", limit, predictions.path)
        return cls(name=name, settings=kept | said, folder=_folder(given, about, predictions), limit=limit)

    def check_other(self, other: Predictions) -> None:
        """A second file is scored on the same rows; what its card says otherwise is told."""
        kept, about = _settings(other, self.name), _about(other, self.name)
        if not about:
            return
        for key in sorted(kept.keys() | self.settings.keys()):
            _tell(f"{self.name}.{key}", self.settings.get(key), kept.get(key), other)
        _tell("limit", self.limit, about.get("limit"), other)


def _settings(predictions: Predictions, name: str) -> dict[str, str]:
    """The card's fields of the task; none of a card of another one."""
    card, kept = predictions.card, {}
    if card.get("task") == name:
        for key, value in card.items():
            if key.startswith(_TASK) and not isinstance(value, Mapping) and value is not None:
                text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                kept[key.removeprefix(_TASK)] = text
    return kept


def _about(predictions: Predictions, name: str) -> Mapping[str, Any]:
    about = predictions.card.get("about") if predictions.card.get("task") == name else None
    return about if isinstance(about, Mapping) else {}


def limit_of(given: Given) -> int | None:
    limit: int | None = given.value("limit", int | None)
    if limit is not None and limit < 1:
        raise RecipeError(f"limit is {limit}. It must be at least 1; limit=null is all rows.")
    return limit


def _folder(given: Given, about: Mapping[str, Any], predictions: Predictions) -> Path:
    """That of the words, else the card's where it is still there, else `data`, which is told."""
    said, kept = given.text("data_dir"), about.get("data_dir")
    if not isinstance(kept, str):
        return Path(said or "data").expanduser()
    if said is None:
        if Path(kept).is_dir():
            return Path(kept)
        log.warning(
            "data_dir is %s on the card of %s, which is not there: %s is taken, and may have other rows. "
            "Give the place of that data: data_dir=…",
            kept, predictions.path, Path("data").absolute(),
        )  # fmt: skip
        return Path("data")
    if Path(said).expanduser().absolute() != Path(kept):
        _tell("data_dir", said, kept, predictions)
    return Path(said).expanduser()


def _tell(key: str, here: Any, there: Any, predictions: Predictions) -> None:
    shown = ["not set" if value is None else str(value) for value in (here, there)]
    if shown[0].lower() != shown[1].lower():
        log.warning(
            "%s is %s here, and %s on the card of %s: the first counts", key, *shown, predictions.path
        )
