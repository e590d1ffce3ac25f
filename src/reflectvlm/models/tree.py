"""Who attends to whom in packed rows, as plain numbers on the host.

A batch whose rows share prompts becomes a *line*: prompt 1, its answers, prompt 2, its answers, …, one
behind the other without padding. A token of a prompt attends to the prompt up to itself, one of an answer
to its whole prompt and to its own answer up to itself. From the line follow what the kinds of attention in
`tree_attention.py` need: small batches of segments (`Pieces`), one variable-length call (`Varlen`), or the
numbers from which FlexAttention's mask is made (`Owners`). No model and no device is known here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reflectvlm.batch import Batch, Layout

WASTE = 1.15
"""Scores that a piece of `Pieces` may compute for each one it needs, before it is cut in two."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """L tokens in segments: each packed row's prompt (possibly empty), then its answers (never empty)."""

    source: Int[np.ndarray, " L"]
    """Place of each token in the flattened batch."""
    where: Int[np.ndarray, "B T"]
    """Place in the line of each token of the batch; padding points to 0."""
    starts: Int[np.ndarray, " s"]
    """Where each segment begins in the line."""
    lengths: Int[np.ndarray, " s"]
    row: Int[np.ndarray, " s"]
    """The packed row, from 0, to which a segment belongs."""
    branch: Int[np.ndarray, " s"]
    """0: the prompt; 1, 2, …: an answer."""

    def __len__(self) -> int:
        return len(self.source)

    @property
    def rows(self) -> int:
        return int(self.row[-1]) + 1

    @property
    def row_starts(self) -> Int[np.ndarray, " N"]:
        return self.starts[self.branch == 0]

    @property
    def widths(self) -> Int[np.ndarray, " N"]:
        """Tokens of each packed row."""
        return np.diff(np.append(self.row_starts, len(self)))

    @property
    def prompts(self) -> Int[np.ndarray, " s"]:
        """Length of the prompt of each segment's row."""
        prompts: np.ndarray = self.lengths[self.branch == 0]
        return prompts[self.row]

    def per_token(self, of_segment: Int[np.ndarray, " s"]) -> Int[np.ndarray, " L"]:
        return np.repeat(of_segment, self.lengths)


def line_up(batch: Batch) -> Line | None:
    """The batch as a line, in the order of the prompts' first rows; None if no two rows share a prompt."""
    return lined(batch.layout, batch.ids.shape[1])


def lined(layout: Layout, width: int) -> Line | None:
    """The same for rows that lie so in a batch of `width` columns."""
    _, first, group = np.unique(layout.prompt, return_index=True, return_inverse=True)
    if len(first) == len(layout.prompt):
        return None
    rank = np.argsort(np.argsort(first))[group]  # of each row's prompt, in order of first appearance
    order = np.argsort(rank, kind="stable")
    begin = np.arange(len(order)) * width + layout.start
    head = layout.prompt_tokens
    leads = np.sort(first)  # the rows that bring their prompts
    # Segments: every row's answer, and in front of a prompt's first answer the prompt itself.
    is_lead = np.isin(order, leads)
    at = np.arange(len(order)) + np.cumsum(is_lead)  # place of each row's answer among the segments
    total = len(order) + len(leads)
    made = {name: np.zeros(total, dtype=np.int64) for name in ("begin", "length", "row", "branch")}
    made["begin"][at], made["length"][at] = (begin + head)[order], (layout.length - head)[order]
    made["row"][at], made["branch"][at] = rank[order], 1
    at = at[is_lead] - 1
    made["begin"][at], made["length"][at], made["row"][at] = begin[leads], head[leads], np.arange(len(leads))
    kept = (made["length"] > 0) | (made["branch"] == 0)
    made = {name: values[kept] for name, values in made.items()}
    starts = np.cumsum(made["length"]) - made["length"]
    source = _ranges(made["begin"], made["length"])
    where = np.zeros(len(order) * width, dtype=np.int64)
    # All rows of a prompt look their prompt up in the one copy.
    where[_ranges(begin, head)] = _ranges(starts[made["branch"] == 0][rank], head)
    where[source] = np.arange(len(source))
    return Line(
        source=source,
        where=where.reshape(-1, width),
        starts=starts,
        lengths=made["length"],
        row=made["row"],
        branch=_numbered(made["branch"]),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Beside:
    """The line's packed rows beside each other, padded on the right: N of at most W tokens."""

    place: Int[np.ndarray, " L"]
    """n * W + w of each token of the line."""
    branch: Int[np.ndarray, "N W"]
    """-1: padding."""


def beside(line: Line) -> Beside:
    shape = (line.rows, int(line.widths.max()))
    row = line.per_token(line.row)
    place = row * shape[1] + np.arange(len(line)) - line.row_starts[row]
    branch = np.full(shape, -1)
    branch.reshape(-1)[place] = line.per_token(line.branch)
    return Beside(place=place, branch=branch)


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Segments of the line of about equal size, attended to in one call. b of them."""

    queries: Int[Tensor, "b q"]
    """Places in the line. What stands behind a shorter segment's end is computed and not used."""
    keys: Int[Tensor, "b k"]
    mask: Bool[Tensor, "#b 1 q k"] | None
    """None: causal, and keys are queries."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    pieces: tuple[Piece, ...]
    back: Int[Tensor, " L"]
    """Where each token of the line stands among the pieces' queries, flattened and joined."""


def pieces(line: Line, device: torch.device | str = "cpu") -> Pieces:
    """Prompts and answers as pieces whose padding costs little (`WASTE`)."""
    made: list[Piece] = []
    back = np.zeros(len(line), dtype=np.int64)
    end = 0
    prompts, answers = (np.flatnonzero((line.branch == 0) == of) for of in (True, False))
    prompts = prompts[line.lengths[prompts] > 0]
    for members in (*_alike(line, prompts, own_only=True), *_alike(line, answers, own_only=False)):
        queries, inside = _padded(line.starts[members], line.lengths[members])
        places = end + np.arange(queries.size).reshape(queries.shape)
        back[queries[inside]] = places[inside]
        end += queries.size
        keys, mask = queries, None
        if line.branch[members[0]]:
            shared = line.prompts[members]
            front, seen = _padded(line.row_starts[line.row[members]], shared)
            keys = np.concatenate([front, queries], axis=1)
            mask = _lower_right(seen, queries.shape[1])
        made.append(
            Piece(
                queries=_tensor(queries, device),
                keys=_tensor(keys, device),
                mask=None if mask is None else _tensor(mask, device),
            )
        )
    return Pieces(pieces=tuple(made), back=_tensor(back, device))


@dataclass(frozen=True, kw_only=True, eq=False)
class Varlen:
    """One call with segments of unequal length: queries are the line itself, keys are gathered.

    Segment i: queries `cu_q[i] : cu_q[i + 1]` of the line, keys `cu_k[i] : cu_k[i + 1]` of the gathered
    ones; the last query sees all of its keys, the one before it all but one (causal at the lower right).
    """

    cu_q: Int[Tensor, " c"]
    cu_k: Int[Tensor, " c"]
    max_q: int
    max_k: int
    keys: Int[Tensor, " K"]
    """Places in the line."""


def varlen(line: Line, device: torch.device | str = "cpu") -> Varlen:
    """Segments that are not empty; an answer's keys are its prompt and itself."""
    used = np.flatnonzero(line.lengths > 0)
    shared = np.where(line.branch == 0, 0, line.prompts)[used]
    lengths = line.lengths[used]
    # Two runs of keys a segment: of the prompt (none for a prompt), and of the segment itself.
    begin = np.stack([line.row_starts[line.row[used]], line.starts[used]], axis=1).flatten()
    runs = np.stack([shared, lengths], axis=1).flatten()
    return Varlen(
        cu_q=_tensor(_cumulative(lengths), device),
        cu_k=_tensor(_cumulative(lengths + shared), device),
        max_q=int(lengths.max()),
        max_k=int((lengths + shared).max()),
        keys=_tensor(_ranges(begin, runs), device),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Owners:
    """Of each token of the line its packed row and its branch there."""

    row: Int[Tensor, " L"]
    branch: Int[Tensor, " L"]

    @property
    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """FlexAttention's `mask_mod`: whether `query` sees `key`. The compiler reads it, so it is one
        expression over tensors."""
        row, branch = self.row, self.branch
        return lambda _batch, _head, query, key: (
            (query >= key) & (row[query] == row[key]) & ((branch[key] == 0) | (branch[key] == branch[query]))
        )


def owners(line: Line, device: torch.device | str = "cpu") -> Owners:
    row, branch = line.per_token(line.row), line.per_token(line.branch)
    return Owners(row=_tensor(row, device), branch=_tensor(branch, device))


def _alike(line: Line, members: Int[np.ndarray, " m"], *, own_only: bool) -> list[np.ndarray]:
    """Segments sorted by size and cut where padding to the largest would cost more than `WASTE`."""
    shared = np.zeros_like(line.lengths) if own_only else line.prompts
    order = members[np.lexsort((line.lengths[members], shared[members]))]
    needed = line.lengths * (line.lengths + shared)
    found: list[list[int]] = []
    most = longest = spent = 0
    for member in order.tolist():
        own, front = int(line.lengths[member]), int(shared[member])
        wide, deep, sum_ = max(longest, own), max(most, front), spent + int(needed[member])
        count = len(found[-1]) + 1 if found else 1
        if found and count * wide * (wide + deep) <= WASTE * sum_:
            found[-1].append(member)
            longest, most, spent = wide, deep, sum_
        else:
            found.append([member])
            longest, most, spent = own, front, int(needed[member])
    return [np.array(one) for one in found]


def _padded(
    starts: Int[np.ndarray, " b"], lengths: Int[np.ndarray, " b"]
) -> tuple[Int[np.ndarray, "b w"], Bool[np.ndarray, "b w"]]:
    """Places of segments as rows of equal length, and which of them are not padding (place 0)."""
    steps = np.arange(int(lengths.max()))
    inside = steps < lengths[:, None]
    return np.where(inside, starts[:, None] + steps, 0), inside


def _lower_right(seen: Bool[np.ndarray, "b p"], queries: int) -> Bool[np.ndarray, "#b 1 q k"]:
    """Query i of an answer sees the prompt, where `seen`, and its answer up to itself."""
    if bool(seen.all()):
        seen = seen[:1]
    own = np.tril(np.ones((queries, queries), dtype=bool))
    front = np.broadcast_to(seen[:, None, None], (len(seen), 1, queries, seen.shape[1]))
    return np.concatenate([front, np.broadcast_to(own, (len(seen), 1, queries, queries))], axis=-1)


def _ranges(begin: Int[np.ndarray, " r"], length: Int[np.ndarray, " r"]) -> Int[np.ndarray, " n"]:
    """begin[0], begin[0] + 1, … (length[0] of them), begin[1], …"""
    offset = np.repeat(begin - (np.cumsum(length) - length), length)
    return offset + np.arange(len(offset))


def _numbered(branch: Int[np.ndarray, " s"]) -> Int[np.ndarray, " s"]:
    """Answers counted from 1 within each packed row, whose prompt is 0."""
    steps = np.arange(len(branch))
    return steps - np.maximum.accumulate(np.where(branch == 0, steps, 0))


def _cumulative(lengths: Int[np.ndarray, " c"]) -> Int[np.ndarray, " d"]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _tensor(values: np.ndarray, device: torch.device | str) -> Tensor:
    made = torch.from_numpy(np.ascontiguousarray(values))
    # Pinned, so that the copy need not be waited for.
    return made.pin_memory().to(device, non_blocking=True) if "cuda" in str(device) else made.to(device)
