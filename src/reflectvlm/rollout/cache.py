"""A KV cache in which every row has its own length.

The cache of the model library advances all rows together, which forbids that one row takes in an
image block while its neighbours take in one token. Here a forward names its rows and writes each
row's new keys right behind that row's old ones; what lies beyond a row's length is never attended
and is overwritten later, so an unfinished write needs no undoing.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class SlotCache:
    """Leading rows are in use: `lengths[r]` tokens of row r are valid.

    Satisfies what attention layers ask of a cache (`update`, `get_seq_length`); masks and positions
    are the caller's, who gets the mask from `extend`.
    """

    def __init__(self, device: torch.device) -> None:
        self.lengths: Int[Tensor, " R"] = torch.zeros(0, dtype=torch.long, device=device)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows: Tensor | None = None
        self._columns: Tensor = self.lengths
        self._width = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def add_rows(self, count: int) -> Int[Tensor, " count"]:
        """Appends empty rows and returns their numbers."""
        first = len(self)
        self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(count)])
        return torch.arange(first, first + count, device=self.lengths.device)

    def extend(self, rows: Int[Tensor, " R"] | None, counts: Int[Tensor, " R"]) -> Bool[Tensor, "R 1 T S"]:
        """Announces a forward of T = max(counts) tokens a row, right-padded, on `rows` (None: all).

        Returns the mask: new token t of a row sees that row's old tokens and its new ones up to t.
        The lengths move with `commit`, once the forward is done.
        """
        steps = torch.arange(int(counts.max()), device=self.lengths.device)
        lengths = self.lengths if rows is None else self.lengths[rows]
        self._rows, self._columns = rows, lengths[:, None] + steps
        self._width = int(self._columns.max()) + 1
        keys = torch.arange(self._width, device=self.lengths.device)
        return (keys <= self._columns[..., None])[:, None]

    def commit(self, rows: Int[Tensor, " R"] | None, counts: Int[Tensor, " R"]) -> None:
        if rows is None:
            self.lengths = self.lengths + counts
        else:
            self.lengths = self.lengths.index_add(0, rows, counts)

    def update(
        self,
        key: Float[Tensor, "R H T D"],
        value: Float[Tensor, "R H T D"],
        layer_idx: int,
        *_: object,
        **__: object,
    ) -> tuple[Float[Tensor, "R H S D"], Float[Tensor, "R H S D"]]:
        """Called by each attention layer: stores the new keys and values, returns all of the rows'."""
        stored = self._room(layer_idx, (key, value))
        rows = torch.arange(len(key), device=key.device) if self._rows is None else self._rows
        for store, new in zip(stored, (key, value), strict=True):
            store[rows[:, None], :, self._columns] = new.transpose(1, 2)
        keys, values = (store[:, :, : self._width] for store in stored)
        if self._rows is None:
            return keys[: len(key)], values[: len(key)]
        return keys[self._rows], values[self._rows]

    def copy_rows(self, source: Int[Tensor, " R"], target: Int[Tensor, " R"]) -> None:
        """Row target[i] becomes a copy of row source[i]: a prompt shared by its group."""
        width = int(self.lengths[source].max())
        for store in (store for pair in self._layers.values() for store in pair):
            store[target, :, :width] = store[source, :, :width]
        self.lengths[target] = self.lengths[source]

    def keep_rows(self, rows: Int[Tensor, " R"]) -> None:
        """Drops all other rows; `rows` are renumbered from 0 in their order."""
        self.lengths = self.lengths[rows]
        width = int(self.lengths.max()) if len(rows) else 0
        for keys, values in self._layers.values():
            for store in (keys, values):
                store[: len(rows), :, :width] = store[rows, :, :width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        del layer_idx
        return int(self.lengths.max()) if len(self) else 0

    def _room(self, layer: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The layer's storage, grown by half at least when rows or columns no longer fit. Keys and
        values may differ in dtype: under autocast, rotated keys are float32 and values are not."""
        old = self._layers.get(layer)
        have = (0, 0) if old is None else (old[0].shape[0], old[0].shape[2])
        if old is not None and have[0] >= len(self) and have[1] >= self._width:
            return old
        rows = max(len(self), have[0])
        columns = have[1] if have[1] >= self._width else max(self._width, have[1] * 3 // 2)
        keys, values = (one.new_zeros(rows, one.shape[1], columns, one.shape[3]) for one in like)
        if old is not None:
            keys[: have[0], :, : have[1]], values[: have[0], :, : have[1]] = old
        self._layers[layer] = (keys, values)
        return keys, values
