"""Calls to a server that misbehaves, killed again and again: started once more they end with the same.

A few kills in the normal suite, many by `make torture`; REFLECTVLM_KILLS is the number of random ones."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calls_runs import KILLED, Tries
from teacher_server import Unruly, running

SEED = 20261122
KILLS = int(os.environ.get("REFLECTVLM_KILLS", "200"))
TEXTS = [
    *(f"question {number}" for number in range(9)),
    "refuse 1",
    "long 1",
    "forbidden 1",
    "question 3",  # asked twice, paid for once
]
Record = Callable[[str, object], None]
KEPT = len({*TEXTS}) - 1
"""What the cache has in the end: everything but what the server forbids."""


@pytest.fixture(scope="module")
def tries() -> Iterator[Tries]:
    with Tries() as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[Unruly]:
    with running(Unruly(delay=0.005)) as server:
        yield server


class Work:
    """One piece of work that is tried until it is done."""

    def __init__(self, tries: Tries, server: Unruly, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.tries, self.server = tries, server
        self.cache, self.out = root / "replies.jsonl", root / "out.jsonl"

    def go(self, **how: Any) -> dict[str, Any]:
        asked = {"url": self.server.url, "cache": str(self.cache), "out": str(self.out), "texts": TEXTS}
        return self.tries.run({**asked, **how})

    def finish(self) -> bytes:
        """The final file. Every reply is in the cache once, and that of its own question."""
        assert self.go()["code"] == 0, (self.out.parent / "out.jsonl.log").read_text()[-3000:]
        lines = []
        for line in self.cache.read_bytes().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue  # cut by a kill
        assert len(lines) == len({line["key"] for line in lines}) == KEPT
        rows = [json.loads(line) for line in self.out.read_text().splitlines()[:-1]]
        for row, text in zip(rows, TEXTS, strict=True):
            if text.startswith("question"):
                assert row["text"] == f"reply to {text}"
            else:
                assert row["why"].partition(":")[0] == {"refuse": "refused", "long": "cut"}.get(
                    text.split()[0], "http 4xx"
                )
        return self.out.read_bytes()


@pytest.fixture(scope="module")
def whole(tries: Tries, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, float]:
    """The final file and the seconds of a run that nobody killed, on a server of its own."""
    with running(Unruly(delay=0.005)) as server:
        start = time.monotonic()
        work = Work(tries, server, tmp_path_factory.mktemp("whole"))
        return work.finish(), time.monotonic() - start


def test_a_server_that_misbehaves_answers_everything_once(
    tries: Tries, whole: tuple[bytes, float], tmp_path: Path
) -> None:
    """Bug: a 429, a 500, a slow, cut or garbled reply loses a row; a reply is asked for twice; a second start
    asks again for what is known."""
    with running(Unruly(stumbles=4)) as server:
        work = Work(tries, server, tmp_path)
        assert work.finish() == whole[0]
        assert {*server.answered.values()} == {1}
        assert sum(server.asked.values()) > len(server.asked)  # it did stumble
        before = server.asked.copy()
        work.out.unlink()
        assert work.finish() == whole[0]
        assert server.asked - before == {"forbidden 1": 1}  # the server's fault: tried again


@pytest.mark.parametrize(("number", "where"), [(1, "before"), (3, "middle"), (KEPT, "after")])
def test_killed_in_a_write_nothing_is_lost(
    tries: Tries, whole: tuple[bytes, float], tmp_path: Path, number: int, where: str
) -> None:
    """Bug: half a line swallows the next one, or a reply that is in the file is asked for again."""
    killed_in_a_write(tries, whole, tmp_path, number, where)


def test_a_few_random_kills_change_nothing(tries: Tries, whole: tuple[bytes, float], tmp_path: Path) -> None:
    """Bug: some instant at which a kill loses or doubles a reply."""
    killed_at_random(tries, whole, tmp_path, kills=3)


def test_a_signal_keeps_what_was_said(tries: Tries, whole: tuple[bytes, float], tmp_path: Path) -> None:
    """Bug: Ctrl-C or a preempted job loses the finished calls, or waits for all that are left."""
    with running(Unruly(delay=0.1, stumbles=0)) as server:
        work = Work(tries, server, tmp_path)
        found: dict[str, Any] = {}
        thread = threading.Thread(target=lambda: found.update(work.go()))
        thread.start()
        while not (work.cache.exists() and work.cache.read_bytes().count(b"\n") >= 2):
            time.sleep(0.01)
        (child,) = children(tries.process.pid)
        os.kill(child, signal.SIGTERM)
        thread.join(20)
        assert found["code"] == 128 + signal.SIGTERM
        assert not work.out.exists()
        kept = [json.loads(line) for line in work.cache.read_text().splitlines()]
        before = server.asked.copy()
        assert 2 <= len(kept) < KEPT
        assert work.finish() == whole[0]
        again = {f"reply to {text}" for text in server.asked - before}
        assert again
        assert not again & {line["reply"] for line in kept}


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("where", ["before", "middle", "after"])
def test_killed_in_every_write(
    tries: Tries, whole: tuple[bytes, float], tmp_path: Path, where: str, record_property: Record
) -> None:
    """Bug: as above, at another line."""
    record_property("number", KEPT)
    for number in range(1, KEPT + 1):
        killed_in_a_write(tries, whole, tmp_path / str(number), number, where)


@pytest.mark.torture
@pytest.mark.timeout(7200)
def test_many_random_kills_change_nothing(
    tries: Tries, whole: tuple[bytes, float], tmp_path: Path, record_property: Record
) -> None:
    """Bug: as above, at a rarer instant."""
    record_property("number", KILLS)
    record_property("seed", SEED)
    killed_at_random(tries, whole, tmp_path, kills=KILLS)


def killed_in_a_write(tries: Tries, whole: tuple[bytes, float], root: Path, number: int, where: str) -> None:
    with running(Unruly(delay=0.002)) as server:
        work = Work(tries, server, root)
        assert work.go(deadly=[number, where])["code"] == KILLED
        lines = work.cache.read_bytes().count(b"\n")
        assert lines == number - (where != "after")
        assert work.finish() == whole[0]


def killed_at_random(tries: Tries, whole: tuple[bytes, float], root: Path, kills: int) -> None:
    """One piece of work after the other is killed several times, each time a little later, and then done."""
    chance, done, number = random.Random(SEED), 0, 0
    while done < kills:
        number += 1
        with running(Unruly(delay=0.005)) as server:
            work = Work(tries, server, root / str(number))
            for _ in range(3):
                after = chance.uniform(0.0, 0.8 * whole[1])
                done += work.go(kill_after=after)["code"] == KILLED and done < kills
            assert work.finish() == whole[0]
            # Of each kill at most what was under way, four at one time, is paid for again.
            assert sum(server.answered.values()) <= len({*TEXTS}) + 1 * 3 + 4 * 3


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
