"""Where RL, SFT and distillation take their rows: one place, so that all treat unusable rows alike.

A row is unusable if it cannot be read or shown (its image has gone, its gold answer is missing) or if
it has more tokens than the limit. `RowRules` say what then happens; nothing is ever left out without
being named in a warning, counted, and held against a largest share.

Which row comes when is `cursor.place_at`: a pure function of (data, seed, position). All that is
remembered beside the position are the counts, which belong into a checkpoint. A data set smaller than a
step is no error: its rows come again, each epoch in a new order.

With `workers` rows are read ahead in other processes (`prefetch.py`); what needs the policy's weights or
tells and counts stays here, so that nothing is other than without.

Where several processes train, a row is read by the one whose turn its position is (position modulo their
number), and all learn which rows could be used: together they take the rows that one alone would take.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from reflectvlm.data.rows import BadRow
from reflectvlm.interrupt import safe_point
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.train.prefetch import Prefetch
from reflectvlm.train.ranks import Ranks
from reflectvlm.train.reading import InTurn, Read, RowReader
from reflectvlm.train.row_rules import Counts, Item, LongRow, RowRules
from reflectvlm.types import Instruction, Prompt, Sample, Spans

log = logging.getLogger("reflectvlm")


def without_answer(_policy: QwenVL, _sample: Sample) -> Spans:
    return ()


def as_they_are(items: Sequence[Item]) -> Sequence[Item | BadRow]:
    return items


class Share(NamedTuple):
    """What one process has of the rows of a step."""

    items: list[Item]
    positions: list[int]
    """Of each item in the data."""
    places: list[int]
    """Of each item among those of all processes."""
    ids: tuple[str, ...]
    """Of the rows of all processes."""


@dataclass(kw_only=True, eq=False)
class Feed:
    """Rows of a data set as prompts, by position.

    Example: `prompts, trainer.position = feed.take(16, trainer.position)`
    """

    data: Sequence[Sample]
    policy: QwenVL
    seed: int
    rules: RowRules
    limit: int
    """Most tokens of prompt and answer."""
    limit_name: str
    """What the setting is called."""
    instruction: Callable[[int], Instruction]
    """That of a position. It travels to workers, so it must hold no policy."""
    answer: Callable[[QwenVL, Sample], Spans] = without_answer
    """A row's gold answer; raises BadRow if it has none. It travels to workers as well."""
    finish: Callable[[Sequence[Item]], Sequence[Item | BadRow]] = as_they_are
    """What is done to several rows together, such as putting blocks into their answers; a BadRow in the
    place of one with which it cannot be done."""
    workers: int = 0
    """Processes that read rows ahead; 0 reads them here, when they are taken."""
    prefetch: int = 16
    """With workers: how many positions they read ahead."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that share the rows."""
    counts: Counts = field(default=Counts(), init=False)
    _named: set[str] = field(default_factory=set, init=False)
    """Rows that a warning was given for; one says enough."""

    def take(self, count: int, position: int) -> tuple[list[Item], int]:
        """The next `count` usable rows from `position` on, and the position behind the last of them."""
        taken, position = self._taken(count, position)
        return [item for _, item in taken], position

    def _taken(self, count: int, position: int) -> tuple[list[tuple[int, Item]], int]:
        """The same, each row with its position."""
        taken: list[tuple[int, Item]] = []
        in_vain = 0
        with self._whole():
            while len(taken) < count:
                found, after = self._found(count - len(taken), position)
                finished = self._finished_at(found)
                in_vain = 0 if finished else in_vain + after - position
                self._check_any(in_vain)
                taken += finished
                position = after
            self._advance(position)
        return taken, position

    def share(self, count: int, position: int) -> tuple[Share, int]:
        """This process's part of the rows that `take` would give, and the position behind the last."""
        if self.ranks.world == 1:
            taken, position = self._taken(count, position)
            ids = tuple(prompt.sample.id for _, (prompt, _) in taken)
            return Share(
                [item for _, item in taken], [at for at, _ in taken], list(range(len(taken))), ids
            ), position
        own: dict[int, Item] = {}
        used: dict[int, str] = {}
        in_vain = 0
        with self._whole():
            while len(used) < count:
                window = range(position, position + count - len(used))
                before, found = self.counts, len(used)
                for found_ids, counts in self.ranks.together(functools.partial(self._window, window, own)):
                    used |= found_ids
                    before = before.plus(counts)
                self.counts = before
                in_vain = 0 if len(used) > found else in_vain + len(window)
                self._check_any(in_vain)
                position = window.stop
                self._advance(position)
        order = sorted(used)
        return Share(
            [own[at] for at in order if at in own],
            [at for at in order if at in own],
            [place for place, at in enumerate(order) if at in own],
            tuple(used[at] for at in order),
        ), position

    def _window(self, window: range, own: dict[int, Item]) -> tuple[dict[int, str], Counts]:
        """Reads this process's rows of a window into `own`; tells their ids and what was left out."""
        before = self.counts
        mine = [at for at in window if at % self.ranks.world == self.ranks.rank]
        found = [(at, item) for at in mine if (item := self._at(at)) is not None]
        kept = self._finished_at(found)
        own.update(kept)
        return {at: item[0].sample.id for at, item in kept}, self.counts.minus(before)

    def these(self, positions: Sequence[int], *, ahead: bool = True) -> list[Item]:
        """The rows at these positions, without those that cannot be used. With `ahead=False` they are read
        here: what workers are reading ahead is not given up for them."""
        with self._whole():
            found = [(p, item) for p in positions if (item := self._at(p, ahead)) is not None]
            finished = self._finished(found)
            self._advance(max(positions, default=-1) + 1)
        return finished

    def first(self, count: int) -> list[Prompt]:
        """Prompts of the first usable rows, for a look before the run; counts nothing."""
        found: list[Prompt] = []
        for position in range(min(len(self.data), 1000)):
            if len(found) == count:
                break
            try:
                found.append(self._usable(self.reader(position))[0])
            except (BadRow, LongRow) as error:
                if self._rule(error) == "error":
                    raise
        return found

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Within the block there are workers, if any are asked for; they start at once."""
        if self.workers:
            _ = self._ahead
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """Ends the workers; the next row that is taken starts others."""
        if "_ahead" in vars(self):
            self._ahead.close()
            del self._ahead

    def state(self) -> dict[str, int]:
        return self.counts._asdict()

    def load_state(self, state: Mapping[str, int]) -> None:
        self.counts = Counts(**state)

    # -- one row --------------------------------------------------------------------------------

    def _found(self, count: int, position: int) -> tuple[list[tuple[int, Item]], int]:
        """`count` rows that can be read and are short enough as they stand, with their positions."""
        found: list[tuple[int, Item]] = []
        in_vain = 0
        while len(found) < count:
            item = self._at(position)
            if item is None:
                in_vain += 1
                self._check_any(in_vain)
            else:
                found.append((position, item))
                in_vain = 0
            position += 1
        return found, position

    def _at(self, position: int, ahead: bool = True) -> Item | None:
        safe_point()
        try:
            read = self._read_ahead(position) if self.workers and ahead else self.reader(position)
            item = self._usable(read)
        except (BadRow, LongRow) as error:
            self._leave_out(error, position)
            return None
        if read.whole is not None:
            self._tell_shortened(read.whole, item, position)
        return item

    def _usable(self, read: Read) -> Item:
        """The row, if it is short enough. Raises LongRow."""
        if read.too_long is not None:
            raise LongRow(read.item, self.limit, self.limit_name, read.too_long)
        return read.item

    @property
    def reader(self) -> RowReader:
        return RowReader(
            data=self.data,
            policy=self.policy,
            seed=self.seed,
            limit=self.limit,
            limit_name=self.limit_name,
            shorten=self.rules.on_long == "truncate_text",
            instruction=self.instruction,
            answer=self.answer,
        )

    def _read_ahead(self, position: int) -> Read:
        turn, rank = divmod(position, self.ranks.world)
        assert rank == self.ranks.rank, f"position {position} is not that of rank {self.ranks.rank}"
        return self._ahead(turn)

    @functools.cached_property
    def _ahead(self) -> Prefetch[Read]:
        """Reads this process's positions, counted without those of the others."""
        reader = InTurn(self.reader.for_workers(), self.ranks.rank, self.ranks.world)
        return Prefetch(reader, self.workers, -(-self.prefetch // self.ranks.world))

    def _finished(self, found: Sequence[tuple[int, Item]]) -> list[Item]:
        return [item for _, item in self._finished_at(found)]

    def _finished_at(self, found: Sequence[tuple[int, Item]]) -> list[tuple[int, Item]]:
        """The rows after `finish`, without those that it made too long."""
        kept = []
        for (position, _), item in zip(found, self.finish([item for _, item in found]), strict=True):
            if isinstance(item, BadRow):
                self._leave_out(item, position)
            elif self.reader.fits(*item):
                kept.append((position, item))
            else:
                self._leave_out(self._too_long_now(item), position)
        return kept

    def _too_long_now(self, item: Item) -> LongRow:
        cut = (
            f"Only the blocks put into its answer make it too long. Raise {self.limit_name}; "
            "row_rules.on_bad=skip leaves it out."
        )
        return LongRow(
            item, self.limit, self.limit_name, cut if self.rules.on_long == "truncate_text" else ""
        )

    # -- rows that are not used -----------------------------------------------------------------

    def _rule(self, error: BadRow | LongRow) -> str:
        if isinstance(error, BadRow) or self.rules.on_long == "truncate_text":
            return self.rules.on_bad
        return self.rules.on_long

    def _leave_out(self, error: BadRow | LongRow, position: int) -> None:
        if self._rule(error) == "error":
            raise error
        if isinstance(error, BadRow):
            self._warn(f"{error.position} {error.reason}", "row left out: %s", error)
        else:
            name = error.sample.id
            self._warn(f"{name} too long", "row %s left out: %s", name, error.reason)
        if position < self.counts.tried:
            return  # read a second time
        self._count("unreadable" if isinstance(error, BadRow) else "too_long")
        if self.rules.too_many(self.counts.left_out, position + 1):
            so_far = self.counts._replace(tried=position + 1)
            raise ValueError(
                f"Too many rows cannot be used: {so_far}, and row_rules.max_bad={self.rules.max_bad:g}. The "
                f"last: {error} All are in the warnings above. Repair the data, or raise row_rules.max_bad."
            ) from error

    def _tell_shortened(self, whole: Item, short: Item, position: int) -> None:
        before, after = (len(prompt.sample.question) for prompt, _ in (whole, short))
        long = LongRow(whole, self.limit, self.limit_name)
        name = whole[0].sample.id
        self._warn(
            f"{name} shortened",
            "row %s shortened: its question keeps %d of %d characters, because %s",
            name, after, before, long.reason,
        )  # fmt: skip
        if position >= self.counts.tried:
            self._count("shortened")

    def _warn(self, key: str, text: str, *values: Any) -> None:
        if key not in self._named:
            self._named.add(key)
            log.warning(text, *values)

    def _count(self, what: str) -> None:
        self.counts = self.counts._replace(**{what: getattr(self.counts, what) + 1})

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """All rows of a call are counted, or, where a signal or an error cuts it off, none."""
        before = self.counts
        try:
            yield
        except BaseException:
            self.counts = before
            raise

    def _advance(self, position: int) -> None:
        self.counts = self.counts._replace(tried=max(self.counts.tried, position))

    def _check_any(self, in_vain: int) -> None:
        """A data set without a usable row would be gone through for ever."""
        if in_vain > min(len(self.data), 1000):
            raise ValueError(
                f"{in_vain} rows in a row could not be used; the reasons are above. If they are too long for "
                f"{self.limit_name}={self.limit}, raise it, lower policy.max_pixels or set "
                "row_rules.on_long=truncate_text."
            )
