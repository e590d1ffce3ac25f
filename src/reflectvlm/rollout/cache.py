"""A KV cache in which every row has its own length.

The cache of the model library advances all rows together, which forbids that one row takes in an
image block while its neighbours take in one token. Here a forward names its rows and writes each
row's new keys right behind that row's old ones; what lies beyond a row's length is never attended
and is overwritten later, so an unfinished write needs no undoing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Siblings:
    """R rows as N groups of at most G rows with the same first columns."""

    cut: int
    """So many columns are the same in all rows of every group; 0 if that is nothing worth using."""
    first: Int[Tensor, " N"]
    """A row of each group."""
    members: Int[Tensor, " NG"]
    """Rows of each group, filled up with its first."""
    place: Int[Tensor, " R"]
    """Where each row stands among `members`."""
    in_order: bool
    """True if `members` are just all rows."""
    _taken: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def prompts(
        self, layer: int, keys: Float[Tensor, "R K S d"], values: Float[Tensor, "R K S d"]
    ) -> tuple[Float[Tensor, "NK P d"], Float[Tensor, "NK P d"]]:
        """Keys and values of the common columns, once for each group. No row writes there again, so they are
        gathered once for each layer."""
        if layer not in self._taken:
            self._taken[layer] = tuple(  # type: ignore[assignment]
                x[:, :, : self.cut].index_select(0, self.first).flatten(0, 1) for x in (keys, values)
            )
        return self._taken[layer]

    @classmethod
    def of(cls, origin: Sequence[int], common: Sequence[int], device: torch.device) -> Siblings:
        groups: dict[int, list[int]] = {}
        for row, number in enumerate(origin):
            groups.setdefault(number, []).append(row)
        size = max(map(len, groups.values()), default=0)
        filled = [rows + rows[:1] * (size - len(rows)) for rows in groups.values()]
        place = [0] * len(origin)
        for number, rows in enumerate(groups.values()):
            for slot, row in enumerate(rows):
                place[row] = number * size + slot
        return cls(
            cut=min(common, default=0) if len(origin) >= 2 * len(groups) else 0,
            first=torch.tensor([rows[0] for rows in filled], dtype=torch.long, device=device),
            members=torch.tensor([row for rows in filled for row in rows], dtype=torch.long, device=device),
            place=torch.tensor(place, dtype=torch.long, device=device),
            in_order=[row for rows in filled for row in rows] == list(range(len(origin))),
        )


class SlotCache:
    """Leading rows are in use: `lengths[r]` tokens of row r are valid.

    Satisfies what attention layers ask of a cache (`update`, `get_seq_length`); masks and positions
    are the caller's, who gets the mask from `extend`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """`dtype` is that of the stored keys and values; None is theirs. Under autocast rotated keys are
        float32, and attention would cast all of them again at every token."""
        self.lengths: Int[Tensor, " R"] = torch.zeros(0, dtype=torch.long, device=device)
        self.longest = 0
        """No row is longer: known without asking the device."""
        self.calls = 0
        """How often it was cleared."""
        self._origin = self.lengths
        """Rows of the same number have their first columns in common, `_common` of them."""
        self._common = self.lengths
        self._origins = 0
        self._siblings: Siblings | None = None
        self._dtype = dtype
        self._reserved = (0, 0)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows: Tensor | None = None
        self._columns: Tensor = self.lengths
        self._width = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def add_rows(self, count: int) -> Int[Tensor, " count"]:
        """Appends empty rows and returns their numbers."""
        first = len(self)
        new = torch.arange(self._origins, self._origins + count, device=self.lengths.device)
        self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(count)])
        self._origin = torch.cat([self._origin, new])
        self._common = torch.cat([self._common, self.lengths.new_zeros(count)])
        self._origins, self._siblings = self._origins + count, None
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

    def begin_step(self, columns: Int[Tensor, " R"], width: int) -> Bool[Tensor, "R 1 1 S"]:
        """Announces a forward of one token a row that goes into these columns, all below `width`, and asks
        the device for nothing. Rows are the first R, of which those past `len` may be there to fill up."""
        self._rows, self._columns, self._width = None, columns[:, None], width
        keys = torch.arange(width, device=columns.device)
        return (keys <= columns[:, None])[:, None, None]

    def append(
        self, key: Float[Tensor, "R K d"], value: Float[Tensor, "R K d"], layer: int
    ) -> tuple[Float[Tensor, "R K S d"], Float[Tensor, "R K S d"]]:
        """Stores the one new key and value of each row and returns all of the rows'."""
        stored = self._room(layer, (key[:, :, None], value[:, :, None]))
        rows, columns = torch.arange(len(key), device=key.device), self._columns[:, 0]
        for store, new in zip(stored, (key, value), strict=True):
            store[rows, :, columns] = new.to(store.dtype)
        keys, values = (store[: len(key), :, : self._width] for store in stored)
        return keys, values

    def reserve(self, rows: int, columns: int) -> None:
        """Room for so many from now on: storage then stays where it is until one of them is exceeded."""
        self._reserved = (rows, columns)

    def has_room(self, rows: int, columns: int) -> bool:
        """True if so many rows of so many columns are in storage already."""
        stores = [keys for keys, _ in self._layers.values()]
        return bool(stores) and all(s.shape[0] >= rows and s.shape[2] >= columns for s in stores)

    def addresses(self) -> tuple[int, ...]:
        """Where the storage lies."""
        return tuple(store.data_ptr() for pair in self._layers.values() for store in pair)

    def clear(self) -> None:
        """No rows; the storage is kept for the next ones, and holds no number of the last ones: a NaN would
        outlive its mask."""
        self.lengths, self.longest, self.calls = self.lengths[:0], 0, self.calls + 1
        for store in (store for pair in self._layers.values() for store in pair):
            store.zero_()
        self._origin = self._common = self.lengths
        self._siblings = None

    def commit(self, rows: Int[Tensor, " R"] | None, counts: Int[Tensor, " R"]) -> None:
        self.longest = max(self.longest, self._width)
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
            store[rows[:, None], :, self._columns] = new.transpose(1, 2).to(store.dtype)
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
        self._origin[target] = self._origin[source]
        self._common[source] = self._common[target] = self.lengths[source]
        self._siblings = None

    def siblings(self) -> Siblings:
        """Which rows share how many first columns: those of a group its prompt."""
        if self._siblings is None:
            self._siblings = Siblings.of(self._origin.tolist(), self._common.tolist(), self.lengths.device)
        return self._siblings

    def keep_rows(self, rows: Int[Tensor, " R"]) -> None:
        """Drops all other rows; `rows` are renumbered from 0 in their order. Only rows whose number changes
        are moved."""
        target = (rows != torch.arange(len(rows), device=rows.device)).nonzero().flatten()
        source = rows[target]
        width = int(self.lengths[source].max()) if len(source) else 0
        self.lengths, self._origin, self._common = (
            values[rows] for values in (self.lengths, self._origin, self._common)
        )
        self._siblings = None
        self.longest = int(self.lengths.max()) if len(rows) else 0
        for store in (store for pair in self._layers.values() for store in pair if width):
            store[target, :, :width] = store[source, :, :width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        del layer_idx
        return int(self.lengths.max()) if len(self) else 0

    def _room(self, layer: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The layer's storage, grown by half at least when rows or columns no longer fit. Keys and
        values may differ in dtype: under autocast, rotated keys are float32 and values are not."""
        old = self._layers.get(layer)
        have = (0, 0) if old is None else (old[0].shape[0], old[0].shape[2])
        rows, columns = max(len(self), self._reserved[0]), max(self._width, self._reserved[1])
        if old is not None and have[0] >= rows and have[1] >= columns:
            return old
        rows = max(rows, have[0])
        columns = have[1] if have[1] >= columns else max(columns, have[1] * 3 // 2)
        keys, values = (
            one.new_zeros(rows, one.shape[1], columns, one.shape[3], dtype=self._dtype) for one in like
        )
        if old is not None:
            keys[: have[0], :, : have[1]], values[: have[0], :, : have[1]] = old
        self._layers[layer] = (keys, values)
        return keys, values
