"""Sections A1 and A2: saves that are killed, and disks that do not take them."""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path

import pytest
import torch

from reflectvlm.train.checkpoint import CheckpointStore
from stores import in_child, put, values_of
from torture_disk import Disk, FailAt, Point

# -- A1: killed -------------------------------------------------------------------------------------

# A child imports torch once and forks for every place to die at: before, in the middle of and after each
# call that a save makes to the disk.
KILLER = """
import json, os
from pathlib import Path
import torch
torch.set_num_threads(1)
from reflectvlm.train.checkpoint import CheckpointStore
from torture_disk import Disk, KillAt

def put(store, step, value):
    tensors = {name: {"w": torch.full((8,), value)} for name in ("model", "optimizer")}
    store.save(step, tensors=tensors, state={"value": value})

root, step, keep = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
points = []
put(CheckpointStore(root / "seen", keep=keep), 1, 1.0)
with Disk(points.append).watch():
    put(CheckpointStore(root / "seen", keep=keep), step, 2.0)
results = []
for deadly in range(1, 1000):
    store = CheckpointStore(root / str(deadly), keep=keep)
    put(store, 1, 1.0)
    child = os.fork()
    if child == 0:
        with Disk(KillAt(deadly)).watch():
            put(store, step, 2.0)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status)
    found = store.load(store.latest())
    values = {float(v) for part in found.tensors.values() for v in part["w"]} | {found.state["value"]}
    put(store, 3, 3.0)
    names = sorted(p.name for p in store.folder.iterdir())
    results.append([killed, found.step, sorted(values), names])
    if not killed:
        assert os.WEXITSTATUS(status) == 0
        break
print(json.dumps([points, results]))
"""


@pytest.mark.parametrize(("step", "keep"), [(2, 1), (1, 2)])
def test_a1_killed_at_every_call_of_a_save(tmp_path: Path, step: int, keep: int) -> None:
    """Bug: the loss of the last good checkpoint, a mixture of two, or leftovers, for a new step with keep=1
    (which deletes the old one) and for the same step saved again."""
    points, results = in_child(tmp_path, KILLER, step, keep)
    seen = {(when, call) for when, call, _ in points}
    for call in ("mkdir", "open", "fsync", "rename", "unlink", "rmdir"):
        assert {("before", call), ("after", call)} <= seen, call
    assert ("during", "write") in seen
    # One for each point, and the save that nothing kills.
    assert len(results) == len(points) + 1
    assert not results[-1][0]
    assert results[-1][2] == [2.0]
    assert all(killed for killed, *_ in results[:-1])
    values = [value for _, _, value, _ in results]
    assert values == sorted(values), "once the new one is visible it stays visible"
    assert {tuple(value) for value in values} == {(1.0,), (2.0,)}
    for _, found, value, names in results:
        assert found == (1 if value == [1.0] else step)
        assert names[-1] == "step-000003"
        assert len(names) <= keep
        assert all(name.startswith("step-") for name in names)


RANDOM_KILLS = """
import json, os, random, signal, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from reflectvlm.train.checkpoint import CheckpointStore

root, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store, dice, bad, reached = CheckpointStore(root, keep=1), random.Random(seed), [], 0
for number in range(kills):
    # A child would run on and on; a new one goes on from where the last one was killed.
    child = os.fork()
    if child == 0:
        step = store.load(store.latest()).step if store.latest() else 0
        while True:
            step += 1
            tensors = {name: {"w": torch.full((5000,), float(step))} for name in ("model", "optimizer")}
            store.save(step, tensors=tensors, state={"step": step})
    time.sleep(dice.uniform(0.0, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if (newest := store.latest()) is None:
        bad += [f"nothing left after {reached}"] if reached else []
        continue
    found = store.load(newest)
    values = {float(v) for part in found.tensors.values() for v in part["w"].unique()}
    if values | {found.state["step"]} != {float(found.step)} or found.step < reached:
        bad.append(f"{found.step} with {values}, {found.state} after {reached}")
    reached = found.step
print(json.dumps([bad, reached]))
"""


@pytest.mark.parametrize(
    "kills", [pytest.param(50, id="quick"), pytest.param(2000, marks=pytest.mark.torture, id="long")]
)
@pytest.mark.timeout(1000)
def test_a1_killed_at_random_times(tmp_path: Path, kills: int) -> None:
    """Bug: an instant that no hook stands at, such as the middle of a call to the system."""
    bad, reached = in_child(tmp_path, RANDOM_KILLS, 20261122, kills, seconds=900)
    assert bad == []
    assert reached > 0


# -- A2: the disk does not take it ------------------------------------------------------------------

FULL = """
import json, resource
from pathlib import Path
import torch
from reflectvlm.train.checkpoint import CheckpointStore

store = CheckpointStore(Path(sys.argv[1]))
good = store.save(1, tensors={"model": {"w": torch.ones(4)}}, state={})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
messages = []
for tensors, state in (({"model": {"w": torch.ones(1 << 15)}}, {}), ({}, {"long": "x" * (1 << 17)})):
    try:
        store.save(2, tensors=tensors, state=state)
    except OSError as error:
        messages.append([error.errno, str(error)])
left = sorted(path.name for path in store.folder.iterdir())
print(json.dumps([messages, left, store.latest() == good]))
"""


def test_a2_a_real_limit_of_the_system(tmp_path: Path) -> None:
    """Bug: a full disk raises a stranger's exception, leaves junk, or costs the old one.
    The limit of 64 KiB a file stands for the disk; errno 27 is its "File too large"."""
    messages, left, intact = in_child(tmp_path, FULL)
    assert [code for code, _ in messages] == [27, 27]
    assert all("step 2 could not be written" in text and "too large" in text for _, text in messages)
    assert left == ["step-000001"]
    assert intact


def points_of_a_save(folder: Path, step: int, keep: int) -> list[Point]:
    points: list[Point] = []
    store = CheckpointStore(folder, keep=keep)
    put(store, 1)
    with Disk(points.append).watch():
        put(store, step)
    return [point for point in points if point.when != "after"]


@pytest.mark.parametrize(("step", "keep"), [(2, 1), (1, 2)])
@pytest.mark.parametrize(
    ("code", "stays", "spares"),
    [
        pytest.param(errno.ENOSPC, True, ("unlink", "rmdir", "remove"), id="full"),
        pytest.param(errno.EIO, False, (), id="one error"),
    ],
)
def test_a2_every_call_fails(
    tmp_path: Path, step: int, keep: int, code: int, stays: bool, spares: tuple[str, ...]
) -> None:
    """Bug: at some call of a save an error of the disk costs the old checkpoint, leaves a mixture or
    temporary files, or is a stranger's exception. A full disk stays full, but deleting works."""
    calls = [p for p in points_of_a_save(tmp_path / "seen", step, keep) if p.call not in spares]
    told: list[tuple[int | None, str]] = []
    for bad in range(1, len(calls) + 1):
        store = CheckpointStore(tmp_path / str(bad), keep=keep)
        put(store, 1)
        new = torch.full((8,), 2.0)
        fail = FailAt(bad, code, stays, spares)
        try:
            with Disk(fail).watch():
                store.save(step, tensors={"model": {"w": new}, "optimizer": {"m": new}}, state={"step": 2.0})
        except OSError as error:
            told.append((error.errno, str(error)))
        assert fail.failed is not None
        assert values_of(store) in ({1.0}, {2.0}), fail.failed
        put(store, 3)
        left = sorted(path.name for path in store.folder.iterdir())
        assert all(name.startswith("step-") for name in left), (fail.failed, left)
        assert len(left) <= keep
    assert len(told) > len(calls) / 2  # the others came after the rename: the checkpoint was safe already
    for number, text in told:
        assert number == code
        assert f"Checkpoint of step {step} could not be written" in text
        assert "earlier checkpoints there are intact" in text


def test_a2_temporary_files_are_gone_after_an_error(tmp_path: Path) -> None:
    """Bug: on a full disk, what was half written keeps it full."""
    store = CheckpointStore(tmp_path)
    put(store, 1)
    writes = [
        n
        for n, point in enumerate(points_of_a_save(tmp_path / "seen", 2, 2), start=1)
        if point.when == "during"
    ]
    assert len(writes) >= 4  # two of tensors, the state, the manifest
    (tmp_path / "seen").rename(tmp_path.parent / f"{tmp_path.name}-seen")
    for bad in writes:
        with (
            pytest.raises(OSError, match="could not be written"),
            Disk(FailAt(bad, errno.ENOSPC)).watch(),
        ):
            put(store, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a2_a_folder_that_cannot_be_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: an old checkpoint that cannot be deleted stops the training, though the new one is safe."""
    store = CheckpointStore(tmp_path, keep=1)
    put(store, 1)

    def refuse(point: Point) -> None:
        if point.call in ("unlink", "rmdir", "remove") and "step-000001" not in point.path:
            raise OSError(errno.EACCES, "Permission denied", point.path)

    with caplog.at_level(logging.WARNING), Disk(refuse).watch():
        new = put(store, 2)
    assert store.latest() == new
    assert "could not be deleted" in caplog.text
    put(store, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_a2_a_read_only_folder(tmp_path: Path) -> None:
    """Bug: a bare "Permission denied" without step or remedy, and nothing left of the old checkpoint.
    A file system that is mounted read-only says EROFS at its first call, whoever asks."""
    store = CheckpointStore(tmp_path / "c")
    good = put(store, 1)

    def refuse(point: Point) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), point.path)

    with (
        pytest.raises(
            OSError, match=r"step 2 could not be written to .*Read-only.*fix the folder's permissions"
        ),
        Disk(refuse).watch(),
    ):
        put(store, 2)
    assert store.latest() == good
    if os.geteuid() == 0:
        return  # root writes anywhere
    (tmp_path / "c").chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(OSError, match=r"Permission denied.*fix the folder's permissions"):
            put(store, 2)
        assert store.latest() == good
    finally:
        (tmp_path / "c").chmod(stat.S_IRWXU)


def test_a2_a_missing_folder_a_file_and_too_long_a_name(tmp_path: Path) -> None:
    """Bug: a folder that is not there is an error, or a folder that cannot be made an unclear one."""
    deep = CheckpointStore(tmp_path / "not" / "there" / "yet")
    assert deep.latest() is None
    assert put(deep, 1) == deep.latest()
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(
            OSError, match=r"Checkpoint of step 1 could not be written to .*Free space or fix"
        ):
            put(CheckpointStore(folder), 1)
    for path in (tmp_path / "file", tmp_path / "gone"):
        with pytest.raises(ValueError, match=r"is no valid checkpoint: manifest\.json is missing"):
            deep.load(path)
