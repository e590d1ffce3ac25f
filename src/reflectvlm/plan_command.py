"""`reflectvlm plan recipe=… gpus=8 gpu=80GB`: what a recipe needs, before anything is loaded. `docs/plan.md`.

Exit code 0 if it fits, 1 if it does not; then the largest part is named and the setting that would do.
Lengths are the recipe's limits, every row as long as it may be, unless prompt=, answer= and visual= say what
is usual.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from reflectvlm.planning.cards import GIB, Card, card, like
from reflectvlm.planning.job import Job
from reflectvlm.planning.memory import Moment, peak, predict
from reflectvlm.planning.passes import largest_pass, number_of_passes
from reflectvlm.planning.recipe import Lengths, job_of
from reflectvlm.planning.seconds import Seconds, seconds, tokens
from reflectvlm.planning.states import counts, held
from reflectvlm.planning.verdict import Remedy, remedy
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.table import Table, say

OWN = ("gpus", "gpu", "prompt", "answer", "visual")
"""Keys that are no recipe's."""
ELSEWHERE = ("nodes", "node_rank", "processes", "main_address", "main_port")
"""Those that start processes."""
NOT_FITTING = 1
ERROR = 0.15
"""How far a prediction may be off (docs/plan.md)."""
JSON = "--json"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the words after `plan` say beside the recipe and its overrides."""

    gpus: int = 1
    gpu: str = "80GB"
    lengths: Lengths = field(default_factory=Lengths)
    as_json: bool = False

    @classmethod
    def read(cls, words: Sequence[str]) -> tuple[Asked, list[str]]:
        """Its own words, and all others."""
        given: dict[str, str] = {}
        rest = []
        for word in words:
            key, equals, value = word.partition("=")
            if equals and key in ELSEWHERE:
                raise RecipeError(f"plan takes no {key}: it counts all GPUs of all machines. Write gpus=16.")
            if equals and key in OWN:
                given[key] = value
            elif word != JSON:
                rest.append(word)
        numbers = {key: _number(key, value) for key, value in given.items() if key != "gpu"}
        gpus = numbers.pop("gpus", 1)
        asked = cls(
            gpus=gpus,
            gpu=given.get("gpu", cls.gpu),
            lengths=Lengths(**numbers),
            as_json=JSON in words,
        )
        return asked, rest


@dataclass(frozen=True, kw_only=True)
class Plan:
    job: Job
    card: Card
    moments: Sequence[Moment]
    seconds: Seconds
    remedy: Remedy | None
    """Settings that would make it fit; None where it fits, or where nothing does."""

    @property
    def peak(self) -> Moment:
        return peak(self.moments)

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.card.memory


def planned(job: Job, on: Card) -> Plan:
    moments = predict(job)
    fits = peak(moments).total <= on.memory
    return Plan(
        job=job,
        card=on,
        moments=moments,
        seconds=seconds(job, on),
        remedy=None if fits else remedy(job, on.memory),
    )


def plan(recipe: str, overrides: Sequence[str], asked: Asked) -> int:
    """Prints the plan; returns the exit code."""
    from reflectvlm.config import compose

    on = card(asked.gpu)
    try:
        job = job_of(compose(recipe, overrides).values, asked.gpus, asked.lengths)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    made = planned(job, on)
    if asked.as_json:
        say(json.dumps(as_json(made)))
    else:
        show(recipe, made)
    return 0 if made.fits else NOT_FITTING


# -- what is said ---------------------------------------------------------------------------------------


def show(recipe: str, made: Plan) -> None:
    for line in about(recipe, made):
        say(line)
    memory_table(made).show()
    seconds_table(made).show()
    for line in verdict(made):
        say(line)


def about(recipe: str, made: Plan) -> list[str]:
    """What is planned: model, lengths, passes."""
    job, load, compute = made.job, made.job.load, made.job.compute
    found = counts(job)
    one = largest_pass(job)
    work = f"{load.prompts} prompts x {load.group} answers" if load.kind != "sft" else f"{load.prompts} rows"
    lines = [
        f"plan: {recipe} on {compute.world} x {made.card.name}, compute={compute.kind}",
        f"model: {job.shape.parameters:,} parameters"
        + (f", {found.trains:,} train" if load.kind != "distill" else ", none trains"),
        f"a process's step: {work}, each prompt {load.prompt} tokens ({load.visual} visual), "
        f"answer {load.answer}" + (f" and {load.inserted} put in" if load.inserted else ""),
    ]
    if load.kind != "distill":
        lines.append(
            f"an update: {load.updates} x {number_of_passes(job)} passes of at most {one.tokens} tokens, "
            f"attention {one.kind}"
        )
    return lines


def memory_table(made: Plan) -> Table:
    """GiB by part: of the fullest instant of each phase."""
    phases = dict.fromkeys(moment.phase for moment in made.moments)
    fullest = {phase: peak([m for m in made.moments if m.phase == phase]) for phase in phases}
    drawn = Table("Memory of one GPU, GiB", ("part", *fullest))
    parts = dict.fromkeys(part for moment in fullest.values() for part in moment.parts)
    for part in parts:
        drawn.add(part, *(_gib(moment.parts.get(part, 0.0)) for moment in fullest.values()))
    drawn.add("total", *(_gib(moment.total) for moment in fullest.values()))
    drawn.add("fullest at", *(moment.name for moment in fullest.values()))
    return drawn


def seconds_table(made: Plan) -> Table:
    drawn = Table("Seconds of a step, rough", ("part", "seconds"))
    for name, value in asdict(made.seconds).items():
        if value:
            drawn.add(name, _rough(value))
    drawn.add("step", _rough(made.seconds.step))
    return drawn


def verdict(made: Plan) -> list[str]:
    """Fits or not, what with, and how fast."""
    top, memory = made.peak, made.card.memory
    lines = []
    if made.card.assumed:
        lines.append(f"Seconds assume the rates of an {like(made.card)}; gpu=NAME takes those of a card.")
    if offloaded := held(made.job).offloaded:
        lines.append(f"The host holds {_gib(offloaded)} GiB for each process.")
    rate = tokens(made.job) * made.job.compute.world / made.seconds.step
    lines.append(f"About {rate:,.0f} tokens of answers a second on all GPUs.")
    if made.fits:
        lines.append(
            f"fits: {_gib(top.total)} of {_gib(memory)} GiB at the fullest ({top.phase}, {top.name}), "
            f"{_gib(memory - top.total)} to spare" + _tight(top, memory)
        )
        return lines
    lines.append(
        f"DOES NOT FIT: {_gib(top.total)} GiB at the fullest ({top.phase}, {top.name}), the card has "
        f"{_gib(memory)}. The largest part is {top.largest}, {_gib(top.parts[top.largest])} GiB."
    )
    if made.remedy is None:
        lines.append("No setting of those tried makes it fit: take a smaller model, larger or more GPUs.")
    else:
        settings = " ".join(_quoted(one) for one in made.remedy.settings)
        tight = _tight(made.remedy.peak, memory)
        lines.append(f"It would fit with {settings}: {_gib(made.remedy.peak.total)} GiB{tight}.")
    return lines


def _tight(top: Moment, memory: float) -> str:
    if top.total * (1 + ERROR) <= memory:
        return ""
    return f"; tight, for a plan may be {ERROR:.0%} too low"


def as_json(made: Plan) -> dict[str, Any]:
    """All of it as plain values; bytes and seconds."""
    job = made.job
    return {
        "fits": made.fits,
        "gpu": asdict(made.card),
        "parameters": job.shape.parameters,
        "trained": counts(job).trains if job.load.kind != "distill" else 0,
        "load": asdict(job.load),
        "compute": asdict(job.compute),
        "passes": number_of_passes(job),
        "peak": _moment(made.peak),
        "moments": [_moment(moment) for moment in made.moments],
        "offloaded": held(job).offloaded,
        "seconds": asdict(made.seconds) | {"step": made.seconds.step},
        "remedy": None
        if made.remedy is None
        else {"settings": list(made.remedy.settings), "peak": _moment(made.remedy.peak)},
    }


def _moment(moment: Moment) -> dict[str, Any]:
    return {
        "phase": moment.phase,
        "name": moment.name,
        "total": round(moment.total),
        "parts": {part: round(value) for part, value in moment.parts.items()},
    }


def _gib(value: float) -> str:
    """Two digits where it is little, so that no part of a small model reads 0."""
    size = value / GIB
    if not value:
        return "–"
    return f"{size:,.1f}" if size >= 10 else f"{size:.2f}" if size >= 0.01 else f"{size:.1g}"


def _rough(seconds: float) -> str:
    """Two digits: there is no more in it."""
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _quoted(setting: str) -> str:
    return f"'{setting}'" if " " in setting else setting


def _number(key: str, value: str) -> int:
    if not value.isascii() or not value.isdigit() or (int(value) < 1 and key != "visual"):
        raise RecipeError(f"{key} is {value!r}. It must be a whole number, 1 or more.")
    return int(value)
