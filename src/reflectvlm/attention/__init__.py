"""What a model looks at while it answers: attention shares, heat maps, and controls that test what they say.

    capture.py        attention weights of chosen tokens, whatever attention the model runs with
    places.py         which token of a sequence is what: image, question, answer, inserted block
    trends.py         shares along an answer (Look-Back's figure)       maps.py   heat maps on the image
    readings.py       the same over many answers                        boxes.py  where an image's objects are
    matched_text.py   removing.py   splice.py                            the controls
    hallucination.py  CHAIR-i and recall against length
    spread.py         standard errors over answers, deviations over seeds
    figures.py, figures_maps.py, figures_means.py, files.py             pictures and numbers

Names are imported on first use. docs/attention.md explains what each number means.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reflectvlm.attention.capture import Ask, attended
    from reflectvlm.attention.hallucination import Caption, by_length
    from reflectvlm.attention.maps import Heat, heat_maps, token_maps
    from reflectvlm.attention.matched_text import MatchedText
    from reflectvlm.attention.readings import Reading, read_answers
    from reflectvlm.attention.removing import removal
    from reflectvlm.attention.splice import repairs
    from reflectvlm.attention.trends import Trend, trend

_HOME = {
    "Ask": "reflectvlm.attention.capture",
    "Caption": "reflectvlm.attention.hallucination",
    "Heat": "reflectvlm.attention.maps",
    "MatchedText": "reflectvlm.attention.matched_text",
    "Reading": "reflectvlm.attention.readings",
    "Trend": "reflectvlm.attention.trends",
    "attended": "reflectvlm.attention.capture",
    "by_length": "reflectvlm.attention.hallucination",
    "heat_maps": "reflectvlm.attention.maps",
    "read_answers": "reflectvlm.attention.readings",
    "removal": "reflectvlm.attention.removing",
    "repairs": "reflectvlm.attention.splice",
    "token_maps": "reflectvlm.attention.maps",
    "trend": "reflectvlm.attention.trends",
}

__all__ = [
    "Ask",
    "Caption",
    "Heat",
    "MatchedText",
    "Reading",
    "Trend",
    "attended",
    "by_length",
    "heat_maps",
    "read_answers",
    "removal",
    "repairs",
    "token_maps",
    "trend",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
