"""Rows of questions in, answers out: the two files of `reflectvlm generate data=… out=…`.

Answers are JSON lines in the order of the rows:

    id, question    of the row
    text            the answer, with all tags
    stop            why it ended: eos, stop or length
    tokens          how many were sampled
    inserted        for each time that the trigger stands in the text its blocks, each [image, kept tokens
                    or null for all], as `placing.recorded` writes and `SFTTrainer.choices` reads them

What the answers were made with is beside them, in `<out>.card.json` (`answer_card.py`): another model or
other settings need another file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reflectvlm.answer_card import Card, check_card, write_card
from reflectvlm.data.filtered import Dataset, checked
from reflectvlm.data.images import ImageLimits
from reflectvlm.data.rows import BadRow, Columns, read_row
from reflectvlm.data.sources import pick
from reflectvlm.generator import Generator
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.rollout.placing import recorded
from reflectvlm.spans import count_tokens
from reflectvlm.train.console import duration
from reflectvlm.train.signals import StopRequest
from reflectvlm.types import Rollout, Sample

EVERY = 10.0
"""Seconds between two lines about how far a file is."""

log = logging.getLogger("reflectvlm")


def questions(
    path: str | os.PathLike[str],
    *,
    columns: Columns | None = None,
    split: str | None = None,
    root: str | os.PathLike[str] | None = None,
    max_rows: int | None = None,
    max_bad: float = 0.05,
) -> Dataset:
    """Rows of any source that `dataset` reads, whose gold answers may be missing: nobody grades here."""
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad is {max_bad}. It is a share of the rows, between 0 and 1.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}. It must be at least 1.")
    source = pick(path, split)
    columns = dataclasses.replace(columns or Columns(), answer=None)
    rows = source.open()
    folder = source.root if root is None else Path(root)
    read = functools.partial(read_row, columns=columns, limits=ImageLimits(), root=folder)
    count = len(rows) if max_rows is None else min(max_rows, len(rows))
    return checked(rows, read, count, columns, "skip", max_bad)


@dataclass(frozen=True)
class AnswerFile:
    """Answers on disk, whole lines only. Lines are appended in one write."""

    path: Path
    asked: dict[str, str]
    """Question by id of all rows that are answered."""

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], card: Card, resume: Literal["auto", "never"] = "never"
    ) -> AnswerFile:
        """A new file, or with `resume="auto"` one to go on with that has the same card; a last line that was
        cut is dropped."""
        lines = whole_lines(Path(path), card, resume)
        return cls(Path(path), {line["id"]: line["question"] for line in lines})

    def answered(self, sample: Sample) -> bool:
        """Raises ValueError if the file answers another question under this id."""
        if sample.id not in self.asked:
            return False
        if self.asked[sample.id] != sample.question:
            raise ValueError(
                f"{self.path} answers another question under the id {sample.id!r} than the rows ask: "
                f"{asked_there(self.asked[sample.id], sample.question)}. Give the rows (data=, split=) that "
                "it belongs to, to go on with it, or another out= to begin anew."
            )
        return True

    def add(self, generator: Generator, rollouts: Sequence[Rollout]) -> None:
        append(self.path, [line_of(generator, rollout) for rollout in rollouts])
        for rollout in rollouts:
            self.asked[rollout.prompt.sample.id] = rollout.prompt.sample.question


def whole_lines(path: Path, card: Card, resume: Literal["auto", "never"]) -> list[Mapping[str, Any]]:
    """The lines of a file that is now there, whole and beside its card: none of a new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            data = path.read_bytes()
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"out={str(path)!r} cannot be written: {why}. Name another file.") from error
    whole = data[: data.rfind(b"\n") + 1]
    if data and resume != "auto":
        raise ValueError(
            f"out={str(path)!r} is there already, with {len(whole.splitlines())} lines. Go on with it by "
            "resume=auto, or begin anew with another out=."
        )
    # Read before anything is cut: a file that holds no answers stays as it is.
    lines = [_line(line, f"{path}:{n}") for n, line in enumerate(whole.splitlines(), start=1)]
    if lines:
        check_card(path, card)
    else:
        write_card(path, card)
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return lines


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """In one write."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with path.open("ab") as file:
        file.write(text.encode())


def answer_rows(make: Callable[[], Generator], data: Dataset, file: AnswerFile, batch: int) -> int:
    """Answers all rows that the file does not answer yet. Batches are cut the same way every time, and
    of one that is partly there all rows are drawn again where chance is in it: a run that was stopped
    gives the answers of one that was not."""
    generator: Generator | None = None
    made: list[Rollout] = []
    signal: str | None = None
    started = told = time.monotonic()
    with StopRequest() as stop:
        for number, first in enumerate(range(0, len(data), batch)):
            samples = _samples(data, range(first, min(first + batch, len(data))))
            missing = [sample for sample in samples if not file.answered(sample)]
            if not missing:
                continue
            if stop.requested:  # asked only here: one that comes with the last row has nothing to stop
                signal = stop.reason
                break
            generator = generator or make()
            try:
                with abandonable(lambda: stop.requested):
                    rollouts = generator.batch(samples if generator.sampling.temperature else missing, number)
            except Abandoned:
                signal = stop.reason
                break  # these rows are asked again by the next start
            new = {sample.id for sample in missing}
            added = [rollout for rollout in rollouts if rollout.prompt.sample.id in new]
            file.add(generator, added)
            made += added
            if time.monotonic() - told >= EVERY:
                told = time.monotonic()
                tell_progress(len(file.asked), len(data), len(made), told - started)
    _tell_end(made, file, data, time.monotonic() - started, signal)
    return stop.exit_code if signal else 0


def _samples(data: Dataset, places: Iterable[int]) -> list[Sample]:
    """The rows that can still be read."""
    found = []
    for place in places:
        try:
            found.append(data[place])
        except BadRow as bad:
            log.warning("row left out: %s", bad)
    return found


def tell_progress(done: int, total: int, made: int, seconds: float) -> None:
    left = duration(seconds / made * max(total - done, 0)) if made else "?"
    log.info("%d of %d rows, %s to go", done, total, left)


def _tell_end(
    made: Sequence[Rollout], file: AnswerFile, data: Dataset, seconds: float, signal: str | None
) -> None:
    cut = sum(rollout.truncated for rollout in made)
    log.info(
        "%s%d rows answered in %.1f s (%s; %d cut by max_tokens); %s has %d of %d rows%s",
        f"stopped by {signal}: " if signal else "",
        len(made),
        seconds,
        cost(made),
        cut,
        file.path,
        len(file.asked),
        len(data),
        ". Go on with resume=auto" if signal else "",
    )


def cost(rollouts: Sequence[Rollout]) -> str:
    """Inserted tokens are those of the blocks, the two around each counted, and what was forced."""
    sampled = sum(len(rollout.sampled_ids) for rollout in rollouts)
    whole = sum(count_tokens(rollout.spans, rollout.prompt.grids) for rollout in rollouts)
    return f"{sampled:,} tokens sampled, {whole - sampled:,} inserted"


def asked_there(old: str, new: str) -> str:
    """Both questions, for an error."""
    return " there, ".join(repr(" ".join(text.split())[:60]) for text in (old, new)) + " here"


def line_of(generator: Generator, rollout: Rollout) -> Mapping[str, Any]:
    assert generator.reattention is not None
    return {
        "id": rollout.prompt.sample.id,
        "question": rollout.prompt.sample.question,
        "text": rollout.text,
        "stop": rollout.stop,
        "tokens": len(rollout.sampled_ids),
        "inserted": recorded(generator.policy, rollout.spans, generator.reattention.trigger),
    }


def _line(data: bytes, place: str) -> Mapping[str, Any]:
    try:
        line = json.loads(data)
    except ValueError:
        line = None
    if not isinstance(line, dict) or not {"id", "question", "text"} <= line.keys():
        raise ValueError(
            f"{place} is no answer of generate, which has id, question and text. Name another out=FILE, or "
            "remove that line."
        )
    return line
