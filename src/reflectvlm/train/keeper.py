"""A run's checkpoints: written beside training, surely there where they must be, put back at the start.

What is in one says `keeping.py`, how it gets on the disk `saver.py` and `checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

from torch import nn

from reflectvlm.pulse import phase
from reflectvlm.train import keeping
from reflectvlm.train.checkpoint import CheckpointStore
from reflectvlm.train.packing import JSON
from reflectvlm.train.run import Metrics, Trainable
from reflectvlm.train.run_folder import RunFolder
from reflectvlm.train.saver import Saver

log = getLogger("reflectvlm")


@dataclass
class Progress:
    """How far a run is: what a checkpoint keeps of the loop itself."""

    done: int = 0
    """Steps."""
    begun: bool = False
    """What is measured before the first step has been."""
    owes_evaluation: bool = False
    """The evaluation that step `done` calls for was given up."""
    left_out: int = 0
    """Batches without a finite loss."""
    before: Metrics = field(default_factory=dict)
    """What was measured before the first step."""

    def state(self) -> dict[str, JSON]:
        """All but the steps, which a checkpoint is named by."""
        return {
            "before": self.before,
            "begun": self.begun,
            "owes_evaluation": self.owes_evaluation,
            "left_out": self.left_out,
        }

    def load_state(self, done: int, state: Mapping[str, Any]) -> None:
        """The opposite of `state`, after so many steps."""
        self.done, self.before, self.begun = done, dict(state["before"]), state["begun"]
        self.owes_evaluation, self.left_out = state["owes_evaluation"], state["left_out"]

    @property
    def place(self) -> tuple[int, bool, bool, int]:
        """What a checkpoint must agree in with the run to be of its present state."""
        return self.done, self.begun, self.owes_evaluation, self.left_out


class Keeper:
    """Keeps one run's progress, trainer and all. `logged` says how long the run's logs are, which go back to
    that length with it. All processes call the same methods; the first one writes."""

    def __init__(
        self,
        trainer: Trainable,
        folder: RunFolder,
        progress: Progress,
        logged: Callable[[], Mapping[str, int]],
    ) -> None:
        self.trainer, self.folder, self.progress, self.logged = trainer, folder, progress, logged
        self.output, self.ranks = trainer.output, trainer.ranks
        self.store = CheckpointStore(folder.checkpoints, keep=self.output.keep)
        self.saver = Saver(self.store)
        self.kept: tuple[Any, ...] | None = None
        """The place of the newest checkpoint, written or being written."""
        self.gather_seconds = 0.0
        """Longest that putting a checkpoint together has taken, before any of it is written."""
        with trainer.updater.weights.whole():
            self.about = keeping.about(trainer)

    @property
    def seconds(self) -> float:
        """What a save may take, or a guess before the first."""
        known = self.saver.seconds
        save = 2 * known + 1 if known else seconds_to_save(self.trainer.policy.module)
        return save + self.gather_seconds

    def save(self) -> None:
        """Begins a checkpoint of the state as it is now; training goes on while it is written."""
        with phase("save"):
            self._save()

    def save_surely(self) -> None:
        """The state as it is now is on the disk when this returns."""
        with phase("save"), self._told_if_not_saved():
            self.saver.wait()
        missing = self.saver.saved != self.progress.done or self.kept != self.progress.place
        if self.ranks.agree(self.ranks.first and missing):
            self.save()
            with phase("save"):
                self.saver.wait()
                self.ranks.barrier()

    def leave_none_half_written(self) -> None:
        """A run that ends with an error still lets the save that is being written come to its end."""
        with contextlib.suppress(Exception):  # the run's own error is the one to tell
            self.saver.wait()

    def restore(self) -> Mapping[str, int] | None:
        """Makes trainer and progress those of the newest valid checkpoint; what `logged` had said then. None
        if the run has none yet.

        Raises ValueError if it belongs to another model or other data, RuntimeError if none is valid."""
        path = self.folder.checkpoint or self.ranks.from_first(self._newest)
        if path is None:
            return None
        # `latest` has just compared every byte
        verify = self.folder.checkpoint is not None and self.ranks.first
        checkpoint = self.store.load(path, verify=verify)
        loop = keeping.put_back(self.trainer, checkpoint, self.about)
        if self.folder.checkpoint is not None and self.ranks.first:
            self.store.supersede_after(checkpoint.step)
        self.progress.load_state(checkpoint.step, loop)
        self.saver.saved = checkpoint.step
        self.kept = self.progress.place
        logged: Mapping[str, int] = loop["logged"]
        return logged

    def _save(self) -> None:
        loop = {**self.progress.state(), "logged": dict(self.logged())}
        started = time.monotonic()
        tensors, state = keeping.snapshot(self.trainer, self.about, loop)
        self.gather_seconds = max(self.gather_seconds, time.monotonic() - started)
        if not self.ranks.first:
            self.kept = self.progress.place
            return
        with self._told_if_not_saved():
            self.saver.wait()  # an older one that failed must not keep this one from being tried
        with self._told_if_not_saved():
            made = ("model", "optimizer") if self.trainer.updater.weights.gathers else ()
            self.saver.save(self.progress.done, tensors=tensors, state=state, ready=made)
            self.kept = self.progress.place

    @contextlib.contextmanager
    def _told_if_not_saved(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self.output.on_save_error == "stop":
                raise
            log.warning("%s Training goes on without it (on_save_error=continue).", error)

    def _newest(self) -> Path | None:
        """The newest valid checkpoint; None for a run that has none yet."""
        path = self.store.tidy()
        if path is None:
            self._check_none_lost()
        return path

    def _check_none_lost(self) -> None:
        """Damaged checkpoints must not let a run of days begin again in its own folder."""
        if found := sorted(one.name for one in self.folder.checkpoints.glob("step-*")):
            raise RuntimeError(
                f"None of the checkpoints in {self.folder.checkpoints} is valid ({', '.join(found)}; the "
                "warnings above say why). Put one back, or start anew with resume=never; nothing was changed."
            )


def seconds_to_save(module: nn.Module) -> float:
    """A guess for the first save: weights and two moments, half a gigabyte a second."""
    sizes = (getattr(one, "ds_numel", one.numel()) * one.element_size() for one in module.parameters())
    return 1 + 3 * sum(sizes) / 5e8
