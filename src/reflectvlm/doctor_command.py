"""`reflectvlm doctor recipe=…`: the checks that a run makes at its start, alone.

Nothing is trained, no stage is run and no run folder is made. A stage that has been made is used; where one
has not, the checks look at what it starts from, and say so: its model has the same tokenizer, instruction
and rewards before and it after it.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from reflectvlm import stages
from reflectvlm.building import SOURCES, Runnable, completed, draft_of, record
from reflectvlm.chain import _NODES, Chain, Source, _sources
from reflectvlm.config import STAGES, Composed, compose, short_name
from reflectvlm.models.adapters import adapter_layers, stored
from reflectvlm.train.checks import lines, run_checks, summary
from reflectvlm.train.checks_result import Result


def doctor(recipe: str, overrides: Sequence[str]) -> int:
    """Prints what the checks found. 0 if none failed, else 1; raises RecipeError for wrong words."""
    composed = compose(recipe, overrides)
    chain = Chain(told=composed.values.get(STAGES) or {})
    chain.check(composed)
    draft = draft_of(composed.values, slow=True)
    values, missing = _resolved(chain, composed)
    print(f"{_title(draft)}\n{machine()}")
    for source in missing:
        print(_note(source, values))
    trainer = completed(draft, _stand_in(chain, values, missing), record(recipe, composed.values), composed)
    results = [disk(trainer), *_checked(trainer, missing)]
    print("\n".join(lines(results)))
    print(summary(results))
    return int(any(result.status == "failed" for result in results))


def machine() -> str:
    """One line: what the run would run on."""
    parts = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        device = f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    else:
        device = "no GPU"
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    return f"python {platform.python_version()}, {', '.join(parts)}; {device}; {threads}"


def disk(trainer: Runnable) -> Result:
    """Whether output.root can be written, and has room for what a run keeps there."""
    root = Path(trainer.output.root).expanduser().absolute()
    exists = next(folder for folder in (root, *root.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=exists):
            pass
    except OSError as error:
        what = f"nothing can be written to {exists}: {error.strerror or error}"
        return Result("disk", "failed", what, "Give root=… a folder that can be written.")
    free, one = shutil.disk_usage(exists).free, _checkpoint(trainer)
    wanted = one * (trainer.output.keep + 2)  # one more while it is written, and the model at the end
    found = f"{root} can be written, {_size(free)} free"
    if not one or free >= wanted:
        return Result("disk", "ok", f"{found}; a checkpoint is about {_size(one)}" if one else found)
    return Result(
        "disk",
        "failed" if free < one else "warning",
        f"{found}, but {trainer.output.keep} checkpoints of about {_size(one)}, one being written and the "
        f"model need {_size(wanted)}",
        "Make room, give another root=…, or keep=1.",
    )


def _checkpoint(trainer: Runnable) -> int:
    """Bytes of a checkpoint's weights and of AdamW's two moments of those that train; 0 for a run without."""
    if not hasattr(trainer, "optimizer"):
        return 0
    module = trainer.policy.module
    parameters = list(module.parameters())
    moments = sum(2 * one.numel() * one.element_size() for one in parameters if one.requires_grad)
    # A tied matrix stands twice in what is stored and once in memory.
    kept = stored(module).values() if adapter_layers(module) else parameters
    return moments + sum(one.numel() * one.element_size() for one in kept)


def _size(number: float) -> str:
    if number < 2**30:
        return f"{number / 2**20:,.0f} MiB"
    return f"{number / 2**30:,.1f} GiB"


def _title(draft: Runnable) -> str:
    return f"doctor: {'-'.join(part for part in (draft.name, draft.variant) if part)}"


def _checked(trainer: Runnable, missing: Sequence[Source]) -> list[Result]:
    results = run_checks(trainer)
    rows = next((one for one in missing if one.key == "data_from"), None)
    if rows is None or results[0].status != "failed":
        return results
    # The questions need not have what the rows that come of them will have.
    what = f"made by {short_name(rows.recipe)}, which has not run"
    return [Result("rows", "not applicable", what), *results[1:]]


# -- stages ---------------------------------------------------------------------------------------


def _resolved(chain: Chain, run: Composed) -> tuple[dict[str, Any], list[Source]]:
    """The values with what their stages have made, and the stages that have made nothing yet."""
    values = {key: value for key, value in run.values.items() if key not in (*SOURCES, STAGES)}
    missing = []
    for source in _sources(run.values):
        node = _NODES[source.key]
        if (made := _found(chain, source)) is None:
            missing.append(source)
        else:
            values[node] = {**values[node], "path": str(made)}
    return values, missing


def _found(chain: Chain, source: Source) -> Path | None:
    """What a stage has made, if it has; like `Chain.model` and `Chain.rows`, which would make it."""
    stage = chain.stage(source.recipe, source.overrides)
    values, missing = _resolved(chain, stage)
    if missing:
        return None
    rows = Path(values["data"]["path"]) if stage.values.get("data_from") else None
    folder = stages.stages_folder() / stages.stage_name(source.recipe, values, rows)
    find = stages.finished_model if source.key == "start_from" else stages.finished_rows
    return find(folder)


def _stand_in(chain: Chain, values: Mapping[str, Any], missing: Sequence[Source]) -> dict[str, Any]:
    """Rows that are still to be made are stood in for by the questions that they will be made of."""
    changed = dict(values)
    for source in missing:
        if source.key == "data_from":
            changed["data"] = _questions(chain, source)
    return changed


def _questions(chain: Chain, source: Source) -> Any:
    stage = chain.stage(source.recipe, source.overrides)
    before = next((one for one in _sources(stage.values) if one.key == "data_from"), None)
    return stage.values["data"] if before is None else _questions(chain, before)


def _note(source: Source, values: Mapping[str, Any]) -> str:
    name = short_name(source.recipe)
    if source.key == "start_from":
        instead = f"its own start, policy.path={values['policy'].get('path')!r}, is checked in its place"
    else:
        instead = "the rows that it asks are checked in place of those it will make"
    return f"{source.key}: {name} has not been made yet (`train` makes it first); {instead}"
