"""Training processes that are killed, at random times and at every call of a save, and cut off at every step:
each has to end bit for bit like the one that was left alone. Over SFT, GRPO and BRPO with COPY.

A few in the normal suite; all of them by `make torture`. REFLECTVLM_KILLS is the number of random kills.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from torture_runs import KILLED, KINDS, Forks, assert_same, kill_and_compare

SEED = 20261122
KILLS = int(os.environ.get("REFLECTVLM_KILLS", "200"))
STEPS = 6
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as server:
        yield server


def test_a_few_random_kills_change_nothing(forks: Forks, tmp_path: Path) -> None:
    """Bug: some instant of a run at which a kill loses or changes what follows."""
    for kind in KINDS:
        kill_and_compare(forks, kind, tmp_path / kind, steps=2, kills=1, seed=SEED)


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_many_random_kills_change_nothing(
    forks: Forks, kind: str, tmp_path: Path, record_property: Record
) -> None:
    """Bug: as above, at a rarer instant; also in start-up, in a save, and while a run ends."""
    kinds = list(KINDS)
    share = len(range(kinds.index(kind), KILLS, len(kinds)))
    found = kill_and_compare(forks, kind, tmp_path, steps=STEPS, kills=share, seed=SEED)
    _record(record_property, found, number=found["kills"])
    assert found["kills"] == share


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_call_of_a_save(
    forks: Forks, kind: str, tmp_path: Path, record_property: Record
) -> None:
    """Bug: a call to the disk, in the save of a real run, after which it cannot go on as if nothing had been.
    The second of three saves with keep=1: there is one to lose, and an old one is deleted."""
    steps, output = 3, {"keep": 1}
    whole = tmp_path / "whole"
    forks.finish(kind, whole, steps, output=output, in_save=2, deadly=0)
    points = json.loads((whole / "points.json").read_text())
    assert {call for _, call, _ in points} >= {"mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"}
    # Every run is the same up to there: it is made once and copied.
    start = tmp_path / "start"
    assert forks.run(kind, start, steps, output=output, crash_at=1)["code"] == 3
    for deadly in range(1, len(points) + 1):
        cut = tmp_path / "cut"
        shutil.copytree(start, cut)
        found = forks.run(kind, cut, steps, output=output, in_save=1, deadly=deadly)
        assert found["code"] == KILLED, (points[deadly - 1], (cut / "log.txt").read_text()[-4000:])
        forks.finish(kind, cut, steps, output=output)
        assert_same(cut / KINDS[kind], whole / KINDS[kind])
        shutil.rmtree(cut)
    _record(record_property, {"calls": len(points)}, number=len(points))


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save_every", [1, 2, 3])
def test_cut_off_at_every_step(
    forks: Forks, kind: str, save_every: int, tmp_path: Path, record_property: Record
) -> None:
    """Bug: a step after which a resumed run draws other tokens, repeats rows or forgets moments. 12 rows and
    2 a step (SFT: 10 and 3): the eighth step is in the second epoch, and an epoch ends inside of a step."""
    steps, output = 8, {"save_every": save_every, "samples_every": 1}
    whole = tmp_path / "whole"
    forks.finish(kind, whole, steps, output=output)
    for step in range(steps):
        cut = tmp_path / f"cut-{step}"
        assert forks.run(kind, cut, steps, output=output, crash_at=step)["code"] == 3
        forks.finish(kind, cut, steps, output=output)
        assert_same(cut / KINDS[kind], whole / KINDS[kind])
    _record(record_property, {}, number=steps)


def _record(record_property: Record, details: dict[str, Any], *, number: int) -> None:
    """For the table of `benchmarks/torture.py`."""
    for name, value in {"number": number, "seed": SEED, **details}.items():
        record_property(name, value)
