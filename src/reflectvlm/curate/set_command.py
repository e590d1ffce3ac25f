"""What `data coldstart` and `data distill` do alike: who is asked, what it will take, the folder, the end.

Who is asked stands in the folder's card, in its rows and beside its votes by the teacher's *name*, which
holds all that decides what it says. How fast it is asked (`concurrency`, `requests_per_minute`, `timeout`, …)
is no part of that, so a set that met a server's limits goes on with others.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reflectvlm.curate.calls import Calls, Prices, until_stopped
from reflectvlm.curate.contamination import Held
from reflectvlm.curate.curation_report import report_markdown, without_rows
from reflectvlm.curate.evaluation_sets import EvaluationSets
from reflectvlm.curate.filters import standard
from reflectvlm.curate.judging import Judges
from reflectvlm.curate.most_calls import Most
from reflectvlm.curate.set_words import cache_of, out_of, prices_of, questions_of, rows_of, source_digest
from reflectvlm.curate.stages import folder_of, rows_digest
from reflectvlm.curate.teachers import teacher
from reflectvlm.curate.teachers.words import check_model
from reflectvlm.curate.types import Filter, Question, Request, Teacher
from reflectvlm.generate_options import Given
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.printing import put, put_error
from reflectvlm.train.table import say

log = logging.getLogger("reflectvlm")

Specs = Mapping[str, Sequence[str]]
"""The words for `model`, `teacher` and `judges`."""


@dataclass(frozen=True, kw_only=True)
class Cast:
    """Who is asked as what, and all else that a set is made of."""

    questions: Sequence[Question]
    model: Calls | None
    teacher: Calls | None
    judges: Judges
    filters: Sequence[Filter]
    out: Path
    rows_at_once: int
    before: Callable[[str, Sequence[Request]], None]


def make_set(
    given: Given,
    card: Mapping[str, Any],
    specs: Specs,
    most_calls: Callable[[Sequence[Question]], Mapping[str, Most]],
    run: Callable[[Cast], Mapping[str, Any]],
) -> int:
    """The exit code. `card` are the settings, `command` and `method` among them; `most_calls` says from the
    questions what who may be asked; `run` makes the set and gives its report."""
    out, questions = out_of(given), questions_of(given)
    sets = EvaluationSets(given=given, key="without")
    sets.index(())  # what is wrong with its settings is said before an hour of hashing
    prices, rows_at_once = prices_of(given), rows_of(given)
    only = given.value("estimate", Literal["only", "first"], "first") == "only"
    asked = Asked(cache_of(given), questions, prices)
    names = {role: [asked.name(role, spec) for spec in found] for role, found in specs.items()}
    votes = judges_of(given, asked.teachers(specs["judges"])).votes if specs["judges"] else _no_votes(given)
    whole = {**card, **names, "votes": votes, "without": list(sets.names), **without_of(given, sets)}
    for role, most in most_calls(questions).items():
        if most.calls:
            say(f"{role}: {most.told(prices)}")
    if only:
        return 0
    held = held_of(sets)
    if sets.names:
        whole["evaluation_rows"] = rows_digest((h.set, h.id, h.question, *h.images) for h in held)
    filters = standard(card["method"], without=sets.index(held) if sets.names else None)
    source = source_digest(questions, card.get("column"))
    with folder_of(out, {**whole, "rows": len(questions), "source": source}):
        people = {role: [asked.add(role, spec) for spec in found] for role, found in specs.items()}
        cast = Cast(
            questions=questions,
            model=next(iter(people["model"]), None),
            teacher=next(iter(people["teacher"]), None),
            judges=judges_of(given, {one.name: one for one in people["judges"]}),
            filters=filters,
            out=out,
            rows_at_once=rows_at_once,
            before=asked.before,
        )
        values: dict[str, Any] = {}
        code = until_stopped(lambda: values.update(run(cast)))
    asked.told()
    return _ended(values, out) if values else code


def _ended(values: Mapping[str, Any], out: Path) -> int:
    """What must be read stands last, and once."""
    put(report_markdown({**values, "notes": []}))
    say(f"rows, images, the list for people and this report are in {out}")
    for note in values["notes"]:
        say(f"note: {note}")
    if not values["rows"]:
        put_error(f"error: {without_rows(values)}\n")
        return 1
    return 0


@dataclass
class Asked:
    """Who is asked, each once, with its replies kept in `folder`."""

    folder: Path
    questions: Sequence[Question]
    prices: Prices = field(default_factory=Prices)
    calls: dict[str, Calls] = field(default_factory=dict)
    specs: dict[str, list[str]] = field(default_factory=dict)
    """What stands for `model`, `teacher` and `judges`."""
    _made: dict[str, Teacher] = field(default_factory=dict)

    def name(self, role: str, spec: str) -> str:
        """Of the teacher that the words name; it is made, and nothing asked or loaded."""
        if spec not in self._made:
            self._made[spec] = teacher(spec, self.questions, role)
            check_model(spec, role)
        name = self._made[spec].name
        if name in (self._made[other].name for other in self.specs.get(role, [])):
            raise RecipeError(f"{role} names {name} twice. Its second word would be its first: give it once.")
        self.specs.setdefault(role, []).append(spec)
        return name

    def teachers(self, specs: Sequence[str]) -> dict[str, Teacher]:
        return {self._made[spec].name: self._made[spec] for spec in specs}

    def add(self, role: str, spec: str) -> Calls:
        """The same words in two roles are one teacher, with one memory."""
        assert spec in self.specs[role]
        if spec not in self.calls:
            made = self._made[spec]
            self.calls[spec] = Calls(made, cache=self.folder / replies_file(made.name), prices=self.prices)
        return self.calls[spec]

    def before(self, role: str, requests: Sequence[Request]) -> None:
        """Says what a stage is going to take. The first few calls are made for that, and kept."""
        if not requests:
            return
        for spec in self.specs.get(role, []):
            say(f"{role} {spec}: {self.calls[spec].estimate(requests)}")

    def told(self) -> None:
        for spec, calls in self.calls.items():
            for line in calls.counts.lines():
                log.info("%s: %s", spec, line)


def replies_file(name: str) -> str:
    """By who is asked, so that sets that share a folder of replies find what the other was told, whichever
    role it had there."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", name)[:40].strip("-.")
    return f"{readable}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}.jsonl"


def judges_of(given: Given, asked: Mapping[str, Any]) -> Judges:
    return Judges(asked=asked, votes=given.value("votes", int, min(2, len(asked)))) if asked else Judges()


def held_of(sets: EvaluationSets) -> Sequence[Held]:
    """The rows of the evaluation sets that `without=` names; says how many, and what cannot be compared."""
    held = sets.held(lambda name, count: say(f"without {name}: {count:,} evaluation rows"))
    for line in sets.doubts(held) if held else ():
        log.warning("without=%s: %s", ",".join(sets.names), line)
    return held


def without_of(given: Given, sets: EvaluationSets) -> dict[str, str]:
    """How evaluation sets are read and compared, as the words say it, for the card."""
    words = {f"without.{name}": text for name, text in given.below("without").items()}
    words |= {"data_dir": str(given.text("data_dir"))} if "data_dir" in given else {}
    if words and not sets.names:
        raise RecipeError(
            f"{next(iter(words))} is given, and nothing that the set is held against. Add without=, or leave "
            "it out."
        )
    return words


def _no_votes(given: Given) -> int:
    if "votes" in given:
        raise RecipeError("votes is given, and no judges. Add judges=, or leave it out.")
    return 0
