"""Spans -> ids, M-RoPE positions and masks. Pure: no model, no tokenizer.

Positions follow Qwen2-VL (arXiv 2409.12191, sec. 2.1): a text token at running position p gets
(p, p, p); an image block whose first token stands at p gives its cell (f, r, c) the position
(p + f, p + r, p + c), and text goes on at p + max(rows, columns).

What neither paper says and this library decides: a block with `keep` gives each kept token the
position it has in the full block, and the text after it goes on where it would after the full one.
Videos are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from reflectvlm.batch import Batch
from reflectvlm.types import Grid, Patches, Prompt, Spans, Text, Visual

NO_IMAGE = -1


class VisionIds(NamedTuple):
    """Ids around and in an image block."""

    start: int
    pad: int
    end: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One sequence, one entry per token. T tokens."""

    ids: Int[np.ndarray, " T"]
    positions: Int[np.ndarray, "3 T"]
    image: Int[np.ndarray, " T"]
    """Index of the image whose feature stands here; -1: text."""
    cell: Int[np.ndarray, " T"]
    """Raster index of the visual token within its image; -1: text."""
    trained: Bool[np.ndarray, " T"]
    predictor: Int[np.ndarray, " T"]
    """Index of the token whose hidden state predicts this one; -1 for the first."""
    logprobs: Float[np.ndarray, " T"]
    next_position: int
    """Position of the text token that would come next."""

    def __len__(self) -> int:
        return len(self.ids)


def cell_positions(grid: Grid) -> Int[np.ndarray, "3 V"]:
    """Offsets (frame, row, column) of an image's visual tokens in raster order."""
    return np.indices(grid).reshape(3, -1)


def flatten(spans: Spans, grids: Sequence[Grid], vision: VisionIds, *, start: int = 0) -> Row:
    """All spans as one row. `start` is the position of the first token.

    Raises ValueError if a `Visual` names an image or a cell that is not there.
    """
    pieces: list[tuple[np.ndarray, ...]] = []
    position = start
    length, before_block = 0, -1
    for span in (Text(ids=()), *spans):  # the empty one gives a row without spans its arrays
        match span:
            case Text():
                n = len(span.ids)
                ids = np.asarray(span.ids, dtype=np.int64)
                positions = np.broadcast_to(np.arange(position, position + n), (3, n))
                text = np.full(n, NO_IMAGE)
                predictor = np.arange(length - 1, length + n - 1)
                if n and before_block >= 0:
                    predictor[0] = before_block
                    before_block = -1
                known = span.logprobs if span.trained and span.logprobs else (0.0,) * n
                logprobs = np.asarray(known, dtype=np.float32)
                pieces.append((ids, positions, text, text, np.full(n, span.trained), predictor, logprobs))
                position += n
            case Visual():
                ids, positions, image, cell = _block(span, grids, vision, position)
                n = len(ids)
                if span.before_sampled:
                    # A second block in a row keeps pointing in front of the first.
                    before_block = before_block if before_block >= 0 else length - 1
                predictor = np.arange(length - 1, length + n - 1)
                pieces.append(
                    (ids, positions, image, cell, np.zeros(n, bool), predictor, np.zeros(n, np.float32))
                )
                position = int(positions[0, -1]) + 1
        length += n
    ids, positions, image, cell, trained, predictor, logprobs = (
        np.concatenate(parts, axis=-1) for parts in zip(*pieces, strict=True)
    )
    return Row(
        ids=ids,
        positions=positions,
        image=image,
        cell=cell,
        trained=trained,
        predictor=predictor,
        logprobs=logprobs,
        next_position=position,
    )


def count_tokens(spans: Spans, grids: Sequence[Grid]) -> int:
    """Tokens of a sequence; an image block counts its visual tokens and the two around them."""

    def count(span: Text | Visual) -> int:
        if isinstance(span, Text):
            return len(span.ids)
        return 2 + (grids[span.image].tokens if span.keep is None else len(span.keep))

    return sum(map(count, spans))


def _block(
    span: Visual, grids: Sequence[Grid], vision: VisionIds, position: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ids, positions, image, cell of one image block whose vision-start stands at `position`."""
    if not 0 <= span.image < len(grids):
        raise ValueError(
            f"Visual(image={span.image}) in a sequence with {len(grids)} images. "
            f"Image indices run from 0 to {len(grids) - 1}; check the re-attention that made this span."
        )
    grid = grids[span.image]
    cells = np.arange(grid.tokens) if span.keep is None else np.asarray(span.keep, dtype=np.int64)
    if len(cells) and (cells.min() < 0 or cells.max() >= grid.tokens or (np.diff(cells) <= 0).any()):
        raise ValueError(
            f"Visual(image={span.image}, keep={span.keep}) on an image of {grid.tokens} visual tokens. "
            f"Kept tokens are distinct, ascending and in 0..{grid.tokens - 1}; sort and deduplicate them."
        )
    n = len(cells)
    inside = cell_positions(grid)[:, cells] + position + 1
    end = position + 1 + max(grid.rows, grid.columns)
    edge = np.array([NO_IMAGE])
    ids = np.concatenate([[vision.start], np.full(n, vision.pad), [vision.end]]).astype(np.int64)
    positions = np.concatenate([np.full((3, 1), position), inside, np.full((3, 1), end)], axis=1)
    return (
        ids,
        positions,
        np.concatenate([edge, np.full(n, span.image), edge]),
        np.concatenate([edge, cells, edge]),
    )


def collate(
    sequences: Sequence[tuple[Prompt, Spans]],
    vision: VisionIds,
    pad_id: int,
    *,
    side: Literal["right", "left"] = "right",
) -> Batch:
    """(prompt, answer spans) pairs -> one padded batch, on the CPU.

    The distinct images of all rows are listed once, however many rows show them. Advantages are 0
    and the global counts those of this batch; trainers replace them.
    """
    rows = [flatten(prompt.spans + answer, prompt.grids, vision) for prompt, answer in sequences]
    images, offsets = _distinct_images([prompt for prompt, _ in sequences])
    width = max((len(row) for row in rows), default=0)
    shape = (len(rows), width)
    ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros((3, *shape), dtype=np.int64)
    attention, trained = np.zeros(shape, bool), np.zeros(shape, bool)
    visual, predictor = np.full(shape, NO_IMAGE), np.zeros(shape, dtype=np.int64)
    logprobs = np.zeros(shape, dtype=np.float32)
    for b, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        first = 0 if side == "right" else width - len(row)
        where = slice(first, first + len(row))
        ids[b, where], positions[:, b, where], attention[b, where] = row.ids, row.positions, True
        trained[b, where], logprobs[b, where] = row.trained, row.logprobs
        visual[b, where] = np.where(row.image < 0, NO_IMAGE, offset[row.image] + row.cell)
        predictor[b, where] = np.maximum(row.predictor, 0) + first
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        attention=torch.from_numpy(attention),
        visual=torch.from_numpy(visual),
        trained=torch.from_numpy(trained),
        predictor=torch.from_numpy(predictor),
        prompt=torch.tensor(_numbered([id(prompt) for prompt, _ in sequences]), dtype=torch.long),
        prompt_tokens=torch.tensor([count_tokens(p.spans, p.grids) for p, _ in sequences], dtype=torch.long),
        images=images,
        old_logprobs=torch.from_numpy(logprobs),
        advantages=torch.zeros(len(rows)),
        num_tokens=float(trained.sum()),
        num_sequences=float(len(rows)),
        row_ids=tuple(prompt.sample.id for prompt, _ in sequences),
    )


def _numbered(keys: Sequence[int]) -> list[int]:
    """Equal keys get equal numbers, from 0 in order of first appearance."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _distinct_images(prompts: Sequence[Prompt]) -> tuple[tuple[Patches, ...], list[np.ndarray]]:
    """Images of all prompts, each `Patches` object once, and per prompt the feature row at which
    each of its images begins (with one spare entry, so that text, index -1, may look it up)."""
    first_row: dict[int, int] = {}
    images: list[Patches] = []
    total = 0
    offsets = []
    for prompt in prompts:
        for patches in prompt.patches:
            if id(patches) not in first_row:
                first_row[id(patches)] = total
                images.append(patches)
                total += patches.grid.tokens
        offsets.append(np.array([*(first_row[id(patches)] for patches in prompt.patches), 0]))
    return tuple(images), offsets
