"""The cache with a length per row, against plain lists."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from reflectvlm.rollout.cache import SlotCache

LAYERS, HEADS, SIZE = 2, 2, 3
steps = st.lists(
    st.tuples(st.sampled_from(["add", "all", "some", "copy", "keep", "undone"]), st.integers(0, 10**6)),
    min_size=1,
    max_size=12,
)


class Twin:
    """The cache beside a plain list of numbers per row; every write is compared."""

    def __init__(self) -> None:
        self.cache = SlotCache(torch.device("cpu"))
        self.rows: list[list[float]] = []
        self.next = 1.0

    def forward(self, rows: list[int] | None, counts: list[int], commit: bool = True) -> None:
        where = None if rows is None else torch.tensor(rows)
        chosen = list(range(len(self.rows))) if rows is None else rows
        mask = self.cache.extend(where, torch.tensor(counts))
        new = self.next + torch.arange(len(chosen) * max(counts)).view(len(chosen), 1, max(counts), 1)
        self.next += len(chosen) * max(counts)
        for layer in range(LAYERS):
            key = (new + layer / 4).expand(-1, HEADS, -1, SIZE)
            keys, values = self.cache.update(key, -key, layer)
            assert torch.equal(keys, -values)
            for i, row in enumerate(chosen):
                for t in range(counts[i]):
                    seen = keys[i, :, mask[i, 0, t]]
                    expected = [x + layer / 4 for x in self.rows[row]] + (
                        new[i, 0, : t + 1, 0] + layer / 4
                    ).tolist()
                    assert seen[0, :, 0].tolist() == expected
                    assert torch.equal(seen, seen[:1, :, :1].expand_as(seen))
        if commit:
            self.cache.commit(where, torch.tensor(counts))
            for i, row in enumerate(chosen):
                self.rows[row] += new[i, 0, : counts[i], 0].tolist()


@given(script=steps)
@settings(max_examples=150, deadline=None)
def test_every_row_sees_its_own_tokens_and_no_others(script: list[tuple[str, int]]) -> None:
    """Rows of unequal lengths, padded chunks, copies, removals and writes that are taken back: a row
    that sees one stale or foreign column gets other log-probs than the trainer."""
    twin = Twin()
    for what, number in script:
        r = len(twin.rows)
        random = torch.Generator().manual_seed(number)
        some = torch.randperm(max(r, 1), generator=random)[: 1 + number % max(r, 1)].tolist()
        lengths = (1 + torch.randint(0, 4, (len(some),), generator=random)).tolist()
        if what == "add" or r == 0:
            count = 1 + number % 3
            assert twin.cache.add_rows(count).tolist() == list(range(r, r + count))
            twin.rows += [[] for _ in range(count)]
            twin.forward(list(range(r, r + count)), [2] * count)
        elif what == "all":
            twin.forward(None, [1] * r)
        elif what == "some":
            twin.forward(some, lengths)
        elif what == "undone":
            twin.forward(None, [1] * r, commit=False)
        elif what == "copy" and r > 1:
            twin.cache.copy_rows(torch.tensor(some[:1]), torch.tensor([(some[0] + 1) % r]))
            twin.rows[(some[0] + 1) % r] = list(twin.rows[some[0]])
        elif what == "keep":
            twin.cache.keep_rows(torch.tensor(some))
            twin.rows = [twin.rows[i] for i in some]
        assert twin.cache.lengths.tolist() == [len(row) for row in twin.rows]
        assert twin.cache.get_seq_length() == max(len(row) for row in twin.rows)


def test_all_rows_may_leave() -> None:
    twin = Twin()
    twin.cache.add_rows(2)
    twin.rows = [[], []]
    twin.forward(None, [3, 1])
    twin.cache.keep_rows(torch.tensor([], dtype=torch.long))
    assert len(twin.cache) == 0
    assert twin.cache.get_seq_length() == 0
    twin.rows = []
    twin.cache.add_rows(1)
    twin.rows = [[]]
    twin.forward([0], [5])


class Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the numbers that indexed assignments write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func.overloadpacket is torch.ops.aten.index_put_:
            self.numbers += args[2].numel()
        return func(*args, **(kwargs or {}))


def test_only_rows_whose_number_changes_are_moved() -> None:
    """Bug: one row that leaves costs a copy of the whole cache."""
    twin = Twin()
    twin.cache.add_rows(16)
    twin.rows = [[] for _ in range(16)]
    twin.forward(None, [5] * 16)
    with Written() as written:
        twin.cache.keep_rows(torch.tensor([0, 1, 14, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]))
    # One row of 5 tokens: keys and values of 2 layers of 2 heads of 3 numbers.
    assert written.numbers == 5 * 2 * 2 * 2 * 3
    twin.rows = [twin.rows[i] for i in (0, 1, 14, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)]
    twin.forward(None, [1] * 14)
