"""A model answers a benchmark's items into an append-only file, and goes on with it after any kill.

What is drawn for an item follows from the seed, the item's id and the reply's number alone: not from the
order of items, from the batch, or from how often the run was cut off. An item whose image cannot be read is
not asked: its line says why, and it is tried again by the next run that goes on with the file.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reflectvlm.answer_card import ABOUT, Card, changes, told_about, write_card
from reflectvlm.answer_file import EVERY, append, asked_there, line_of, tell_progress, whole_lines
from reflectvlm.data.images import BadImage, ImageLimits
from reflectvlm.eval.predictions import gold_of
from reflectvlm.eval.rows import sample_of
from reflectvlm.eval.types import Item
from reflectvlm.generator import Generator
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.train.signals import StopRequest
from reflectvlm.types import Rollout, Sample

log = logging.getLogger("reflectvlm")


@dataclass(frozen=True)
class PredictionFile:
    """Replies on disk, whole lines only, each by its item's id and its number."""

    path: Path
    asked: dict[tuple[str, int], str]
    """Question of each reply that is there."""
    missing: dict[tuple[str, int], str] = field(default_factory=dict)
    """Of these: why the image could not be shown."""
    card: Card = field(default_factory=dict)
    """What replies are made with from now on."""
    moved: str = ""
    """What the card that was there tells otherwise or not yet, though no reply depends on it: where the data
    were."""

    @classmethod
    def open(cls, path: Path, card: Card, resume: Literal["auto", "never"] = "never") -> PredictionFile:
        """As `AnswerFile.open`."""
        old = told_about(path)
        lines = whole_lines(path, card, resume)
        file = cls(path, {}, card=card, moved=changes(old, card.get(ABOUT, {})) if lines else "")
        for line in lines:
            file._note(line)
        return file

    def keep_card(self) -> None:
        """Once it is clear that the replies are to the same items: the card tells of this run."""
        if self.moved:
            write_card(self.path, self.card)

    def answered(self, item: Item, number: int) -> bool:
        """Raises ValueError if the file answers another question under this id."""
        key = (item.id, number)
        if key in self.asked and self.asked[key] != item.question:
            since = f" Since then: {self.moved}." if self.moved else ""
            raise ValueError(
                f"{self.path} answers another question under the id {item.id!r} than the task asks: "
                f"{asked_there(self.asked[key], item.question)}.{since} Give the data (data_dir=) that it "
                "belongs to, to go on with it, or another out= to begin anew."
            )
        return key in self.asked and key not in self.missing

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Of items without an image only those that the file does not tell of yet."""
        new = [line for line in lines if not line.get("missing") or _key(line) not in self.asked]
        append(self.path, new)
        for line in new:
            self._note(line)

    def _note(self, line: Mapping[str, Any]) -> None:
        key = _key(line)
        self.asked[key] = line["question"]
        self.missing.pop(key, None)
        if why := line.get("missing"):
            self.missing[key] = why


@dataclass
class Answering:
    """One benchmark's items, `samples` replies to each, `batch` at one time."""

    make: Callable[[], Generator]
    """Called when there is something to answer."""
    items: Sequence[Item]
    file: PredictionFile
    samples: int = 1
    batch: int = 16
    limits: ImageLimits = field(default_factory=ImageLimits)

    def run(self) -> int:
        """Answers what is not answered yet. The exit code: 0, or that of a stop."""
        left = [
            (item, number)
            for number in range(self.samples)
            for item in self.items
            if not self.file.answered(item, number)
        ]
        self.file.keep_card()
        made: list[tuple[int, int]] = []  # tokens, and whether the answer was cut
        started = told = time.monotonic()
        stopped = True
        with StopRequest() as stop:
            for first in range(0, len(left), self.batch):
                if stop.requested:  # asked only here: one that comes with the last batch has nothing to stop
                    break
                try:
                    with abandonable(lambda: stop.requested):
                        rollouts = self._answer(left[first : first + self.batch])
                except Abandoned:
                    break  # these are asked again by the next start
                made += [(len(rollout.sampled_ids), rollout.truncated) for rollout in rollouts]
                if time.monotonic() - told >= EVERY:
                    told = time.monotonic()
                    tell_progress(len(self.file.asked), self._total, len(made), told - started)
            else:
                stopped = False
        signal = stop.reason if stopped else None
        self._tell_end(made, time.monotonic() - started, signal)
        return stop.exit_code if signal else 0

    @property
    def _total(self) -> int:
        return len(self.items) * self.samples

    def _answer(self, asked: Sequence[tuple[Item, int]]) -> list[Rollout]:
        """Asks those whose images can be read; the file gets a line for each."""
        samples: list[Sample] = []
        shown: list[tuple[Item, int]] = []
        lines: list[Mapping[str, Any]] = []
        for item, number in asked:
            try:
                samples.append(sample_of(item, self.limits))
                shown.append((item, number))
            except BadImage as bad:
                log.warning("item %r is not asked: %s", item.id, bad)
                lines.append(_head(item, number) | {"text": "", "missing": str(bad)})
        rollouts: list[Rollout] = []
        if samples:
            generator = self.make()
            places = [place_of(item.id, number) for item, number in shown]
            rollouts = generator.batch(samples, places=places)
            for (item, number), rollout in zip(shown, rollouts, strict=True):
                lines.append({**_head(item, number), **line_of(generator, rollout)})
        self.file.add(lines)
        return rollouts

    def _tell_end(self, made: Sequence[tuple[int, int]], seconds: float, signal: str | None) -> None:
        log.info(
            "%s%d replies in %.1f s (%s tokens; %d cut by max_tokens); %s has %d of %d%s",
            f"stopped by {signal}: " if signal else "",
            len(made),
            seconds,
            f"{sum(tokens for tokens, _ in made):,}",
            sum(cut for _, cut in made),
            self.file.path,
            len(self.file.asked),
            self._total,
            ". Go on with resume=auto" if signal else "",
        )


def place_of(id: str, number: int) -> int:
    """What chance an item's reply has, as a number of its own."""
    return int.from_bytes(hashlib.sha256(f"{number} {id}".encode()).digest()[:8], "big")


def _head(item: Item, number: int) -> dict[str, Any]:
    return {"id": item.id, "number": number, "question": item.question, **gold_of(item)}


def _key(line: Mapping[str, Any]) -> tuple[str, int]:
    return str(line["id"]), int(line.get("number", 0))
