"""`cached(FOLDER)`: a finished cache of prompts as a data source for trainers, memory-mapped.

A trainer takes it as any `Sequence[Sample]`: images come resized already, so that the policy's own processing
only cuts them into patches, and what it makes of them is bit for bit what it makes of the original files.
`prompt(i, policy)` gives the whole prompt without tokenising. Rows are read from disk when they are asked
for; memory holds what is in use. Left out: feeding `prompt` to trainers, which make prompts themselves.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from PIL import Image

from reflectvlm.data.cache_files import BATCH, CacheCard, read_shard, shard_path
from reflectvlm.data.sources import PathLike
from reflectvlm.types import Instruction, Prompt, Sample, Span, Spans, Text, Visual

_OPEN = 16
"""Shards that are mapped at one time."""


def cached(folder: PathLike, *, policy: Any = None, instruction: Instruction | None = None) -> Cached:
    """The rows of a cache. With a policy it is held against its tokenizer, its image processor and the
    instruction, and refused where one of them is another."""
    found = Cached(Path(folder))
    if policy is not None:
        found.check(policy, instruction or Instruction())
    return found


class Cached(Sequence[Sample]):
    """Rows by number. Picklable: workers map the files anew."""

    def __init__(self, folder: Path) -> None:
        card = CacheCard.read(folder)
        if card is None:
            raise ValueError(
                f"'{folder}' holds no cache. Make one: reflectvlm data cache FILE model=… out={folder}"
            )
        if not card.complete:
            raise ValueError(f"The cache {folder} is not finished. Give its `data cache` command again.")
        self.folder, self.card = folder, card
        counts = []
        for number in range(card.shards):
            shard = read_shard(folder, number)
            if shard is None:
                raise ValueError(
                    f"{shard_path(folder, number)} is missing. Give the `data cache` command again."
                )
            counts.append(shard.rows)
        self._ends = list(accumulate(counts))
        self._maps: OrderedDict[int, Any] = OrderedDict()

    def __reduce__(self) -> tuple[type[Cached], tuple[Path]]:
        return Cached, (self.folder,)

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self._sample(self._row(index))

    def prompt(self, index: int, policy: Any) -> Prompt:
        """As `policy.prompt` makes it of this row, without its tokenizer."""
        row = self._row(index)
        sample = self._sample(row)
        patches = tuple(map(policy.patches, sample.images))
        return Prompt(sample=sample, spans=as_spans(row["ids"]), patches=patches)

    def check(self, policy: Any, instruction: Instruction) -> None:
        """Raises ValueError if this policy would make other prompts."""
        from reflectvlm.data.prompt_maker import PromptMaker

        if other := self.card.differences(PromptMaker.of(policy, instruction).settings):
            raise ValueError(
                f"The cache {self.folder} was made with another {', another '.join(other)} than the run has. "
                "Make it again with the run's model, min_pixels, max_pixels and instruction."
            )

    def _sample(self, row: dict[str, Any]) -> Sample:
        images = tuple(
            Image.frombytes("RGB", (one["width"], one["height"]), one["pixels"]) for one in row["images"]
        )
        return Sample(
            id=row["id"],
            question=row["question"],
            answer=row["answer"],
            images=images,
            columns=json.loads(row["columns"]),
        )

    def _row(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        number = bisect_right(self._ends, index)
        place = index - (self._ends[number - 1] if number else 0)
        batch = self._map(number).get_batch(place // BATCH)
        row: dict[str, Any] = batch.slice(place % BATCH, 1).to_pylist()[0]
        return row

    def _map(self, number: int) -> Any:
        import pyarrow

        if number not in self._maps:
            path = shard_path(self.folder, number)
            try:
                self._maps[number] = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
            except (pyarrow.ArrowException, OSError) as error:
                why = str(error).splitlines()[0][:120]
                raise ValueError(
                    f"{path} cannot be read ({why}). Delete it and give the `data cache` command again."
                ) from None
            while len(self._maps) > _OPEN:
                self._maps.popitem(last=False)
        self._maps.move_to_end(number)
        return self._maps[number]


def as_spans(ids: Sequence[int]) -> Spans:
    """The opposite of `cache_build.as_ids`."""
    spans: list[Span] = []
    run: list[int] = []
    for one in ids:
        if one >= 0:
            run.append(one)
            continue
        spans += [Text(ids=tuple(run))] if run else []
        spans.append(Visual(image=-1 - one))
        run = []
    return (*spans, Text(ids=tuple(run))) if run else tuple(spans)
