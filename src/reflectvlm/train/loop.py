"""The run around the steps: folder, trackers, checkpoints, evaluations, signals, the table at the end.

The loop knows neither SFT nor RL: it asks a `Trainable` for one step after another.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflectvlm import stages
from reflectvlm.models.freezing import trainable_table
from reflectvlm.train.canary import check_sight
from reflectvlm.train.checkpoint import (
    CheckpointStore,
    optimizer_from_tensors,
    optimizer_to_tensors,
    rng_state,
    set_rng_state,
)
from reflectvlm.train.console import Console, results
from reflectvlm.train.dump import dump_batch
from reflectvlm.train.plots import curves
from reflectvlm.train.run import Metrics, RunResult, StepResult, Trainable
from reflectvlm.train.run_folder import RunFolder
from reflectvlm.train.signals import StopRequest
from reflectvlm.train.trackers import JsonLines, TensorBoard, Trackers
from reflectvlm.train.update import NonFinite

log = logging.getLogger("reflectvlm")


def run_training(trainer: Trainable) -> RunResult:
    """Runs a trainer from its first step, or from its last good checkpoint, to its end."""
    output = trainer.output
    name = "-".join(part for part in (trainer.name, trainer.variant) if part)
    recipe, overrides = output.recipe_yaml, output.overrides
    if output.resume in ("auto", "never"):
        folder = RunFolder.create(
            output.root, name, recipe_yaml=recipe, overrides=overrides, resume=output.resume
        )
    else:
        folder = RunFolder.reopen(_existing(output.resume), recipe_yaml=recipe, overrides=overrides)
        name = folder.path.name
    with folder, StopRequest() as stop:
        return _Loop(trainer, folder, stop, name).run()


def _existing(path: str) -> Path:
    """The run folder named by `resume=PATH`."""
    folder = Path(path)
    if not (folder / "checkpoints").is_dir():
        raise ValueError(
            f"resume={path!r} is no run folder: it has no checkpoints/. "
            "Give the folder of a run, or auto, or never."
        )
    return folder.absolute()


class _Loop:
    def __init__(self, trainer: Trainable, folder: RunFolder, stop: StopRequest, name: str) -> None:
        self.trainer, self.folder, self.stop, self.output = trainer, folder, stop, trainer.output
        self.store = CheckpointStore(folder.checkpoints, keep=self.output.keep)
        self.jsonl = JsonLines(folder.path)
        self.console = Console(name, trainer.steps, every=self.output.print_every)
        self.tensorboard = TensorBoard(folder.tensorboard)
        self.trackers = Trackers((self.console, self.jsonl, self.tensorboard, *self.output.trackers))
        self.done = 0
        self.saved: int | None = None
        """Step of the newest checkpoint."""
        self.before: Metrics = {}

    def run(self) -> RunResult:
        trainer = self.trainer
        trainer.prepare()
        if finished := self._finished():
            return finished
        resumed = self._restore()
        self.trackers.start(
            {"name": self.folder.path.name, "steps": trainer.steps, "folder": str(self.folder.path)}
        )
        try:
            self._introduce()
            if not resumed:
                self._begin()
            while self.done < trainer.steps and not self.stop.requested:
                self._step()
            if self.done < trainer.steps:
                return self._stopped()
            return self._end()
        finally:
            self.trackers.close()

    def _introduce(self) -> None:
        """What trains, and on which rows."""
        model = getattr(self.trainer.policy, "model", None)
        for part, total, trains in trainable_table(model) if model is not None else ():
            self.console.say(f"{part}: {total:,} parameters, {trains:,} train")
        report = getattr(getattr(self.trainer, "data", None), "report", None)
        if report is not None:
            lines = report.lines() if hasattr(report, "lines") else [str(report)]
            self.folder.rows.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            self.console.say(f"{report}; the list is in {self.folder.rows}")

    def _begin(self) -> None:
        """What is measured once, before the first step."""
        if self.output.canary:
            check_sight(self.trainer.policy, self.trainer.canary_prompts())
        if self.trainer.test is not None:
            self.before, groups = self.trainer.evaluate(self.trainer.test)
            self.trackers.rollouts(0, groups)
        self._validate()

    def _step(self) -> None:
        try:
            result = self.trainer.step(self.done)
        except NonFinite as error:
            where = dump_batch(
                self.folder.path / f"nonfinite-step-{self.done + 1}",
                error.batch,
                str(error),
                row_ids=getattr(self.trainer, "row_ids", ()),
            )
            raise NonFinite(
                f"Step {self.done + 1}, batch saved in {where}: {error.what}", error.batch
            ) from error
        self.done += 1
        self._report(result)
        last = self.done == self.trainer.steps
        if last or _due(self.done, self.output.eval_every):
            self._validate()
        if last or _due(self.done, self.output.save_every):
            self._save()

    def _report(self, result: StepResult) -> None:
        self.trackers.metrics(self.done, result.metrics)
        every = self.output.samples_every
        if result.groups and (_due(self.done, every) or (every and self.done == 1)):
            self.trackers.rollouts(self.done, result.groups)

    def _validate(self) -> None:
        if self.output.eval_every and self.trainer.evaluation is not None:
            values, _ = self.trainer.evaluate(self.trainer.evaluation)
            self.trackers.metrics(self.done, {f"eval/{name}": value for name, value in values.items()})

    # -- checkpoints ----------------------------------------------------------------------------

    def _save(self) -> None:
        module, optimizer = self.trainer.policy.module, self.trainer.updater.optimizer
        packed, generators = optimizer_to_tensors(optimizer.state_dict()), rng_state()
        self.store.save(
            self.done,
            tensors={"model": module.state_dict(), "optimizer": packed.tensors, "rng": generators.tensors},
            state={
                "trainer": self.trainer.state(),
                "optimizer": packed.json,
                "rng": generators.json,
                "before": self.before,
            },
        )
        self.saved = self.done

    def _restore(self) -> bool:
        path = self.store.latest()
        if path is None:
            # A run cut off before its first checkpoint starts anew, and so does its log.
            self.trackers.truncate_after(-1)
            return False
        checkpoint = self.store.load(path, verify=False)  # `latest` has just compared every byte
        module, optimizer = self.trainer.policy.module, self.trainer.updater.optimizer
        module.load_state_dict(checkpoint.tensors["model"])
        optimizer.load_state_dict(
            optimizer_from_tensors(checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
        )
        set_rng_state(checkpoint.tensors["rng"], checkpoint.state["rng"])
        state: Mapping[str, Any] = checkpoint.state
        self.trainer.load_state(state["trainer"])
        self.before, self.done = dict(state["before"]), checkpoint.step
        self.saved = self.done
        self.trackers.truncate_after(self.done)
        log.info("resumed %s at step %d of %d", self.folder.path, self.done, self.trainer.steps)
        return True

    # -- ends -----------------------------------------------------------------------------------

    def _stopped(self) -> RunResult:
        if self.saved != self.done:  # also after step 0: what was measured before it is kept
            self._save()
        self.console.say(
            f"stopped by {self.stop.signal_name} after step {self.done} of {self.trainer.steps}; "
            f"saved in {self.folder.path}. Go on with resume=auto."
        )
        return RunResult(
            folder=self.folder.path,
            before=self.before,
            after={},
            finished=False,
            exit_code=self.stop.exit_code,
        )

    def _end(self) -> RunResult:
        after: Metrics = {}
        if self.trainer.test is not None:
            after, groups = self.trainer.evaluate(self.trainer.test)
            self.trackers.rollouts(self.done, groups)
        self.trainer.policy.save(self.folder.model)
        self.trackers.close()
        title = f"{stages.without_digest(self.folder.path.name)}: held-out rows, greedy"
        shown = results(self.before), results(after)
        markdown = self.console.table(title, *shown).markdown if after else title
        self.folder.write_summary({"before": self.before, "after": after, "steps": self.done}, markdown)
        self._draw()
        self.console.say(f"model, curves, samples and metrics are in {self.folder.path}")
        return RunResult(folder=self.folder.path, before=self.before, after=after, finished=True)

    def _draw(self) -> None:
        try:
            curves(self.folder.metrics, self.folder.curves)
        except Exception as error:  # noqa: BLE001  boundary: the run is finished, with or without picture
            log.warning(
                "%s could not be drawn, all else is there: %s: %s",
                self.folder.curves, type(error).__name__, error,
            )  # fmt: skip

    def _finished(self) -> RunResult | None:
        """The result of a run that had already ended."""
        if not self.folder.finished:
            return None
        summary = json.loads(self.folder.summary.read_text(encoding="utf-8"))
        self.console.say(f"{self.folder.path} is finished; nothing to do")
        return RunResult(
            folder=self.folder.path, before=summary["before"], after=summary["after"], finished=True
        )


def _due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is for never."""
    return every > 0 and step % every == 0
