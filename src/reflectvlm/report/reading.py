"""A run's folder as the report needs it: curves, the table, settings, rollouts.

Reads what there is: an unfinished run has no table, an old one no tokens, a line that a kill has cut is
passed over. Left out: checkpoints and dumps (`reflectvlm inspect`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reflectvlm.recipe_check import RecipeError, nearest
from reflectvlm.train.plots import Series, read_series
from reflectvlm.train.run_folder import RunFolder

DEFAULT_TAG = "<back>"


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """One line of `samples.jsonl`, with every field of the kind that it should have."""

    step: int
    sample: str
    question: str
    gold: str
    text: str
    reward: float | None
    parts: Mapping[str, float | None]
    scored: bool
    stop: str
    length: int
    version: int
    held_out: bool
    """It belongs to an evaluation, not to a step of training."""
    images: Sequence[str] = ()
    """Digests of the sample's pictures."""
    ids: Sequence[int] = ()
    offsets: Sequence[int] = ()
    logprobs: Sequence[float | None] = ()
    blocks: Sequence[Mapping[str, Any]] = ()
    grids: Sequence[Sequence[int]] = ()

    @property
    def has_tokens(self) -> bool:
        """Whether its tokens are recorded and fit its text."""
        starts = self.offsets
        return (
            0 < len(starts) <= len(self.ids) == len(self.logprobs)
            and list(starts) == sorted(starts)
            and starts[0] >= 0
            and starts[-1] <= len(self.text)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecord:
    """All that the page says of one run."""

    path: Path
    name: str
    finished: bool
    steps: int | None
    """As many as it was asked for."""
    series: Mapping[str, Series]
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    """The recipe, dotted key -> value."""
    overrides: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    """Versions, commit, machine: what is not part of the recipe."""
    answers: Sequence[Answer] = ()

    @property
    def tag(self) -> str:
        """The tag whose absence the page can look for."""
        keys = ("tag", "test.tag", "evaluation.tag")
        return next((self.settings[key] for key in keys if self.settings.get(key)), DEFAULT_TAG)

    @property
    def pictures(self) -> Path:
        return RunFolder(self.path).sample_images


def read_run(path: Path) -> RunRecord:
    """Everything of a run's folder. Raises RecipeError if it is none."""
    folder = RunFolder(path)
    if not any(file.is_file() for file in (folder.metrics, folder.samples, folder.summary)):
        raise RecipeError(_no_run(path))
    summary = _object(folder.summary)
    settings = _settings(folder.recipe)
    steps: Any = settings.get("steps") or _object(path / "card.json").get("steps") or summary.get("steps")
    return RunRecord(
        path=path,
        name=path.resolve().name,
        finished=folder.finished,
        steps=int(steps) if str(steps).isdigit() else None,
        series=read_series(folder.metrics),
        before=_numbers(summary.get("before")),
        after=_numbers(summary.get("after")),
        settings=settings,
        overrides=_lines(path / "overrides.txt"),
        facts=_facts(_object(path / "environment.json"), _object(path / "git.json")),
        answers=list(_answers(folder.samples)),
    )


def _no_run(path: Path) -> str:
    if not path.exists():
        near = (
            nearest(path.name, [one.name for one in path.parent.iterdir()]) if path.parent.is_dir() else None
        )
        hint = f" Did you mean {str(path.parent / near)!r}?" if near else ""
        return f"{str(path)!r} does not exist.{hint}"
    return (
        f"{str(path)!r} is no run's folder: it has none of metrics.jsonl, samples.jsonl and summary.json. "
        "Give a folder that training has made, e.g. runs/NAME."
    )


# -- rollouts -----------------------------------------------------------------------------------------


def _answers(file: Path) -> Iterator[Answer]:
    rows = list(_rows(file))
    tested = {row.get("sample") for row in rows if row["step"] == 0}  # no training step is number 0
    for row in rows:
        group = row.get("group")
        held_out = group == 1 if group is not None else row.get("sample") in tested
        yield _answer(row, held_out)


def _answer(row: Mapping[str, Any], held_out: bool) -> Answer:
    parts = row.get("parts")
    return Answer(
        step=row["step"],
        sample=_text(row.get("sample")),
        question=_text(row.get("question")),
        gold=_text(row.get("answer")),
        text=_text(row.get("text")),
        reward=_number(row.get("reward")),
        parts={str(k): _number(v) for k, v in parts.items()} if isinstance(parts, dict) else {},
        scored=row.get("scored") is not False,
        stop=_text(row.get("stop")),
        length=_whole(row.get("length")),
        version=_whole(row.get("policy_version")),
        held_out=held_out,
        images=[str(one) for one in _list(row.get("images"))],
        ids=_all(int, row.get("ids")),
        offsets=_all(int, row.get("offsets")),
        logprobs=[_number(one) for one in _list(row.get("logprobs"))],
        blocks=[one for one in _list(row.get("blocks")) if _is_block(one)],
        grids=[found for one in _list(row.get("grids")) if len(found := _all(int, one)) == 3],
    )


def _is_block(block: Any) -> bool:
    if not isinstance(block, dict) or not all(isinstance(block.get(key), int) for key in ("after", "image")):
        return False
    keep = block.get("keep")
    return keep is None or (isinstance(keep, list) and len(_all(int, keep)) == len(keep))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with file.open("rb") as stream:
        for line in stream:
            try:
                row = json.loads(line)
            except ValueError:  # a line that a kill has cut
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


# -- the rest -----------------------------------------------------------------------------------------


def _settings(file: Path) -> dict[str, str]:
    import yaml

    if not file.is_file():
        return {}
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError:  # cut by a full disk; curves and rollouts are still worth a page
        return {}
    return dict(_flat(values, "")) if isinstance(values, dict) else {}


def _flat(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    elif key != "output.recipe_yaml":
        yield key, "" if node is None else str(node)


def _facts(environment: Mapping[str, Any], git: Mapping[str, Any]) -> dict[str, str]:
    packages = environment.get("packages")
    packages = packages if isinstance(packages, dict) else {}
    devices = _list(environment.get("devices"))
    found = {
        "commit": _text(git.get("revision"))[:12] + (" with changes" if git.get("dirty") is True else ""),
        "python": _text(environment.get("python")),
        **{name: _text(packages.get(name)) for name in ("reflectvlm", "torch", "transformers")},
        "devices": ", ".join(map(str, devices)) or f"CPU, {environment.get('cpu_count', '?')} cores",
        "platform": _text(environment.get("platform")),
    }
    return {name: value for name, value in found.items() if value.strip()} if environment else {}


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        return {}
    return {str(key): value for key, one in values.items() if (value := _number(one)) is not None}


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _all(kind: type, values: Any) -> list[Any]:
    """The list, if all of its items are of the kind."""
    found = _list(values)
    return found if all(isinstance(one, kind) and not isinstance(one, bool) for one in found) else []
