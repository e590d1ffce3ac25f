"""`CacheBuild`: makes a cache of prompts, a shard at a time, in flat memory; killed, it goes on where it was.

The source is always walked from its beginning: what finished shards cover is read and compared by its digest,
not tokenised or decoded again, so a source that changed meanwhile is noticed and refused. The digest of a row
is that of its content; for an image that a path names, of the path and the file's size and time of change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from reflectvlm.curate.types import Question
from reflectvlm.data.cache_files import (
    BATCH,
    CacheCard,
    Shard,
    finish_shard,
    read_shard,
    schema,
    shard_path,
)
from reflectvlm.data.fingerprint import content_of
from reflectvlm.data.images import BadImage, ImageLimits, load_image
from reflectvlm.data.prompt_maker import PromptMaker
from reflectvlm.data.readers.asked import QuestionReader
from reflectvlm.data.rows import BadRow, Columns, Row, listed
from reflectvlm.data.sources import Source
from reflectvlm.data.streaming import Placed, stream
from reflectvlm.data.written_rows import as_json
from reflectvlm.types import Spans, Text

Told = Callable[[int, int], None]
"""Is told (shard, rows so far)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheBuild:
    """Example: `CacheBuild(maker=PromptMaker.load("tiny"))(JsonLines("rows.jsonl"), Path("cache"))`"""

    maker: PromptMaker
    columns: Columns = field(default_factory=Columns)
    limits: ImageLimits = field(default_factory=ImageLimits)
    root: Path | None = None
    shard_rows: int = 2000
    """Rows of the source for each shard; what a kill costs at most."""
    max_bad: float = 0.05

    def __post_init__(self) -> None:
        if self.shard_rows < 1:
            raise ValueError(f"shard_rows is {self.shard_rows}. It must be at least 1.")

    def __call__(self, source: Source, folder: Path, told: Told = lambda *_: None) -> CacheCard:
        card = self._card(source, folder)
        root = self.root if self.root is not None else source.root
        # Its memory of ids goes over all shards, finished ones too: they have to be read in any case.
        reader = QuestionReader(self.columns, self.limits, root, "")
        walk = stream(source)
        shards: list[Shard] = []
        while (first := next(walk, None)) is not None:
            rows = chain([first], islice(walk, self.shard_rows - 1))
            number = len(shards)
            done = read_shard(folder, number)
            if done is None:
                shards.append(self._made(rows, reader, folder, number))
            else:
                _check_same(done, _digested(rows, reader), folder, number, card)
                shards.append(done)
            told(number, sum(shard.rows for shard in shards))
        return self._finished(card, shards, folder)

    def _card(self, source: Source, folder: Path) -> CacheCard:
        settings = self.maker.settings
        mine = CacheCard(
            settings=settings,
            shard_rows=self.shard_rows,
            source=str(getattr(source, "path", getattr(source, "folder", ""))),
            columns=repr(self.columns),
        )
        folder.mkdir(parents=True, exist_ok=True)
        there = CacheCard.read(folder)
        if there is None:
            if any(not path.name.startswith(".") for path in folder.iterdir()):
                raise ValueError(f"out={folder} holds other files. Name a new folder.")
            mine.write(folder)
            return mine
        other = there.differences(settings)
        other += ["columns"] if there.columns != mine.columns else []
        other += ["shard_rows"] if there.shard_rows != mine.shard_rows else []
        if other:
            raise ValueError(
                f"{folder} was made with another {', another '.join(other)}. Give those words again, or name "
                "a new folder."
            )
        return there

    def _made(self, rows: Iterator[Placed], reader: QuestionReader, folder: Path, number: int) -> Shard:
        import pyarrow

        partial = shard_path(folder, number).with_suffix(".partial")
        digest, reasons, kept, walked = hashlib.sha256(), Counter[str](), 0, 0
        waiting: list[dict[str, Any]] = []
        with pyarrow.OSFile(str(partial), "wb") as file, pyarrow.ipc.new_file(file, schema()) as writer:
            for position, row in rows:
                walked += 1
                digest.update(row_digest(row, reader))
                made = self._record(reader(position, row))
                if isinstance(made, BadRow):
                    reasons[made.reason] += 1
                    continue
                kept += 1
                waiting.append(made)
                if len(waiting) == BATCH:
                    writer.write_batch(pyarrow.RecordBatch.from_pylist(waiting, schema=schema()))
                    waiting.clear()
            if waiting:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(waiting, schema=schema()))
        shard = Shard(walked=walked, rows=kept, digest=digest.hexdigest(), reasons=dict(reasons))
        finish_shard(folder, number, shard, partial)
        return shard

    def _record(self, found: Question | list[BadRow]) -> dict[str, Any] | BadRow:
        if not isinstance(found, Question):
            return found[0]
        try:
            images = [self._image(value, found) for value in found.images]
            spans = self.maker.spans(found.question, len(images))
            return {
                "id": found.id,
                "question": found.question,
                "answer": found.answer,
                "ids": as_ids(spans),
                "images": images,
                "columns": as_json(dict(found.columns), found, "columns"),
            }
        except BadRow as bad:
            return bad

    def _image(self, value: Any, row: Question) -> dict[str, Any]:
        try:
            image = self.maker.resized(load_image(value, row.root, self.limits))
        except BadImage as bad:
            detail = f"Image {bad.value} {bad.rule}."
            raise BadRow(row.id, "images", bad.reason, bad.remedy, detail) from None
        return {"width": image.width, "height": image.height, "pixels": image.tobytes()}

    def _finished(self, card: CacheCard, shards: list[Shard], folder: Path) -> CacheCard:
        reasons: Counter[str] = Counter()
        for shard in shards:
            reasons.update(shard.reasons)
        total, rows = sum(shard.walked for shard in shards), sum(shard.rows for shard in shards)
        told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        if not rows:
            raise ValueError(f"No row is left of {total:,}: {told or 'there was none'}. Try `data check`.")
        if total - rows > self.max_bad * total:
            raise ValueError(
                f"Too many bad rows, max_bad={self.max_bad:g}: {total - rows:,} of {total:,} ({told}). "
                "`data check` names them."
            )
        if read_shard(folder, len(shards)) is not None:
            raise ValueError(
                f"{folder} has more shards than the source has rows for. It is stale: delete it."
            )
        done = dataclasses.replace(card, complete=True, shards=len(shards), rows=rows, reasons=dict(reasons))
        if done != card:
            done.write(folder)
        return done


def as_ids(spans: Spans) -> list[int]:
    """A prompt as one list: token ids, and -1 - k for image k."""
    ids: list[int] = []
    for span in spans:
        ids += span.ids if isinstance(span, Text) else (-1 - span.image,)
    return ids


def row_digest(row: Row | BadRow, reader: QuestionReader) -> bytes:
    """Of all that decides what becomes of a row."""
    if isinstance(row, BadRow):
        return content_of([row.position, row.reason, row.detail])
    names = reader.columns.image_names
    files = [_file(value, reader.root) for name in names for value in listed(row.get(name))]
    return content_of(row) + content_of(files)


def _file(value: Any, root: Path) -> list[int] | None:
    path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else value
    if not isinstance(path, str | os.PathLike) or str(path)[:5] == "data:" or "://" in str(path)[:16]:
        return None
    try:
        status = os.stat(os.path.join(root, path))
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _digested(rows: Iterator[Placed], reader: QuestionReader) -> tuple[int, str]:
    """How many rows there are, and their digest; nothing is decoded."""
    digest, walked = hashlib.sha256(), 0
    for position, row in rows:
        walked += 1
        digest.update(row_digest(row, reader))
        reader(position, row)
    return walked, digest.hexdigest()


def _check_same(done: Shard, found: tuple[int, str], folder: Path, number: int, card: CacheCard) -> None:
    if found != (done.walked, done.digest):
        first = number * card.shard_rows + 1
        raise ValueError(
            f"{folder} is stale: rows {first:,} to {first + done.walked - 1:,} of {card.source}, or their "
            "images, have changed since. Delete it, or name a new folder."
        )
