"""The run around a distillation: rows and images on disk, batch after batch, resumable.

    <run folder>/rows.jsonl      id, question, answer, images, <target>, source: "model" or "gold", and
                                 with re-attention `keep`: the blocks it chose, as `SFTTrainer.choices`
                                 takes them
    <run folder>/images/*.png    each image once, named by its content
    <run folder>/batches.jsonl   what each batch came to; a restart goes on after the last whole one

`dataset("rows.jsonl")` reads the rows. Left out: columns of the data beside these, and references to
images that were files before: rows hold decoded images, which no longer say where they came from.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from reflectvlm.data.fingerprint import fingerprint
from reflectvlm.interrupt import Abandoned, abandonable, committed
from reflectvlm.protocols import Tracker
from reflectvlm.pulse import phase
from reflectvlm.rollout.placing import answer_spans, place_insertions, recorded
from reflectvlm.train.checks import check_start
from reflectvlm.train.checks_signal import NothingKept
from reflectvlm.train.console import Console
from reflectvlm.train.evaluate import summarize
from reflectvlm.train.row_rules import Counts
from reflectvlm.train.run import Metrics
from reflectvlm.train.run_folder import RunFolder
from reflectvlm.train.signals import StopRequest, agreed
from reflectvlm.train.table import Table
from reflectvlm.train.trackers import JsonLines, Trackers
from reflectvlm.types import Prompt, Sample, ScoredGroup, Spans

if TYPE_CHECKING:
    from PIL.Image import Image

    from reflectvlm.train.distill import Distiller

log = logging.getLogger("reflectvlm")

ROWS = "rows.jsonl"
COLUMNS = ("id", "question", "answer", "images", "source")
"""What every row has beside its answer."""


class Tally(NamedTuple):
    """What became of the questions: `asked == kept + wrong + broken_layout`."""

    asked: int = 0
    kept: int = 0
    """Answers of the model that became rows."""
    wrong: int = 0
    """Refused although their layout was fine."""
    broken_layout: int = 0
    repaired: int = 0
    """Refused ones whose row got the gold answer."""
    left_out: int = 0
    """Rows never asked: unreadable, or with too long a prompt."""

    def plus(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What a distillation leaves behind; the fields that callers of a run read are those of `RunResult`."""

    folder: Path
    tally: Tally
    finished: bool
    exit_code: int = 0

    @property
    def rows(self) -> Path:
        return self.folder / ROWS

    @property
    def model(self) -> None:
        """No model is made."""
        return

    @property
    def before(self) -> Metrics:
        return {}

    @property
    def after(self) -> Metrics:
        return {name: float(value) for name, value in self.tally._asdict().items()}


def run_distillation(distiller: Distiller) -> Distilled:
    """Asks all rows, or goes on where an earlier run stopped."""
    output = distiller.output
    name = "-".join(part for part in (distiller.name, distiller.variant) if part)
    opened = distiller.ranks.from_first(lambda: RunFolder.open(name, output, "batches.jsonl"))
    lost = distiller.ranks.known_lost()
    with lost, opened as folder, StopRequest(output.max_minutes) as stop:
        return _Run(distiller, folder, stop).run()


class _Run:
    """One process's share of a distillation: batch after batch into the folder."""

    def __init__(self, distiller: Distiller, folder: RunFolder, stop: StopRequest) -> None:
        self.distiller, self.folder, self.stop = distiller, folder, stop
        self.ranks = distiller.ranks
        self.rows, self.progress = folder.path / ROWS, folder.path / "batches.jsonl"
        self.images = folder.path / "images"
        output = distiller.output
        # The first process alone talks and writes.
        silent = None if self.ranks.first else io.StringIO()
        self.console = Console(folder.path.name, distiller.batches, every=output.print_every, file=silent)
        listeners: tuple[Tracker, ...] = (self.console, JsonLines(folder.path), *output.trackers)
        self.trackers = Trackers(listeners if self.ranks.first else ())
        self.done, self.tally = 0, Tally()
        self.nothing_kept = NothingKept()
        self.data = fingerprint(distiller.data)

    def run(self) -> Distilled:
        if self.ranks.from_first(lambda: self.folder.finished):
            summary = json.loads(self.folder.summary.read_text(encoding="utf-8"))
            self.tally = Tally(**{name: summary[name] for name in Tally._fields})
            self.console.say(f"{self.folder.path} is finished; nothing to do")
            return self._result(finished=True)
        self._restore()
        self.trackers.start({"name": self.folder.path.name, "steps": self.distiller.batches})
        try:
            if not self.done:
                self._check_start()
            while self.done < self.distiller.batches and not self._stop_asked():
                with abandonable(lambda: self.stop.requested, alone=self.ranks.world == 1):
                    self._batch()
        except Abandoned:
            self._stop_asked()  # a batch that was not finished has left nothing behind
        finally:
            self.trackers.close()
        return self._stopped() if self.done < self.distiller.batches else self._end()

    def _stop_asked(self) -> bool:
        return agreed(self.ranks, self.stop)

    def _check_start(self) -> None:
        if self.distiller.output.checks:
            check_start(self.distiller, self.console.say)

    def _batch(self) -> None:
        started = time.perf_counter()
        distiller, number = self.distiller, self.done
        prompts = distiller.prompts(number)
        groups = distiller.answers(prompts, number)
        tally = Tally(left_out=len(distiller.places(number)) - len(prompts))
        lines = []
        for prompt, group in zip(prompts, groups, strict=True):
            row, what = self._row(prompt, group)
            lines += [row] if row else []
            tally = tally.plus(what)
        with phase("save"):
            self._append(lines, tally)
        if groups:
            metrics = summarize(groups, distiller.tag) | {"kept": tally.kept / tally.asked}
            self.trackers.metrics(self.done, metrics | {"time/step": time.perf_counter() - started})
            self.trackers.rollouts(self.done, groups)
        if told := self.nothing_kept.after(self.done, tally.asked, tally.kept, tally.repaired):
            self.console.say(told)

    def _row(self, prompt: Prompt, group: ScoredGroup) -> tuple[dict[str, Any] | None, Tally]:
        distiller, sample = self.distiller, prompt.sample
        if (rollout := distiller.good(group)) is not None:
            line = self._line(sample, rollout.text, "model", self._choices(rollout.spans))
            return line, Tally(asked=1, kept=1)
        broken = distiller.broken(group)
        refused = Tally(asked=1, wrong=not broken, broken_layout=broken)
        if distiller.wrong == "drop":
            return None, refused
        text = distiller.gold(sample)
        answer = (prompt, distiller.policy.answer(text)[0].ids)
        placed = place_insertions(distiller.policy, [answer], distiller.reattention)[0]
        chosen = self._choices(answer_spans(answer[1], (), placed))
        return self._line(sample, text, "gold", chosen), refused._replace(repaired=1)

    def _choices(self, spans: Spans) -> list[list[list[Any]]]:
        return recorded(self.distiller.policy, spans, self.distiller.reattention.trigger)

    def _line(self, sample: Sample, text: str, source: str, keep: list[Any]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "id": sample.id,
            "question": sample.question,
            "answer": sample.answer,
            "images": [self._image(image) for image in sample.images] if self.ranks.first else [],
            self.distiller.target: text,
            "source": source,
        }
        return row if self.distiller.reattention.trigger is None else row | {"keep": keep}

    def _image(self, image: Image) -> str:
        """Writes an image unless it is there, and returns its path from the rows' folder."""
        content = f"{image.mode} {image.size} ".encode() + image.tobytes()
        path = self.images / f"{hashlib.sha256(content).hexdigest()[:24]}.png"
        if not path.exists():
            self.images.mkdir(exist_ok=True)
            aside = path.with_suffix(".tmp")
            with aside.open("wb") as file:
                image.save(file, format="PNG", compress_level=1)
                _flush(file)
            os.replace(aside, path)
        return f"{self.images.name}/{path.name}"

    # -- progress on disk -----------------------------------------------------------------------

    def _append(self, lines: Sequence[Mapping[str, Any]], tally: Tally) -> None:
        """Images first, then the rows that name them, then the line that says they are whole."""
        committed()
        if not self.ranks.first:
            self.done, self.tally = self.done + 1, self.tally.plus(tally)
            return
        for folder in (self.images, self.folder.path):
            _flush_folder(folder)
        _write(self.rows, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self.done += 1
        self.tally = self.tally.plus(tally)
        size = self.rows.stat().st_size
        entry = {"batch": self.done, "bytes": size, "data": self.data, **tally._asdict()}
        entry |= {"rubric": self.distiller.rubric.state()}
        _write(self.progress, json.dumps(entry) + "\n")

    def _restore(self) -> None:
        entries = self.ranks.from_first(self._whole_batches)
        self.done = len(entries)
        for entry in entries:
            self.tally = self.tally.plus(Tally(**{name: entry[name] for name in Tally._fields}))
        self.trackers.truncate_after(self.done)
        # What the rules for rows count is in the tally already.
        tried, left_out = self.tally.asked + self.tally.left_out, self.tally.left_out
        self.distiller.feed.counts = Counts(tried=tried, unreadable=left_out)
        if entries:
            # A resumed run has what is left of its budget of failures, and no new one.
            self.distiller.rubric.load_state(entries[-1]["rubric"])
            log.info("resumed %s at batch %d of %d", self.folder.path, self.done, self.distiller.batches)

    def _whole_batches(self) -> list[dict[str, Any]]:
        """Goes back to the last batch whose rows are all there; whatever follows is dropped."""
        size = self.rows.stat().st_size if self.rows.is_file() else 0
        entries = [entry for entry in _whole_lines(self.progress) if entry["bytes"] <= size]
        if entries and entries[-1]["data"] != self.data:
            raise ValueError(
                f"{self.folder.path} was begun with other rows (then {entries[-1]['data']}, now "
                f"{self.data}). "
                "Put the earlier ones back, or start anew with resume=never."
            )
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        for path in (self.rows, self.progress):
            path.touch()
        os.truncate(self.rows, entries[-1]["bytes"] if entries else 0)
        os.truncate(self.progress, len(text.encode()))
        return entries

    # -- ends -----------------------------------------------------------------------------------

    def _stopped(self) -> Distilled:
        self.console.say(
            f"stopped by {self.stop.reason} after batch {self.done} of {self.distiller.batches}; "
            f"saved in {self.folder.path}. Go on with resume=auto."
        )
        return self._result(finished=False)

    def _end(self) -> Distilled:
        tally = self.tally
        made = tally.kept + tally.repaired
        if not made:
            raise RuntimeError(
                f"No row was made: of {tally.asked} answers {tally.wrong} are wrong and "
                f"{tally.broken_layout} have a broken layout; samples are in {self.folder.path}. Train the "
                "policy longer, check that instruction and rubric are those it was trained with, or give "
                "wrong=repair."
            )
        table = Table(f"{self.folder.path.name}: {made} rows", ("answers", "number", "share"))
        for name, value in tally._asdict().items():
            share = f"{100 * value / tally.asked:.1f}%" if tally.asked and name != "left_out" else "–"
            table.add(name.replace("_", " "), f"{value:,}", share)
        if self.ranks.first:
            self.folder.write_summary({**tally._asdict(), "rows": made}, table.markdown)
            table.show()
        self.ranks.barrier()
        self.console.say(f"rows and images are in {self.folder.path}")
        return self._result(finished=True)

    def _result(self, *, finished: bool) -> Distilled:
        code = 0 if finished else self.stop.exit_code
        return Distilled(folder=self.folder.path, tally=self.tally, finished=finished, exit_code=code)


def _write(path: Path, text: str) -> None:
    """Appends, and returns when it is on the disk."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(text)
        _flush(file)


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """The names in it, which a power cut may take although their files are there."""
    if not path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Entries up to the first line that a kill has cut, or a power cut has filled with something else."""
    entries: list[dict[str, Any]] = []
    if not path.is_file():
        return entries
    for line in path.read_bytes().rpartition(b"\n")[0].splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries
