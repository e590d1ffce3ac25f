"""The run around the steps: folder, trackers, checkpoints, evaluations, signals, the table at the end.

The loop knows neither SFT nor RL: it asks a `Trainable` for one step after another. When a stop is asked
for, the step or evaluation at hand is given up at its next safe point (`interrupt.py`) and taken again by
the run that goes on; what was done before is saved.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from reflectvlm import stages
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.protocols import Tracker
from reflectvlm.pulse import phase
from reflectvlm.train.changes import of_a_trainer, settings
from reflectvlm.train.changes import table as table_of_changes
from reflectvlm.train.checks import check_start
from reflectvlm.train.checks_signal import NoSignal
from reflectvlm.train.console import Console, results
from reflectvlm.train.dump import dump_batch
from reflectvlm.train.keeper import Keeper, Progress
from reflectvlm.train.packing import rng_state, set_rng_state
from reflectvlm.train.plots import curves
from reflectvlm.train.run import Metrics, RunResult, StepResult, Trainable
from reflectvlm.train.run_folder import RunFolder
from reflectvlm.train.signals import StopRequest, agreed
from reflectvlm.train.trackers import JsonLines, TensorBoard, Trackers
from reflectvlm.train.update import NonFinite
from reflectvlm.train.what_trains import what_trains
from reflectvlm.train.written import Pictures

log = logging.getLogger("reflectvlm")

_MOST_DUMPS = 3
"""Batches that are written for inspection in one run."""


def run_training(trainer: Trainable) -> RunResult:
    """Runs a trainer from its first step, or from its last good checkpoint, to its end."""
    output = trainer.output
    name = "-".join(part for part in (trainer.name, trainer.variant) if part)
    ranks = trainer.ranks
    folder = ranks.from_first(
        lambda: RunFolder.open(name, output, "checkpoints", of_a_trainer, settings(trainer))
    )
    with ranks.known_lost(), folder, StopRequest(output.max_minutes) as stop:
        shown = name if output.resume in ("auto", "never") else folder.path.name
        return _Loop(trainer, folder, stop, shown).run()


class _Loop:
    def __init__(self, trainer: Trainable, folder: RunFolder, stop: StopRequest, name: str) -> None:
        self.trainer, self.folder, self.stop, self.output = trainer, folder, stop, trainer.output
        self.ranks = trainer.ranks
        self.now = Progress()
        side = self.output.sample_images
        self.jsonl = JsonLines(
            folder.path,
            samples_per_step=self.output.samples_per_step,
            held_out_answers=self.output.held_out_answers,
            pictures=Pictures(folder.sample_images, side) if side else None,
        )
        # The first process alone talks and writes.
        self.console = Console(
            name,
            trainer.steps,
            every=self.output.print_every,
            file=None if self.ranks.first else io.StringIO(),
        )
        self.tensorboard = TensorBoard(folder.tensorboard)
        listeners: tuple[Tracker, ...] = (
            self.console, self.jsonl, self.tensorboard, *self.output.trackers,
        )  # fmt: skip
        self.trackers = Trackers(listeners if self.ranks.first else ())
        self.no_signal: NoSignal | None = NoSignal()
        self.update_seconds = 0.0
        """Longest that the updates of a step have taken."""

    def run(self) -> RunResult:
        trainer = self.trainer
        trainer.prepare()
        if finished := self._finished():
            return finished
        self.keeper = Keeper(trainer, self.folder, self.now, self.jsonl.sizes)
        self._reserve(0.0)
        self._restore()
        self.trackers.start(
            {"name": self.folder.path.name, "steps": trainer.steps, "folder": str(self.folder.path)}
        )
        try:
            with trainer.updater.weights.whole():
                self._introduce()
            with phase("between steps"):
                ended = self._all_steps()
            return self._end() if ended else self._stopped()
        except Abandoned:
            return self._stopped()
        finally:
            self.trackers.close()
            # A second signal means at once: a checkpoint that is half written is none.
            if not isinstance(sys.exception(), SystemExit | KeyboardInterrupt):
                self.keeper.leave_none_half_written()

    def _all_steps(self) -> bool:
        """Whether the last step was reached."""
        if not self.now.begun:
            with self._given_up_if_asked():
                self._begin()
        if self.now.owes_evaluation:
            self._validate()
        while self.now.done < self.trainer.steps:
            if self._stop_asked():
                return False
            self._step()
        return True

    def _stop_asked(self) -> bool:
        """Whether some process was asked to stop; then all know why."""
        return agreed(self.ranks, self.stop)

    def _introduce(self) -> None:
        """What trains, on which rows, and what is other than when the run began."""
        if self.folder.changed:
            self.console.say(table_of_changes(self.folder.changed, self.folder.path).markdown)
        model = getattr(self.trainer.policy, "model", None)
        if model is not None:
            self.console.say(what_trains(model, getattr(self.trainer, "optimizer", None)).markdown)
        report = getattr(self.trainer.data, "report", None)
        if report is not None:
            lines = report.lines() if hasattr(report, "lines") else [str(report)]
            if not self.ranks.first:
                return
            self.folder.rows.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            self.console.say(f"{report}; the list is in {self.folder.rows}")

    def _begin(self) -> None:
        """What is measured once, before the first step."""
        if self.output.checks:
            with self.trainer.updater.weights.whole():
                check_start(self.trainer, self.console.say)
        if self.trainer.test is not None:
            before, groups = self.trainer.evaluate(self.trainer.test)
            self.trackers.rollouts(0, groups)
            self.now.before = before
        self.now.begun = True
        self._validate()

    def _step(self) -> None:
        try:
            with self._given_up_if_asked():
                result = self.trainer.step(self.now.done)
        except NonFinite as error:
            where = self._dump(error, self.now.done + 1)
            raise NonFinite(f"Step {self.now.done + 1}, {where}: {error.what}", error.batch) from error
        self.now.done += 1
        self._count_left_out()
        self._report(result)
        last = self.now.done == self.trainer.steps
        if last or _due(self.now.done, self.output.eval_every):
            self._validate()
        if last or _due(self.now.done, self.output.save_every):
            self.keeper.save()

    @contextlib.contextmanager
    def _given_up_if_asked(self) -> Iterator[None]:
        """A block that can be given up; the trainer is then as it was before it."""
        state, generators = self.trainer.state(), rng_state()
        try:
            with abandonable(lambda: self.stop.requested, alone=self.ranks.world == 1):
                yield
        except Abandoned:
            self.trainer.load_state(state)
            set_rng_state(*generators)
            raise

    def _reserve(self, update: float) -> None:
        """What a stop must leave time for: the updates of a step, finished once begun, and a save."""
        self.update_seconds = max(self.update_seconds, update)
        self.stop.reserve = self.update_seconds + self.keeper.seconds

    def _report(self, result: StepResult) -> None:
        self.trackers.metrics(self.now.done, result.metrics)
        share = result.metrics.get("useful_groups")
        if share is not None and self.no_signal and (told := self.no_signal.after(self.now.done, share)):
            self.console.say(told)
        self._reserve(result.metrics.get("time/update", 0.0))
        every = self.output.samples_every
        if result.groups and (_due(self.now.done, every) or (every and self.now.done == 1)):
            self.trackers.rollouts(self.now.done, result.groups)

    def _validate(self) -> None:
        if self.output.eval_every and self.trainer.evaluation is not None:
            self.now.owes_evaluation = True
            with self._given_up_if_asked():
                values, _ = self.trainer.evaluate(self.trainer.evaluation)
            self.trackers.metrics(self.now.done, {f"eval/{name}": value for name, value in values.items()})
            self.now.owes_evaluation = False

    def _restore(self) -> None:
        """The run as its newest checkpoint has it, its logs as long as they were then."""
        logged = self.keeper.restore()
        if logged is None:
            # A run cut off before its first checkpoint starts anew, and so does its log.
            self.trackers.truncate_after(-1)
            return
        self.no_signal = None  # it speaks of a run from its beginning on
        self.trackers.truncate_after(self.now.done)
        if self.ranks.first:
            self.jsonl.truncate_to(logged)
            log.info("resumed %s at step %d of %d", self.folder.path, self.now.done, self.trainer.steps)

    # -- batches that are no numbers --------------------------------------------------------------

    def _count_left_out(self) -> None:
        """Tells and counts what the updater left out; past the budget the run stops."""
        skipped = self.trainer.updater.skipped
        while skipped:
            error = skipped.pop(0)
            self.now.left_out += 1
            where = (
                self._dump(error, self.now.done) if self.now.left_out <= _MOST_DUMPS else "not saved again"
            )
            log.warning(
                "step %d: %s is not finite; the batch is left out (number %d, max_nonfinite=%d; %s)",
                self.now.done, error.what, self.now.left_out, self.trainer.max_nonfinite, where,
            )  # fmt: skip
            if self.now.left_out > self.trainer.max_nonfinite:
                raise NonFinite(
                    f"Step {self.now.done}: {self.now.left_out} batches are left out, and max_nonfinite is "
                    f"{self.trainer.max_nonfinite}. The last: {error.what}",
                    error.batch,
                )

    def _dump(self, error: NonFinite, step: int) -> str:
        of_rank = "" if self.ranks.first else f"-rank-{self.ranks.rank}"
        folder = self.folder.path / f"nonfinite-step-{step}{of_rank}"
        if len(error.batch) == 0:
            return "this process had no rows"
        while folder.exists():  # several updates of one step
            folder = folder.with_name(f"{folder.name}-again")
        try:
            dump_batch(
                folder,
                error.batch,
                str(error),
                row_ids=self.trainer.row_ids,
                step=step,
                decode=self.trainer.policy.decode,
            )
        except OSError as problem:  # a full disk must not hide what went wrong
            return f"the batch could not be saved: {problem}"
        return f"batch saved in {folder}"

    # -- ends -----------------------------------------------------------------------------------

    def _stopped(self) -> RunResult:
        self._stop_asked()
        self.keeper.save_surely()  # also after step 0: what was measured before it is kept
        self.console.say(
            f"stopped by {self.stop.reason} after step {self.now.done} of {self.trainer.steps}; "
            f"saved in {self.folder.path}. Go on with resume=auto."
        )
        return RunResult(
            folder=self.folder.path,
            before=self.now.before,
            after={},
            finished=False,
            exit_code=self.stop.exit_code,
        )

    def _end(self) -> RunResult:
        self.keeper.save_surely()
        after: Metrics = {}
        if self.trainer.test is not None:
            with self._given_up_if_asked():
                after, groups = self.trainer.evaluate(self.trainer.test)
            self.trackers.rollouts(self.now.done, groups)
        with phase("save"), self.trainer.updater.weights.whole():
            if self.ranks.first:
                self._write_model()
        self.trackers.close()
        title = f"{stages.without_digest(self.folder.path.name)}: held-out rows, greedy"
        shown = results(self.now.before, after), results(after, self.now.before)
        markdown = self.console.table(title, *shown).markdown if after else title
        for line in self.trainer.test.notes(after) if self.trainer.test is not None else ():
            self.console.say(line)
            markdown += f"\n- {line}\n"
        if self.ranks.first:
            self._draw()  # before the summary, which says that the run is finished
            self.folder.write_summary(
                {"before": self.now.before, "after": after, "steps": self.now.done}, markdown
            )
        self.ranks.barrier()
        self.console.say(f"model, curves, samples and metrics are in {self.folder.path}")
        return RunResult(folder=self.folder.path, before=self.now.before, after=after, finished=True)

    def _write_model(self) -> None:
        """Aside first: half a model never stands where a whole one is looked for."""
        aside = self.folder.model.with_name(".model.tmp")
        for old in (aside, self.folder.model):
            if old.exists():
                shutil.rmtree(old)
        self.trainer.policy.save(aside)
        os.rename(aside, self.folder.model)

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
        summary = self.ranks.from_first(self._summary)  # a shared disk may show others an earlier state
        if summary is None:
            return None
        self.console.say(f"{self.folder.path} is finished; nothing to do")
        return RunResult(
            folder=self.folder.path, before=summary["before"], after=summary["after"], finished=True
        )

    def _summary(self) -> dict[str, Any] | None:
        if not self.folder.finished:
            return None
        summary: dict[str, Any] = json.loads(self.folder.summary.read_text(encoding="utf-8"))
        return summary


def _due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is for never."""
    return every > 0 and step % every == 0
