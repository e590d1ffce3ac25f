"""`Calls`: a teacher whose every reply is kept, so that nothing is asked or paid for twice.

    calls = Calls(teacher, cache="replies.jsonl")
    print(calls.estimate(requests))
    replies = calls(requests)                    in their order
    print("\\n".join(calls.counts.lines()))

A reply is in the file before the next request of its thread begins: one JSON object a line, written whole and
under a lock (`rewards/judge_cache.py`). Killed at any moment and started again, only what was under way is
asked again. Kept are replies, refusals and cut replies; what a broken server said is asked again by the next
run. Equal requests are asked once, also by several threads.

A teacher that answers several at one time (`batch`) gets the same batches however much of them is known, and
one that is partly known is asked whole: what a policy says depends, in the last bits, on its neighbours.

Left out: replies that grow old; a cache too large for memory (about 2 KB a reply).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from reflectvlm.curate.call_counts import LIMITS, Counts, Estimate, Outcome, Prices, estimated
from reflectvlm.curate.call_progress import Progress
from reflectvlm.curate.request_key import content_hash, key_of, request_key
from reflectvlm.curate.teachers.reasons import OUT_OF_REACH, is_about_the_request, is_kept, nothing, reason_of
from reflectvlm.curate.teachers.recorded import read_said, said_line
from reflectvlm.curate.types import Request, Said, Teacher
from reflectvlm.data.fetch import BadImage
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.rewards.judge_cache import VerdictCache
from reflectvlm.rewards.lanes import SLICE_SECONDS, side_by_side, still_wanted
from reflectvlm.train.signals import StopRequest

__all__ = ["Calls", "Counts", "Estimate", "Prices", "request_key", "until_stopped"]

log = logging.getLogger("reflectvlm")

_MANY = 8
"""Batches, from which on a trial is worth one more."""


@dataclass(eq=False)
class Calls:
    """Itself a `Teacher`. Example: `Calls(RuleTeacher(), cache="replies.jsonl")(requests)`"""

    teacher: Teacher
    """If it has `concurrency`, so many threads ask it; if it has `batch`, each for so many at one time."""
    cache: str | os.PathLike[str] | None = None
    """File of the replies, also readable by a `RecordedTeacher`. None: they are kept in memory only."""
    prices: Prices = field(default_factory=Prices)
    give_up: int | None = 20
    """So many calls in a row that do not reach the teacher end it all, and what was said is kept. None: no
    end."""
    every: float = 10.0
    """Seconds between two lines about how far it is."""
    _known: VerdictCache | _Memory = field(init=False, repr=False)
    _asking: set[str] = field(default_factory=set, init=False, repr=False)
    _outcomes: dict[str, Outcome] = field(default_factory=dict, init=False, repr=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False, repr=False)
    _in_a_row: int = field(default=0, init=False, repr=False)
    _answers: bool = field(default=False, init=False, repr=False)
    """Whether it has said anything yet, now or in an earlier run."""

    def __post_init__(self) -> None:
        if self.give_up is not None and self.give_up < 1:
            raise ValueError(f"Calls.give_up is {self.give_up}. It must be at least 1, or None for never.")
        if self.cache is None:
            self._known = _Memory()
        else:
            self._known = VerdictCache(
                Path(self.cache), read_said, said_line, what="file of replies", strict=True
            )
            # A resumed work may have nothing left to ask but what its server turns down.
            self._answers = self._known.has(lambda said: said.text is not None)

    @property
    def name(self) -> str:
        return self.teacher.name

    @property
    def counts(self) -> Counts:
        """Of all requests so far, each counted once."""
        with self._changed:
            return Counts.of(self._outcomes.values(), self.prices)

    def __call__(self, requests: Sequence[Request], /) -> list[Said]:
        """Raises ValueError if the teacher cannot be reached or a reply cannot be written, and `Abandoned` if
        a stop was asked for. Whatever was said by then is kept."""
        jobs = self._jobs(requests)
        distinct = _distinct(jobs)
        size = self._batch
        batches = deque(distinct[first : first + size] for first in range(0, len(distinct), size))
        progress = Progress(total=len(distinct), every=self.every)
        self._in_a_row = 0

        def work() -> None:
            try:
                while batch := _next(batches):
                    still_wanted()
                    progress.add(self._settle(batch))
            except BaseException:
                batches.clear()  # the others begin nothing more, and finish what they have
                raise

        lanes = min(len(batches), self._at_once)
        side_by_side([work] * lanes, lanes)
        progress.end()
        return [job.problem or self._outcomes[job.key].said for job in jobs]

    def estimate(self, requests: Sequence[Request], trials: int = 3) -> Estimate:
        """Before the calls; the trials are among them and need not be made again. A teacher with a `batch` is
        tried with one batch, of which nothing is kept: these requests will come in other company. It is made
        of whole rows as the work's batches are, because several answers about one image cost little more
        than one; and where there are many, one goes before it, whose time is that of a beginning."""
        distinct = _distinct(self._jobs(requests))
        missing = [job.request for job in distinct if self._known.get(job.key) is None]
        start = time.monotonic()
        said: Sequence[Said]
        timed: Sequence[Said]
        if self._batch == 1:
            said = timed = self(_spread(missing, min(trials, len(missing)), by_row=False))
        else:
            count = min(self._batch, len(missing)) if trials else 0
            first = count if len(missing) >= _MANY * count else 0
            chosen = _spread(missing, first + count, by_row=True)
            first = min(first, len(chosen) // 2)  # rows with few requests may give fewer than were wanted
            said = self.teacher(chosen[:first]) if first else ()
            start = time.monotonic()
            timed = self.teacher(chosen[first:]) if chosen else ()
            said = [*said, *timed]
        return estimated(
            missing,
            said,
            cached=len(distinct) - len(missing),
            each=_seconds_each(timed, time.monotonic() - start),
            at_once=self._at_once,
            limits={name: getattr(self.teacher, name, None) for name in LIMITS},
            prices=self.prices,
        )

    @property
    def _batch(self) -> int:
        return max(1, getattr(self.teacher, "batch", 1))

    @property
    def _at_once(self) -> int:
        return max(1, getattr(self.teacher, "concurrency", 1))

    def _jobs(self, requests: Sequence[Request]) -> list[_Job]:
        name = self.teacher.name
        jobs = []
        for request in requests:
            try:
                content = content_hash(request)
            except BadImage as bad:
                said = nothing("image", str(bad))
                jobs.append(_Job(request, f"{request.row} {request.purpose} {said.why}", "", said))
                self._note(jobs[-1], said, new=True)
            else:
                jobs.append(_Job(request, key_of(name, content), content))
        return jobs

    def _settle(self, batch: Sequence[_Job]) -> list[Outcome]:
        """What became of each, once it is known or this thread has asked for it."""
        with self._claimed(batch):
            known: list[Said | None] = [self._known.get(job.key) for job in batch]
            asked: Sequence[Said | None] = known
            if None in known:
                asked = self.teacher([job.request for job in batch])
            outcomes = []
            for job, before, said in zip(batch, known, asked, strict=True):
                assert said is not None
                counts = before or self._keep(job, said)
                outcomes.append(self._note(job, counts, new=before is None))
            self._check_reach([one.said for one in outcomes if one.new])
            return outcomes

    def _keep(self, job: _Job, said: Said) -> Said:
        """What counts: what another process has written about it in the meantime, if it has."""
        if not is_kept(said):
            return said
        about = {"request": job.content, "purpose": job.request.purpose, "teacher": self.teacher.name}
        kept = self._known.put(job.key, said, **about)
        assert isinstance(kept, Said)
        return kept

    def _note(self, job: _Job, said: Said, *, new: bool) -> Outcome:
        with self._changed:
            before = self._outcomes.get(job.key)
            outcome = Outcome(job.request.purpose, said, new or (before is not None and before.new))
            self._outcomes[job.key] = outcome
            self._answers = self._answers or said.text is not None
            return outcome

    @contextmanager
    def _claimed(self, batch: Sequence[_Job]) -> Iterator[None]:
        """Within the block no other thread asks for any of them; waits until none does."""
        keys = {job.key for job in batch}
        with self._changed:
            while keys & self._asking:
                self._changed.wait(SLICE_SECONDS)
                still_wanted()
            self._asking |= keys
        try:
            yield
        finally:
            with self._changed:
                self._asking -= keys
                self._changed.notify_all()

    def _check_reach(self, asked: Sequence[Said]) -> None:
        with self._changed:
            for said in asked:
                if self._answers and is_about_the_request(said):
                    continue  # eight answers about each of three images that are too large end no work
                self._in_a_row = self._in_a_row + 1 if reason_of(said) in OUT_OF_REACH else 0
                if self.give_up is not None and self._in_a_row >= self.give_up:
                    raise ValueError(
                        f"{self._in_a_row} calls in a row did not reach {self.teacher.name}, the last for "
                        f"{said.why}. What was said before is kept; see to the server, and start again."
                    )


def until_stopped(work: Callable[[], None]) -> int:
    """Does the work of a command; its exit code. A signal ends the calls, with all that was said kept."""
    with StopRequest() as stop:
        try:
            with abandonable(lambda: stop.requested):
                work()
        except Abandoned:
            log.info("stopped by %s. Start the same command again to go on.", stop.reason)
            return stop.exit_code
    return 0


class _Job(NamedTuple):
    """A request and its names, or why it cannot be asked."""

    request: Request
    key: str
    content: str
    problem: Said | None = None


class _Memory:
    """Replies of this process only, with the same methods as the file."""

    def __init__(self) -> None:
        self._said: dict[str, Said] = {}

    def get(self, key: str) -> Said | None:
        return self._said.get(key)

    def put(self, key: str, said: Said, **_about: Any) -> Said:
        return self._said.setdefault(key, said)


def _distinct(jobs: Sequence[_Job]) -> list[_Job]:
    """Each that can be asked once, in the order of the first."""
    found: dict[str, _Job] = {}
    for job in jobs:
        if job.problem is None:
            found.setdefault(job.key, job)
    return list(found.values())


def _seconds_each(timed: Sequence[Said], together: float) -> float:
    """As the teacher says, else by the clock."""
    return (sum(one.seconds for one in timed) or together) / len(timed) if timed else 0.0


def _spread(requests: Sequence[Request], count: int, *, by_row: bool) -> list[Request]:
    """So many of the requests, from all over them; `by_row`: those about one row stay together."""
    if not count:
        return []
    groups = [[one] for one in requests]
    if by_row:
        groups = [list(group) for _, group in groupby(requests, key=lambda one: (one.row, one.text))]
    wanted = -(-count * len(groups) // len(requests))
    places = ((2 * number + 1) * len(groups) // (2 * wanted) for number in range(wanted))
    return [one for place in places for one in groups[place]][:count]


def _next(batches: deque[list[_Job]]) -> list[_Job]:
    """Nothing if there is none; another thread may have taken the last one."""
    try:
        return batches.popleft()
    except IndexError:
        return []
