"""A whole chain of recipes in one command, and the table that compares what comes of it.

    reflectvlm pipeline qwen_la seed=1

The table's rows are written down in `recipes/pipelines/<name>.yaml`: each names a recipe, whose model is
made or found in the cache like any stage (`chain.py`), and how that model is asked. All are asked the
same held-out questions, greedily. A restart goes on where it stopped: stages where they were, and rows that
had been measured are not measured again.

What all rows are made from and how they are asked is part of the pipeline's recorded recipe, files by their
content. So its folder is treated as any run's: once any of it has changed, one that is finished stays as it
is and another folder is begun, and one that is unfinished is refused. All rows of a table then belong
together, and their seconds to one machine.

Several processes (`gpus=8`) make the stages together; the first one asks the models, and the others wait.

Left out: several seeds at once (one run each) and anything but greedy answers.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from reflectvlm.building import draft_of, instantiated, record
from reflectvlm.chain import Chain
from reflectvlm.config import EVERY, OUTPUT, STAGES, Composed, compose, key_of, of_stage
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.protocols import Reattention, Reward
from reflectvlm.pulse import phase
from reflectvlm.recipe_check import RecipeError, check_recipe
from reflectvlm.recipe_files import find_pipeline
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.stages import digest_of
from reflectvlm.train.evaluate import Evaluation
from reflectvlm.train.measure import Figures, comparison, measure, share
from reflectvlm.train.ranks import Ranks
from reflectvlm.train.run import Output
from reflectvlm.train.run_folder import RunFolder
from reflectvlm.train.signals import StopRequest, agreed
from reflectvlm.train.table import say
from reflectvlm.types import Instruction

log = logging.getLogger("reflectvlm")

_OWN = ("held_out", "measures", "table", STAGES)
_OWN_OUTPUT = ("output.root", "output.resume", "output.max_minutes")
_TAGS = ("new_tags", "embeddings")
_IDENTITY = "identity"
"""The key of the recorded recipe that holds what its other keys mean on this disk."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    recipe: str
    """Whose model is asked."""
    overrides: Sequence[str] = ()
    start: bool = False
    """True: not the recipe's model but the one its `policy.path` names, before anything is trained."""
    reattention: Reattention | None = None
    """None: the recipe's own, as in its training."""
    instruction: Instruction | None = None
    """None: the recipe's own."""
    rubric: Rubric | None = None
    """None: the recipe's own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pipeline:
    """What a file of `recipes/pipelines/` describes."""

    table: Sequence[Row]
    held_out: Evaluation
    """Questions that no stage has seen."""
    measures: Mapping[str, Reward] = field(default_factory=dict)
    """What is measured beside each row's own rewards; only `hallucination` has a column of its own."""
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        names = [row.name for row in self.table]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"The table's rows are {names}. Give at least one, and each a name of its own.")


@dataclass(frozen=True, kw_only=True)
class PipelineResult:
    folder: Path
    figures: Mapping[str, Figures]
    """By the row's name."""
    finished: bool
    exit_code: int = 0


def run_pipeline(name: str, *words: str) -> PipelineResult:
    """Makes all stages of a pipeline, measures its rows and writes its table.

    `words` are overrides: `recipe:key=value` for one recipe, `key=value` for all that know the key.

    Example: `run_pipeline("qwen_la", "seed=1", "qwen_la_brpo:steps=20").figures["COPY"].accuracy`
    """
    composed = _composed(name, words)
    pipeline = _pipeline(composed)
    chain = Chain(told=composed.values[STAGES], max_minutes=pipeline.output.max_minutes)
    runs = [chain.stage(row.recipe, row.overrides) for row in pipeline.table]
    chain.check(*runs, named=True)
    identities = [chain.identity(row.recipe, row.overrides) for row in pipeline.table]
    output = pipeline.output
    ranks = Ranks.joined()
    opened = ranks.from_first(
        lambda: RunFolder.create(
            output.root,
            _folder_name(composed),
            recipe_yaml=record(
                name, {**composed.values, _IDENTITY: _identity(composed, pipeline, identities)}
            ),
            overrides=words,
            resume=output.resume,
        )
    )
    with ranks.known_lost(), opened as folder:
        if folder.finished:
            return _found(folder, ranks)
        models = [_model(chain, row, run) for row, run in zip(pipeline.table, runs, strict=True)]
        with StopRequest(output.max_minutes) as stop:
            measured = _measure_all(pipeline, runs, models, identities, folder, stop, ranks)
        if len(measured) < len(pipeline.table):
            if ranks.first:
                say(f"stopped by {stop.reason}; the same command goes on with {folder.path}")
            return PipelineResult(
                folder=folder.path, figures=measured, finished=False, exit_code=stop.exit_code
            )
        return _end(pipeline, composed, models, identities, measured, folder, ranks)


# -- what was asked for ---------------------------------------------------------------------------


def _composed(name: str, words: Sequence[str]) -> Composed:
    """The pipeline's file with its own overrides; those for recipes are in its node `stages`."""
    every = [word for word in words if not of_stage(word) and not _is_own(word)]
    composed = compose(str(find_pipeline(name)), [word for word in words if word not in every])
    told = dict(composed.values.get(STAGES) or {})
    told[EVERY] = [*(told.get(EVERY) or ()), *every]
    values = {key: value for key, value in composed.values.items() if key != _IDENTITY}
    return replace(composed, overrides=tuple(words), values={**values, STAGES: told})


def _is_own(word: str) -> bool:
    key = key_of(word)
    return key in _OWN_OUTPUT or key.split(".")[0] in _OWN


def _pipeline(composed: Composed) -> Pipeline:
    values = {key: value for key, value in composed.values.items() if key != STAGES}
    values["_target_"] = f"{__name__}.Pipeline"
    rows = values.get("table") or []
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise RecipeError(f"table is {rows!r}. Write a list of {{name: …, recipe: …}}.")
    values["table"] = [{"_target_": f"{__name__}.Row", **row} for row in rows]
    values["output"] = {"_target_": OUTPUT, "resume": "auto", **(values.get("output") or {})}
    check_recipe(values)
    pipeline = instantiated(values, "")
    assert isinstance(pipeline, Pipeline)
    return pipeline


def _identity(composed: Composed, pipeline: Pipeline, identities: Sequence[str]) -> dict[str, Any]:
    """What makes two tables comparable: how is asked, and what each row's model is made from."""
    asked = {key: composed.values.get(key) for key in ("held_out", "measures")}
    rows = [
        {key: value for key, value in row.items() if key not in ("name", "recipe", "overrides")}
        for row in composed.values["table"]
    ]
    models = {row.name: identity for row, identity in zip(pipeline.table, identities, strict=True)}
    return {"asked": digest_of([asked, rows]), "models": models}


def _folder_name(composed: Composed) -> str:
    """`pipeline-qwen_la`, and what was asked for beside: `pipeline-qwen_la-seed-1`."""
    asked = [word for word in composed.overrides if of_stage(word) or not key_of(word).startswith("output.")]
    words = [re.sub(r"[^\w.+-]+", "-", word) for word in asked]
    text = "-".join(["pipeline", Path(composed.recipe).stem, *words])
    return text if len(text) <= 100 else f"{text[:80]}-{sha256(text.encode()).hexdigest()[:8]}"


# -- making and measuring -------------------------------------------------------------------------


def _model(chain: Chain, row: Row, run: Composed) -> str:
    """Where the model of a row is, made if it is not there."""
    if row.start:
        return str(run.values["policy"]["path"])
    return str(chain.model(row.recipe, row.overrides))


def _measure_all(
    pipeline: Pipeline,
    runs: Sequence[Composed],
    models: Sequence[str],
    identities: Sequence[str],
    folder: RunFolder,
    stop: StopRequest,
    ranks: Ranks,
) -> dict[str, Figures]:
    """Row after row; each is written down once it is measured."""
    file = folder.path / "measured.jsonl"
    before = ranks.from_first(lambda: _measured(file))
    figures: dict[str, Figures] = {}
    for row, run, model, identity in zip(pipeline.table, runs, models, identities, strict=True):
        if agreed(ranks, stop):
            break
        if (known := before.get((row.name, model, identity))) is None:
            try:
                with abandonable(lambda: stop.requested, alone=ranks.world == 1), phase("evaluation"):
                    known = _asked(pipeline, row, run.values, model, ranks)
            except Abandoned:
                agreed(ranks, stop)
                break  # this row is measured anew by the next start
            line = {"row": row.name, "model": model, "identity": identity, **asdict(known)}
            if ranks.first:
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(line) + "\n")
            log.info("%s: accuracy %s in %.0f s", row.name, share(known.accuracy), known.seconds)
        figures[row.name] = known
    return figures


def _measured(file: Path) -> dict[tuple[str, str, str], Figures]:
    """What an earlier process has measured, by row, model and what it is made from; a line that a kill has
    cut is dropped."""
    if not file.is_file():
        return {}
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(file, len(whole))  # never written anew: a kill between would leave nothing
    entries = [json.loads(line) for line in whole.splitlines()]
    keys = [(entry.pop("row"), entry.pop("model"), entry.pop("identity")) for entry in entries]
    return {key: Figures(**entry) for key, entry in zip(keys, entries, strict=True)}


def _asked(pipeline: Pipeline, row: Row, values: Mapping[str, Any], model: str, ranks: Ranks) -> Figures:
    """What the answers of a row's model come to."""
    # What nobody has trained has no tags of ours, and must not be able to say them.
    node = {key: value for key, value in values["policy"].items() if not (row.start and key in _TAGS)}
    loaded: list[Any] = []

    def load() -> None:
        loaded.extend((instantiated({**node, "path": model}, "policy"), draft_of(values, slow=False)))

    ranks.together(load)  # one that cannot is no reason for the others to wait
    policy, trained = loaded
    instruction = row.instruction or trained.instruction
    return measure(
        policy,
        pipeline.held_out,
        row.rubric or trained.rubric,
        instruction if isinstance(instruction, Instruction) else instruction[0],
        row.reattention or trained.reattention,
        pipeline.measures,
        trained.engine,
        ranks,
    )


# -- the table ------------------------------------------------------------------------------------


def _end(
    pipeline: Pipeline,
    composed: Composed,
    models: Sequence[str],
    identities: Sequence[str],
    figures: Mapping[str, Figures],
    folder: RunFolder,
    ranks: Ranks,
) -> PipelineResult:
    count = next(iter(figures.values())).answers
    drawn = comparison(f"{folder.path.name}: {count:,} held-out answers, greedy", figures)
    rows = [
        {"name": row.name, "recipe": row.recipe, "overrides": list(row.overrides)}
        | {"model": model, "identity": identity}
        | asdict(figures[row.name])
        for row, model, identity in zip(pipeline.table, models, identities, strict=True)
    ]
    command = shlex.join(["reflectvlm", "pipeline", Path(composed.recipe).stem, *composed.overrides])
    legend = (
        f"`{command}`. Length: sampled tokens per answer. Inserted: tokens that re-attention put in per "
        "answer. Seconds: to generate all answers, after a short warm-up.\n"
    )
    if ranks.first:
        folder.write_summary({"command": command, "rows": rows}, f"{drawn.markdown}\n{legend}")
        drawn.show()
        say(f"table and figures are in {folder.path}")
    ranks.barrier()
    return PipelineResult(folder=folder.path, figures=figures, finished=True)


def _found(folder: RunFolder, ranks: Ranks) -> PipelineResult:
    """The result of a pipeline that had already ended."""
    rows = json.loads(folder.summary.read_text(encoding="utf-8"))["rows"]
    names = [one.name for one in fields(Figures)]
    figures = {row["name"]: Figures(**{name: row[name] for name in names if name in row}) for row in rows}
    if ranks.first:
        comparison(f"{folder.path.name}: finished; nothing to do", figures).show()
    return PipelineResult(folder=folder.path, figures=figures, finished=True)
