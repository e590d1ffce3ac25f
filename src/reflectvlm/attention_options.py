"""The words after `reflectvlm attention`: those of `generate`, and what is to be looked at."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from reflectvlm.generate_options import COLUMNS, COMMON, KINDS, ONE, POLICY, SAMPLING, Given
from reflectvlm.recipe_check import RecipeError, nearest

if TYPE_CHECKING:
    from reflectvlm.protocols import Reattention

log = logging.getLogger("reflectvlm")

Control = Literal["removal", "splice"]
OWN = ("out", "layers", "tags", "query", "chunk")
ONE_ONLY = ("answer", "at")
ROWS_ONLY = (
    "data",
    "split",
    "root",
    "max_rows",
    "max_bad",
    "batch",
    "compare",
    "controls",
    "width",
    *COLUMNS,
)
KEYS = (*COMMON, *POLICY, *SAMPLING, *ONE, *OWN, *ONE_ONLY, *ROWS_ONLY)
FROM_FILE = ("root", "max_bad", *COLUMNS)
"""How a file is read; the built-in pages have none."""
_OPENING = re.compile(r"<([A-Za-z][\w-]*)>")
WAYS = (*KINDS, "text")
"""What `compare=` knows: the kinds of re-attention, and their control."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be looked at, beside who answers."""

    out: Path
    layers: tuple[int, ...] | None
    each: bool
    """Maps of every layer by itself as well."""
    tags: tuple[str, ...]
    query: str
    chunk: int

    @classmethod
    def read(cls, given: Given) -> Asked:
        from reflectvlm.attention.places import TAGS

        layers = given.text("layers")
        each = layers == "each"
        tags = tuple(tag.strip().strip("<>/") for tag in (given.text("tags") or ",".join(TAGS)).split(","))
        chunk = given.value("chunk", int, 64)
        if chunk < 1:
            raise RecipeError(f"chunk is {chunk}. At least one query is looked at at a time.")
        if not all(tags):
            raise RecipeError(f"tags is {given.text('tags')!r}. Name tags with commas: tags=back,REFLECTION.")
        return cls(
            out=Path(given.text("out") or "attention").expanduser(),
            layers=None if layers is None or each else given.value("layers", tuple[int, ...]),
            each=each,
            tags=tags,
            query=given.value("query", Literal["token", "step"], "token"),
            chunk=chunk,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `trend`, `heat_maps` and `read_answers`."""
        return {"layers": self.layers, "tags": self.tags, "query": self.query, "chunk": self.chunk}


def read_words(words: Sequence[str]) -> Given:
    """Raises RecipeError for a word that is unknown or does not go with the others."""
    given = Given.parsed(words, "attention", KEYS, several=("at",))
    if "model" not in given:
        raise RecipeError("attention needs model=PATH: tiny, a folder or a hub name.")
    if "data" not in given and "image" not in given:
        raise RecipeError('attention needs image=FILE question="…", or data=ROWS (data=digits is built in).')
    if "data" in given and (single := next((key for key in (*ONE, *ONE_ONLY) if key in given), None)):
        raise RecipeError(f"{single} and data are both given. Look at one answer, or at those to many rows.")
    if "data" not in given and (many := next((key for key in ROWS_ONLY if key in given), None)):
        raise RecipeError(f"{many} belongs to many rows. Add data=ROWS, or leave it out.")
    if given.text("data") == "digits" and (other := next((key for key in FROM_FILE if key in given), None)):
        raise RecipeError(f"{other} says how a file of rows is read, and data=digits is none. Leave it out.")
    if "data" not in given and not (given.text("question") or "").strip():
        raise RecipeError(
            'attention needs the question that is asked about the image: add question="…".'
            if "question" not in given
            else 'question is empty. Give what is asked about the image: question="…".'
        )
    return given


def check_tags(tags: Sequence[str], *said: str) -> None:
    """A tag is one of the layouts, or stands in what is asked of the model, in a given answer, or is what
    re-attention waits for (`said`): another that is like one of these is misspelt, and would look as if no
    answer had it. Raises RecipeError. One like none of them may be what the model has learnt: a warning."""
    from reflectvlm.tags import grpo, look_back, qwen_la, tag_names

    layouts = [name for layout in (look_back(), grpo(), qwen_la()) for name in tag_names(layout)]
    known = list(dict.fromkeys([*layouts, *_OPENING.findall(" ".join(said))]))
    for tag in tags:
        if tag in known:
            continue
        if near := nearest(tag, known):
            raise RecipeError(
                f"tags has {tag!r}. It takes {', '.join(known)}, and every other tag that the model's "
                f"instruction (instruction=), its trigger (reattention.trigger=) or answer=FILE has. Did you "
                f"mean {near}?"
            )
        log.warning(
            "tags has %r, which is in no layout, nor in the model's instruction or trigger: unless the model "
            "has learnt to write <%s>, no answer has it",
            tag, tag,
        )  # fmt: skip


def controls_of(given: Given) -> tuple[Control, ...]:
    """`controls=removal,splice`, `all` or `none`."""
    text = given.text("controls") or "none"
    known: tuple[Control, ...] = get_args(Control)
    if text in ("all", "none"):
        return known if text == "all" else ()
    names = [name.strip() for name in text.split(",")]
    if wrong := [name for name in names if name not in known]:
        raise RecipeError(
            f"controls is {text!r}. It takes {', '.join(known)}, all or none, not {wrong[0]!r}."
        )
    return tuple(name for name in known if name in names)


def ways_of(given: Given, own: Reattention, trigger: str) -> dict[str, Reattention]:
    """Name -> re-attention. Without `compare=` the model's own alone, by its name; else those that it lists,
    with the settings given as `reattention.…` where they have them."""
    from reflectvlm.generate_options import reattention_of

    text = given.text("compare")
    if text is None:
        return {_name_of(own): own}
    if "reattention" in given:
        raise RecipeError("compare and reattention are both given. compare lists the ways to look again.")
    made: dict[str, Reattention] = {}
    for way in (name.strip() for name in text.split(",")):
        if way not in WAYS:
            near = nearest(way, WAYS)
            raise RecipeError(
                f"compare is {text!r}. It lists some of {', '.join(WAYS)}, not {way!r}."
                + (f" Did you mean {near}?" if near else "")
            )
        if way == "implicit":
            made[way], _ = reattention_of(Given({"reattention": ("implicit",)}), None)
            continue
        kind = "copy" if way == "text" else way
        fields = {field.name for field in dataclasses.fields(_class_of(kind))}
        settings = {"reattention.trigger": (trigger,)} | {
            f"reattention.{name}": (value,)
            for name, value in given.below("reattention").items()
            if name in fields or not _known(name)
        }
        made[way], _ = reattention_of(Given({"reattention": (kind,), **settings}), None)
        if way == "text":
            from reflectvlm.attention.matched_text import MatchedText

            made[way] = MatchedText(like=made[way])
    return made


def _class_of(kind: str) -> Any:
    from reflectvlm import reattention

    return getattr(reattention, KINDS[kind])


def _known(name: str) -> bool:
    """Whether COPY or ROUTE has such a setting; one that neither has is refused by both."""
    return any(
        name in {field.name for field in dataclasses.fields(_class_of(kind))} for kind in ("copy", "route")
    )


def _name_of(own: Reattention) -> str:
    names = {cls: name for name, cls in KINDS.items()}
    return names.get(type(own).__name__, type(own).__name__)
