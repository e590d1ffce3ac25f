"""Which of COCO's 80 objects a caption names: CHAIR's reading of text (arXiv 1809.02156).

Words, each made singular, pairs of words that are one thing ("hot dog"), synonyms. The official list
is read bug for bug: entries parted by comma and *one* space, so that " motor bike" keeps a space and is never
found; and the way words are made singular turns bus into "bu", glass into "glas" and skis into "ski", so
that with it a bus is not seen. With our own list (`chair_words.txt`) a word counts as it is written, too.

Needs textblob, whose singular forms are those of the authors' library, and nltk's word tokenizer, which needs
no downloaded data when it is used by itself: the extra `chair`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

PAIRS = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal",
    "stop light", "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat",
    "baseball glove",
    "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier",
    "potted plant", "bow tie", "laptop computer", "stove top oven", "home plate",
)  # fmt: skip
"""Pairs that are one word. "stove top oven" is three, and so never found, as published."""
_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub",
)  # fmt: skip
_VEHICLES = ("jet", "train")
_JOINED = {
    **{pair: pair for pair in PAIRS},
    **{f"{young} {animal}": animal for animal in _ANIMALS for young in ("baby", "adult")},
    **{f"passenger {vehicle}": vehicle for vehicle in _VEHICLES},
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Example: `Objects.ours().named("Two dogs by a bow tie")` is `["dog", "tie"]`."""

    name_of: Mapping[str, str]
    """What each word or pair is called in COCO."""
    as_written: bool
    """Whether a word also counts before it is made singular."""

    @classmethod
    def ours(cls) -> Objects:
        return cls(name_of=_ours(), as_written=True)

    @classmethod
    def official(cls, file: Path) -> Objects:
        """The authors' `synonyms.txt`: a line for each object, its name first. Of a word that stands on two
        lines the later one counts."""
        lines = [line.strip().split(", ") for line in file.read_text(encoding="utf-8").splitlines()]
        return cls(name_of={word: line[0] for line in lines if line[0] for word in line}, as_written=False)

    def named(self, caption: str) -> list[str]:
        """COCO's names of all mentions, in their order; one that occurs twice counts twice."""
        words = self._joined(_words(caption))
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        return [self.name_of[word] for word in words if word in self.name_of]

    def _joined(self, words: list[str]) -> list[str]:
        singular = _singular()
        forms = [singular(word) for word in words]
        found = []
        place = 0
        while place < len(forms):
            pair = " ".join(forms[place : place + 2])
            if pair in _JOINED:
                found.append(_JOINED[pair])
                place += 2
                continue
            form, written = forms[place], words[place]
            found.append(written if self.as_written and written in self.name_of else form)
            place += 1
        return found


def _words(caption: str) -> list[str]:
    """Sentences are parted first: the tokenizer takes a full stop for its own word only at the end."""
    tokenizer = _tokenizer()
    return [word for part in _SENTENCE_END.split(caption.lower()) for word in tokenizer(part)]


@lru_cache(maxsize=1)
def _singular() -> Callable[[str], str]:
    _require()
    from textblob.en.inflect import singularize

    return lru_cache(maxsize=100_000)(singularize)


@lru_cache(maxsize=1)
def _tokenizer() -> Callable[[str], list[str]]:
    _require()
    from nltk.tokenize import NLTKWordTokenizer

    found: Callable[[str], list[str]] = NLTKWordTokenizer().tokenize
    return found


def _require() -> None:
    lacking = [name for name in ("textblob", "nltk") if find_spec(name) is None]
    if lacking:
        raise ValueError(
            f"CHAIR needs the optional package(s) {', '.join(lacking)}: pip install 'reflectvlm[chair]'."
        )


@lru_cache(maxsize=1)
def _ours() -> Mapping[str, str]:
    text = resources.files("reflectvlm.eval.tasks").joinpath("chair_words.txt").read_text(encoding="utf-8")
    lines = [line.split(": ") for line in text.splitlines() if line and not line.startswith("#")]
    names = {name: name for name, *_ in lines}
    return names | {
        word.strip(): name for name, *more in lines for word in ",".join(more).split(",") if word.strip()
    }
