"""`reflectvlm attention data=…`: the same over many answers, for one or several ways to look again, and the
controls.

Per way: attention to visual tokens against length; before, inside and after the tagged block; how much of it
lies on what a question is about, where boxes are known. On pages of digits also CHAIR-i and recall against
length, with a digit at a place as the object; recall is over the places asked about.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reflectvlm.attention.figures_means import hallucination_figure, length_figure, parts_figure
from reflectvlm.attention.files import save_csv, save_figure, save_json
from reflectvlm.attention.hallucination import AtLength, Caption, by_length, steps
from reflectvlm.attention.readings import Reading, by_part, by_step, read_answers
from reflectvlm.attention.removing import Removed, removal
from reflectvlm.attention.splice import Form, Spliced, repairs, starts
from reflectvlm.attention_options import Asked, Control, check_tags, controls_of, ways_of
from reflectvlm.attention_tables import numbers, show
from reflectvlm.data.digit_mentions import mentions
from reflectvlm.data.digits import PLACES, Digits
from reflectvlm.generate_command import Plan, rows_of
from reflectvlm.generate_options import Given, described
from reflectvlm.generator import Generator
from reflectvlm.recipe_check import RecipeError
from reflectvlm.rollout.placing import special_id
from reflectvlm.train.printing import put
from reflectvlm.types import Rollout, Sample

log = logging.getLogger("reflectvlm")

DIGITS = 100
"""Rows of data=digits unless max_rows says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What was found of one way to look again."""

    name: str
    reattention: str
    readings: Sequence[Reading]
    removed: Sequence[Removed] = ()
    spliced: Sequence[Spliced] = ()
    hallucination: Sequence[AtLength] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    """Why answers were left out of something -> how many."""


def over_rows(given: Given, asked: Asked) -> int:
    """Runs the command over many rows and returns its exit code."""
    batch, width = given.value("batch", int, 16), given.value("width", int, 8)
    for name, value in (("batch", batch), ("width", width)):
        if value < 1:
            raise RecipeError(f"{name} is {value}. It must be at least 1.")
    controls = controls_of(given)
    plan, samples = plan_of(given), samples_of(given)
    check_tags(asked.tags, plan.instruction.text, plan.reattention.trigger or "")
    # Settings that cannot be are told before the weights are loaded; the trigger may depend on its tokens.
    ways_of(given, plan.reattention, "<back>")
    generator = plan.generator()
    ways = ways_of(given, plan.reattention, trigger_of(generator))
    found = [
        look(dataclasses.replace(generator, reattention=way), name, samples, asked, controls, batch)
        for name, way in ways.items()
    ]
    files = save_many(found, asked.out, width, f"{named(plan.path)}, {len(samples)} rows")
    show(found)
    put(
        f"{asked.out}: {', '.join(file.name for file in files if file.suffix != '.svg')}; figures as PNG "
        f"and SVG\n"
    )
    return 0


def plan_of(given: Given) -> Plan:
    """Who answers. With `compare=` settings of re-attention belong to what it lists."""
    if "compare" not in given:
        return Plan.read(given)
    own = {key: texts for key, texts in given.values.items() if not key.startswith("reattention.")}
    return Plan.read(Given(own))


def named(path: str) -> str:
    """A model's name for a figure: of a run's `model` folder the run's."""
    folder = Path(path)
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name or path


def samples_of(given: Given) -> Sequence[Sample]:
    """Rows with their gold answers where they have a column `answer`."""
    if given.text("data") == "digits":
        size = given.value("max_rows", int, DIGITS)
        if size < 1:
            raise RecipeError(f"max_rows is {size}. It must be at least 1.")
        return Digits(split=given.value("split", Any, "test"), size=size)
    rows = rows_of(given)
    return [
        dataclasses.replace(row, answer=str(row.columns.get("answer", row.answer)))
        for row in (rows[place] for place in range(len(rows)))
    ]


def trigger_of(generator: Generator) -> str:
    """The trigger of what the model was trained with, else the tag that it knows as a token, else
    `<back>`."""
    assert generator.reattention is not None
    if generator.reattention.trigger:
        return generator.reattention.trigger
    known = special_id(generator.policy, "<REFLECTION>") is not None
    return "<REFLECTION>" if known else "<back>"


def look(
    generator: Generator,
    name: str,
    samples: Sequence[Sample],
    asked: Asked,
    controls: Sequence[Control] = (),
    batch: int = 16,
) -> Looked:
    """Answers to all rows, their attention, and the controls."""
    assert generator.instruction is not None
    policy = generator.policy
    rollouts = list(generator.answers(samples, batch=batch))
    left_out: dict[str, int] = {}
    note = _noting(left_out)
    readings = list(read_answers(policy, rollouts, **asked.settings, skipped=note("attention")))
    removed: list[Removed] = []
    spliced: list[Spliced] = []
    if "removal" in controls:
        told = note("removal")
        removed = list(removal(policy, rollouts, generator.instruction, tags=asked.tags, skipped=told))
    if "splice" in controls:
        form = form_of(rollouts)
        begun = list(starts(samples, form))
        spliced = repairs(generator, begun, "CONCLUSION" if form == "qwen_la" else "boxed", batch)
        if len(begun) < len(samples):
            left_out["splice: no wrong beginning"] = len(samples) - len(begun)
    return Looked(
        name=name,
        reattention=described(generator.reattention),
        readings=readings,
        removed=removed,
        spliced=spliced,
        hallucination=digits_by_length(rollouts),
        left_out=left_out,
    )


def form_of(rollouts: Sequence[Rollout]) -> Form:
    """How most of these answers begin and go on."""
    texts = [rollout.text for rollout in rollouts]
    if 2 * sum("<SUMMARY>" in text for text in texts) > len(texts):
        return "qwen_la"
    return "back" if 2 * sum("<back>" in text for text in texts) > len(texts) else "think"


def digits_by_length(rollouts: Iterable[Rollout]) -> list[AtLength]:
    """CHAIR-i and recall on pages of digits; an object is a digit at a place. CHAIR-i is over all of the
    page, recall over the places that the question is about."""
    captions = []
    for rollout in rollouts:
        facts = rollout.prompt.sample.columns
        if facts.get("digits") is None or facts.get("looks") is None:
            continue
        there = {
            place: f"{PLACES[place]} {digit}"
            for place, digit in enumerate(facts["digits"])
            if digit is not None
        }
        asked = {there[place] for place in facts["looks"] if place in there}
        captions.append(
            Caption(text=rollout.text, objects=set(there.values()), asked=asked, offsets=rollout.offsets)
        )
    return by_length(captions, digits_named, steps(captions)) if captions else []


def digits_named(text: str) -> list[str]:
    """Digits that a text says stand at a place: "upper left 7"."""
    return [f"{PLACES[one.place]} {one.digit}" for one in mentions(text) if one.digit is not None]


# -- what is written ------------------------------------------------------------------------------


def save_many(found: Sequence[Looked], out: Path, width: int, title: str) -> list[Path]:
    steps_of = {one.name: by_step(one.readings, width) for one in found}
    parts = {one.name: by_part(one.readings) for one in found}
    files = save_figure(length_figure(steps_of, f"attention to visual tokens\n{title}"), out, "lengths")
    files += save_figure(parts_figure(parts, title), out, "parts")
    hallucination = {
        one.name: [dataclasses.asdict(row) for row in one.hallucination] for one in found if one.hallucination
    }
    if hallucination:
        files += save_figure(hallucination_figure(hallucination, title), out, "hallucination")
    files.append(
        save_csv(
            [{"way": name} | row for name, rows in steps_of.items() for row in rows], out / "lengths.csv"
        )
    )
    files.append(save_csv([row for one in found for row in _answer_rows(one)], out / "answers.csv"))
    files.append(save_json({one.name: numbers(one, width) for one in found}, out / "attention.json"))
    return files


def _answer_rows(one: Looked) -> list[dict[str, Any]]:
    rows = []
    for reading in one.readings:
        parts = by_part([reading])
        row: dict[str, Any] = {"way": one.name, "id": reading.id, "blocks": reading.blocks}
        for part, values in parts.items():
            row |= {f"{part}_{name}": value for name, value in values.items() if name != "answers"}
        rows.append(row | {"text": reading.text})
    return rows


def _noting(left_out: dict[str, int]) -> Callable[[str], Callable[[Rollout, str], None]]:
    def of(what: str) -> Callable[[Rollout, str], None]:
        def note(rollout: Rollout, why: str) -> None:
            reason = (
                f"{what}: {' '.join(why.replace(f'Row {rollout.prompt.sample.id!r}', 'the row').split())}"
            )
            left_out[reason] = left_out.get(reason, 0) + 1

        return note

    return of
