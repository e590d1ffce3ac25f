"""Who attends to whom in packed rows: every plan says what the plain rows say, on numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reflectvlm.batch import Batch
from reflectvlm.models import tree
from reflectvlm.models.prefix import branch_mask, mask_elements, pack
from reflectvlm.models.tree import Line, beside, line_up, owners, pieces, varlen

Rows = list[tuple[int, int]]
"""(number of the prompt, tokens of the answer). Prompt p has p + 1 tokens."""

SOME: Rows = [(2, 3), (0, 5), (2, 0), (2, 2), (5, 1), (0, 1), (3, 0)]


def make_batch(rows: Rows, side: str = "right") -> Batch:
    """Rows without a model; every token has an id of its own."""
    lengths = torch.tensor([prompt + 1 + answer for prompt, answer in rows])
    width = int(lengths.max())
    steps = torch.arange(width)
    inside = steps < lengths[:, None]
    shape = inside.shape
    return Batch(
        ids=torch.arange(inside.numel()).view(shape),
        positions=torch.arange(3 * inside.numel()).view(3, *shape),
        attention=inside if side == "right" else inside.flip(1),
        visual=torch.arange(inside.numel()).view(shape) % 5 - 1,
        trained=torch.zeros(shape, dtype=torch.bool),
        predictor=torch.zeros(shape, dtype=torch.long),
        prompt=torch.tensor([prompt for prompt, _ in rows]),
        prompt_tokens=torch.tensor([prompt + 1 for prompt, _ in rows]),
        images=(),
        old_logprobs=torch.zeros(shape),
        advantages=torch.zeros(len(rows)),
        num_tokens=1.0,
        num_sequences=1.0,
    )


def line_of(batch: Batch) -> Line:
    line = line_up(batch)
    assert line is not None
    return line


def wanted(batch: Batch, line: Line) -> Tensor:
    """[L, L]: each token of a row sees those of its row up to itself, wherever they lie in the line."""
    seen = torch.zeros(len(line), len(line), dtype=torch.long)
    for row, used in zip(torch.from_numpy(line.where), batch.attention, strict=True):
        places = row[used]
        for number, place in enumerate(places):
            seen[place, places[: number + 1]] = 1
    return seen


def seen_by_pieces(line: Line) -> Tensor:
    plan = pieces(line)
    rows: list[Tensor] = []
    for piece in plan.pieces:
        b, q = piece.queries.shape
        square = torch.ones(q, q, dtype=torch.bool).tril()
        mask = square if piece.mask is None else piece.mask
        assert piece.mask is not None or torch.equal(piece.queries, piece.keys)
        mask = mask.expand(b, 1, q, -1)[:, 0]
        counts = torch.zeros(b, q, len(line), dtype=torch.long)
        # A key that stands twice would count twice in a softmax.
        counts.scatter_add_(2, piece.keys[:, None].expand_as(mask), mask.long())
        rows += counts.flatten(0, 1)
    return torch.stack(rows)[plan.back]


def seen_by_varlen(line: Line) -> Tensor:
    plan = varlen(line)
    seen = torch.zeros(len(line), len(line), dtype=torch.long)
    queries, keys = plan.cu_q.tolist(), plan.cu_k.tolist()
    assert plan.cu_q.dtype == plan.cu_k.dtype == torch.int32
    assert queries[-1] == len(line)
    for i in range(len(queries) - 1):
        own = plan.keys[keys[i] : keys[i + 1]]
        assert queries[i + 1] - queries[i] <= plan.max_q
        assert len(own) <= plan.max_k
        for query in range(queries[i], queries[i + 1]):
            seen[query] += torch.bincount(own[: len(own) - (queries[i + 1] - 1 - query)], minlength=len(line))
    return seen


def seen_by_owners(line: Line) -> Tensor:
    steps = torch.arange(len(line))
    zero = torch.zeros(())
    return owners(line).mask_mod(zero, zero, steps[:, None], steps).long()


def seen_by_mask(line: Line) -> Tensor:
    """The dense mask, read at the places of the line's tokens."""
    rows = beside(line)
    mask = branch_mask(torch.from_numpy(rows.branch))[:, 0]
    row, column = (torch.from_numpy(part) for part in np.divmod(rows.place, mask.shape[1]))
    return (mask[row[:, None], column[:, None], column] & (row[:, None] == row)).long()


PLANS = [seen_by_mask, seen_by_pieces, seen_by_varlen, seen_by_owners]


@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 7)), min_size=2, max_size=9),
    side=st.sampled_from(["right", "left"]),
)
@settings(max_examples=60, deadline=None)
def test_every_plan_sees_what_plain_rows_see(rows: Rows, side: str) -> None:
    """Bug: a branch that sees its sibling, another prompt or padding; a token that misses one."""
    batch = make_batch(rows, side)
    line = line_up(batch)
    if len({prompt for prompt, _ in rows}) == len(rows):
        assert line is None
        return
    assert line is not None
    # Every prompt once, and every answer.
    assert len(line) == sum(p + 1 for p in {p for p, _ in rows}) + sum(n for _, n in rows)
    expected = wanted(batch, line)
    for plan in PLANS:
        assert torch.equal(plan(line), expected), plan.__name__


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_line_holds_the_batch(side: str) -> None:
    """Bug: a token's id is taken from one place of the batch and its position from another."""
    batch = make_batch(SOME, side)
    line = line_of(batch)
    found = torch.from_numpy(line.source)[torch.from_numpy(line.where)]
    firsts = [row for row, (prompt, _) in enumerate(SOME) if prompt not in {p for p, _ in SOME[:row]}]
    for row, (prompt, answer) in enumerate(SOME):
        used = batch.attention[row]
        lead = next(other for other in firsts if SOME[other][0] == prompt)
        ids = batch.ids[row][used]
        shared = batch.ids[lead][batch.attention[lead]][: prompt + 1]
        assert found[row][used].tolist() == [*shared.tolist(), *ids[len(ids) - answer :].tolist()]
    for kind in ("dense", "split"):
        made = pack(batch, line, kind, pad_id=-7)  # type: ignore[arg-type]
        for name in ("ids", "visual"):
            values = getattr(batch, name).flatten()[torch.from_numpy(line.source)]
            assert torch.equal(
                getattr(made, name).flatten()[made.where], values[torch.from_numpy(line.where)]
            )
        positions = batch.positions.flatten(1)[:, torch.from_numpy(line.source)]
        assert torch.equal(
            made.positions.flatten(1)[:, made.where], positions[:, torch.from_numpy(line.where)]
        )


def test_a_line_by_hand() -> None:
    """Prompts 0 (a token) and 2 (three); rows of them in turn, one answer empty."""
    line = line_of(make_batch([(2, 2), (0, 1), (2, 0), (2, 1), (0, 2)]))
    # Rows are 5 wide. Prompt 2, its answers of 2 and 1 tokens; prompt 0, its answers of 1 and 2 tokens.
    assert line.source.tolist() == [0, 1, 2, 3, 4, 18, 5, 6, 21, 22]
    assert line.starts.tolist() == [0, 3, 5, 6, 7, 8]
    assert line.lengths.tolist() == [3, 2, 1, 1, 1, 2]
    assert line.row.tolist() == [0, 0, 0, 1, 1, 1]
    assert line.branch.tolist() == [0, 1, 2, 0, 1, 2]
    assert line.widths.tolist() == [6, 4]
    assert mask_elements(line) == 2 * 6 * 6
    plan = varlen(line)
    assert plan.cu_q.tolist() == [0, 3, 5, 6, 7, 8, 10]
    assert plan.cu_k.tolist() == [0, 3, 8, 12, 13, 15, 18]
    assert plan.keys.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 6, 7, 6, 8, 9]
    assert (plan.max_q, plan.max_k) == (3, 5)


def test_pieces_pad_little() -> None:
    """Bug: one long answer makes every short one as long, and the forward slower than plain rows."""
    line = line_of(make_batch([(20, 3)] * 9 + [(20, 200)] * 2 + [(90, 10), (90, 12)]))
    plan = pieces(line)
    spent = sum(piece.queries.numel() * piece.keys.shape[1] for piece in plan.pieces)
    shared = np.where(line.branch == 0, 0, line.prompts)
    needed = int((line.lengths * (line.lengths + shared)).sum())
    assert needed <= spent <= tree.WASTE * needed
    assert len(plan.pieces) <= 5
    # Where all prompts of a piece agree its mask is the same for all rows, and kept once.
    masks = [piece.mask for piece in plan.pieces if piece.mask is not None]
    assert all(len(mask) == 1 for mask in masks)
    assert sum(mask.numel() for mask in masks) < len(line) ** 2 / 5


# -- mutations: each way of being wrong is seen by the comparison above ---------------------------------


class ShortPrompt(Line):
    """The last token of a prompt is missed by its answers."""

    @property
    def prompts(self) -> Any:
        return np.maximum(super().prompts - 1, 0)


class LongPrompt(Line):
    """Answers see, as if it were of their prompt, the first token behind it: of the first answer."""

    @property
    def prompts(self) -> Any:
        return super().prompts + 1


def turned(line: Line, kind: type[Line]) -> Line:
    return kind(**{name: getattr(line, name) for name in line.__dataclass_fields__})


@pytest.mark.parametrize("kind", [ShortPrompt, LongPrompt])
@pytest.mark.parametrize("plan", [seen_by_pieces, seen_by_varlen])
def test_the_comparison_sees_a_wrong_prompt(plan: Callable[[Line], Tensor], kind: type[Line]) -> None:
    batch = make_batch(SOME)
    line = line_of(batch)
    assert not torch.equal(plan(turned(line, kind)), wanted(batch, line))


@pytest.mark.parametrize("diagonal", [-1, 1])
def test_the_comparison_sees_a_shifted_corner(diagonal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: causal at another corner, so that a query misses itself or sees its future."""
    right = tree._lower_right

    def wrong(seen: Any, queries: int) -> Any:
        mask = right(seen, queries)
        own = np.tril(np.ones((queries, queries), dtype=bool), diagonal)
        return np.concatenate([mask[..., :-queries], np.broadcast_to(own, mask[..., -queries:].shape)], -1)

    monkeypatch.setattr(tree, "_lower_right", wrong)
    batch = make_batch(SOME)
    line = line_of(batch)
    assert not torch.equal(seen_by_pieces(line), wanted(batch, line))


def test_the_comparison_sees_a_sibling() -> None:
    """The mistake: branches of a row are not told apart."""
    batch = make_batch(SOME)
    line = line_of(batch)
    line.branch[:] = np.minimum(line.branch, 1)
    for plan in (seen_by_owners, seen_by_mask):
        assert not torch.equal(plan(line), wanted(batch, line))
