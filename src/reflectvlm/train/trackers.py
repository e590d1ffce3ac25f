"""Where metrics and samples go: files, TensorBoard, Weights & Biases, or several at once.

All satisfy `protocols.Tracker`; the live view of a terminal is in `console.py`. Values are flat:
`{"reward/accuracy": 0.5, "loss": 0.1, "time/step": 1.2}`. Keys under `time/` are the only ones that
may differ between two runs of one recipe and seed. What is written of rollouts is in `written.py`. Left
out: plots (`plots.py`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TextIO, cast

from reflectvlm.protocols import Tracker
from reflectvlm.train.tracker_thread import Lane
from reflectvlm.train.written import Pictures, sample_rows
from reflectvlm.types import ScoredGroup

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

_FILES = ("metrics.jsonl", "samples.jsonl")
_LAST_CALLS = 120.0
"""Seconds that a tracker in the background has for what it still owes when a run ends."""


@dataclass
class Trackers:
    """Several trackers as one. What one of them raises is reported, with its name; one that fails
    `patience` times in a row is dropped. No dashboard ever stops a run, and none is lost to a hiccup.

    A tracker with an attribute `may_stall` that is true is called in a thread of its own, in order, and no
    step waits for it; what it cannot keep up with is left out, told and counted.
    """

    trackers: tuple[Tracker, ...]
    patience: int = 5
    _live: list[Tracker] = field(init=False, repr=False)
    _failures: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    """By the tracker's place: failures since it last worked."""
    _lanes: dict[int, Lane] = field(default_factory=dict, init=False, repr=False)
    """By its place: the thread of a tracker that may stall."""
    _lost: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    """By its place: calls that it could not keep up with."""

    def __post_init__(self) -> None:
        self._live = list(self.trackers)

    def start(self, card: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.start(card))

    def metrics(self, step: int, values: Mapping[str, float | int]) -> None:
        values = dict(values)  # a thread may read them later
        self._each(lambda tracker: tracker.metrics(step, values))

    def rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        self._each(lambda tracker: tracker.rollouts(step, groups))

    def truncate_after(self, step: int) -> None:
        """Before `start` of a resumed run: trackers that can, forget what came after `step`."""
        for tracker in list(self._live):
            rewind = getattr(tracker, "truncate_after", None)
            if rewind is not None:
                self._one(tracker, partial(_rewind, rewind, step))

    def close(self) -> None:
        """Also waits, two minutes at most, for what trackers in the background still have to do."""
        for tracker in self.trackers:
            lane = self._lanes.pop(self._place(tracker), None)
            last = partial(self._unless_dropped, tracker, lambda tracker: tracker.close())
            if lane is None:
                last()
            elif not lane.close(last, _LAST_CALLS):
                logger.warning(
                    "Tracker %s had not finished %d seconds after the run, and is left alone.",
                    type(tracker).__name__, _LAST_CALLS,
                )  # fmt: skip
            if lost := self._lost.pop(self._place(tracker), 0):
                logger.warning("Tracker %s lacks %d calls of this run.", type(tracker).__name__, lost)

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._live):
            self._one(tracker, call)

    def _one(self, tracker: Tracker, call: Callable[[Tracker], None]) -> None:
        if not getattr(tracker, "may_stall", False):
            self._now(tracker, call)
            return
        place, name = self._place(tracker), type(tracker).__name__
        if place not in self._lanes:
            self._lanes[place] = Lane(name)
        if not self._lanes[place].put(partial(self._unless_dropped, tracker, call)):
            self._lost[place] = self._lost.get(place, 0) + 1
            if self._lost[place] == 1:
                logger.warning(
                    "Tracker %s is slower than the run; what it cannot keep up with is left out.", name
                )

    def _unless_dropped(self, tracker: Tracker, call: Callable[[Tracker], None]) -> None:
        if any(one is tracker for one in self._live):
            self._now(tracker, call)

    def _place(self, tracker: Tracker) -> int:
        return next(i for i, one in enumerate(self.trackers) if one is tracker)

    def _now(self, tracker: Tracker, call: Callable[[Tracker], None]) -> None:
        place = self._place(tracker)
        try:
            call(tracker)
        except Exception as error:  # noqa: BLE001  boundary: what a tracker does is not the training's affair
            failures = self._failures[place] = self._failures.get(place, 0) + 1
            self._tell(type(tracker).__name__, failures, error)
            if failures >= self.patience:
                self._live.remove(tracker)
                with contextlib.suppress(Exception):
                    tracker.close()
        else:
            self._failures[place] = 0

    def _tell(self, name: str, failures: int, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if failures >= self.patience:
            logger.warning(
                "Tracker %s failed %d times in a row and is dropped; training goes on. %s",
                name, failures, reason,
            )  # fmt: skip
        elif failures == 1:
            logger.warning(
                "Tracker %s failed; training goes on, and it is tried again. %s", name, reason, exc_info=True
            )


@dataclass
class JsonLines:
    """`metrics.jsonl` and `samples.jsonl` in a folder, one flushed line at a time, and `card.json`.

    A number that is not finite becomes null. Floats are written so that they read back exactly.
    Images appear as a sha256 of their pixels; small copies are kept beside them on request.
    """

    folder: Path
    samples_per_step: int = 4
    """Most rollouts written at a step: best and worst of the first groups."""
    held_out_answers: int | None = None
    """Most answers of an evaluation written; None for as many as of a step."""
    pictures: Pictures | None = None
    """Keeps small copies of the pictures of what is written."""
    _files: dict[str, TextIO] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        if self.samples_per_step < 0:
            raise ValueError(f"JsonLines.samples_per_step is {self.samples_per_step}. It must be 0 or more.")
        if self.held_out_answers is not None and self.held_out_answers < 0:
            raise ValueError(f"JsonLines.held_out_answers is {self.held_out_answers}. It must be 0 or more.")

    def start(self, card: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(finite(card), indent=2, default=str, ensure_ascii=False)
        (self.folder / "card.json").write_text(text + "\n", encoding="utf-8")

    def metrics(self, step: int, values: Mapping[str, float | int]) -> None:
        self._append("metrics.jsonl", step, {key: float(value) for key, value in values.items()})

    def rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        most = self.samples_per_step, self.held_out_answers
        for row in sample_rows(groups, *most):
            self._append("samples.jsonl", step, row)
        if self.pictures is not None:
            self.pictures.keep(groups, *most)

    def truncate_after(self, step: int) -> None:
        """Drop all lines of later steps, and a last line that a kill has cut."""
        self.close()
        for name in _FILES:
            _keep_lines(self.folder / name, lambda row: row["step"] <= step)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, for a checkpoint."""
        return {name: path.stat().st_size for name in _FILES if (path := self.folder / name).exists()}

    def truncate_to(self, sizes: Mapping[str, int]) -> None:
        """Drop what was written after `sizes` were taken, of the last step too."""
        self.close()
        for name in _FILES:
            path, size = self.folder / name, sizes.get(name, 0)
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _append(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        if name not in self._files:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / name
            _keep_lines(path, lambda _: True)
            self._files[name] = path.open("a", encoding="utf-8")
        file = self._files[name]
        line = {"step": step} | dict(row) | {"step": step}  # first in the line, and never another's
        file.write(json.dumps(finite(line), ensure_ascii=False) + "\n")
        file.flush()


@dataclass
class TensorBoard:
    """Event files for TensorBoard; sample texts under its Text tab."""

    folder: Path
    samples_per_step: int = 2
    _purge: int | None = field(default=None, init=False, repr=False)
    _writer: SummaryWriter | None = field(default=None, init=False, repr=False)

    def start(self, card: Mapping[str, Any]) -> None:
        text = json.dumps(finite(card), indent=2, default=str)
        self._open().add_text("card", _indented(text), 0)

    def metrics(self, step: int, values: Mapping[str, float | int]) -> None:
        writer = self._open()
        for key, value in values.items():
            writer.add_scalar(key, float(value), step)
        writer.flush()

    def rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        writer = self._open()
        for index, row in enumerate(sample_rows(groups, self.samples_per_step)):
            head = f"sample {row['sample']} · reward {row['reward']} · stop {row['stop']}"
            writer.add_text(f"samples/{index}", f"{head}\n\n{_indented(row['text'])}", step)

    def truncate_after(self, step: int) -> None:
        """Points of later steps are hidden once the resumed run writes."""
        self.close()
        self._purge = step + 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=self._purge)
        return self._writer


@dataclass
class Wandb:
    """Weights & Biases, an optional extra. `mode="offline"` writes files only and needs no account.

    A resumed run continues the curve of the same `id`; steps that were already logged stay.
    """

    may_stall: ClassVar[bool] = True
    project: str = "reflectvlm"
    mode: str = "online"
    """`"online"`, `"offline"` or `"disabled"`."""
    name: str | None = None
    id: str | None = None
    folder: Path | None = None
    """Where its own files go; by default the current folder."""
    samples_per_step: int = 4
    _run: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        modes = ("online", "offline", "disabled")
        if self.mode not in modes:
            raise ValueError(f"Wandb.mode is {self.mode!r}. It must be one of {', '.join(modes)}.")
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(  # the recipe asks for it: what a user wrote
                "The tracker Wandb needs the package wandb, which is not installed. "
                "Install the extra `reflectvlm[wandb]` or leave this tracker out."
            )

    def start(self, card: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=self.project,
            mode=cast("Literal['online', 'offline', 'disabled']", self.mode),
            name=self.name,
            id=self.id,
            resume=None if self.id is None else "allow",
            dir=None if self.folder is None else str(self.folder),
            config=json.loads(json.dumps(finite(card), default=str)),
        )

    def metrics(self, step: int, values: Mapping[str, float | int]) -> None:
        self._started().log({key: float(value) for key, value in values.items()}, step=step)

    def rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        import wandb

        columns: list[str | int] = ["sample", "question", "text", "reward", "stop"]
        rows = [[row[str(name)] for name in columns] for row in sample_rows(groups, self.samples_per_step)]
        self._started().log({"samples": wandb.Table(columns=columns, data=rows)}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _started(self) -> Any:
        if self._run is None:
            self.start({})
        return self._run


def finite(value: Any) -> Any:
    """A nest of plain values in which every number that JSON lacks (NaN, infinities) is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _rewind(rewind: Callable[[int], None], step: int, _: Tracker) -> None:
    rewind(step)


def _indented(text: str) -> str:
    """Markdown's literal block: TensorBoard renders markdown, and tags must survive it."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSONL file with its whole and wanted lines, if that changes anything."""
    if not path.exists():
        return
    before = path.read_bytes()
    lines = []
    for line in before.splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # a cut line is no JSON, or not even UTF-8
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row and wanted(row):
                lines.append(line.rstrip(b"\r\n") + b"\n")
    after = b"".join(lines)
    if after != before:
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(after)
        os.replace(temporary, path)
