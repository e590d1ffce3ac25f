"""Reliability, section A: whatever happens to a checkpoint, the last whole one is found, and no other."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reflectvlm.train import checkpoint, manifest
from reflectvlm.train.checkpoint import CheckpointStore
from reflectvlm.train.run_folder import RunFolder
from torture_disk import Disk, FailAt, Point

HERE = Path(__file__).parent


def put(store: CheckpointStore, step: int) -> Path:
    """A small checkpoint whose content tells its step."""
    value = torch.full((8,), float(step))
    return store.save(step, tensors={"model": {"w": value}, "optimizer": {"m": value}}, state={"step": step})


def values_of(store: CheckpointStore) -> set[float]:
    """Every number in the newest checkpoint: one, unless two were mixed."""
    newest = store.latest()
    assert newest is not None
    found = store.load(newest)
    return {float(v) for part in found.tensors.values() for one in part.values() for v in one} | {
        found.state["step"]
    }


def in_child(tmp_path: Path, script: str, *arguments: object) -> Any:
    """What a script prints as JSON."""
    file = tmp_path / "child.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{script}")
    command = [sys.executable, str(file), str(tmp_path / "runs"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
def test_a1_killed_at_random_times(tmp_path: Path, kills: int) -> None:
    """Bug: an instant that no hook stands at, such as the middle of a call to the system."""
    bad, reached = in_child(tmp_path, RANDOM_KILLS, 20261122, kills)
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


# -- A3: damaged afterwards -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "delete", "empty", "folder"])
def test_a3_damage_is_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    """Bug: a resume from wrong numbers. Whatever happens to a file, the earlier checkpoint is taken by
    `latest` (resume=auto), and `load` (resume=PATH) refuses and names the file."""
    store = CheckpointStore(tmp_path / "c")
    good, value = put(store, 1), torch.ones(8)
    tensors = {"model": {"w": value}, "optimizer": {"m": value}}
    bad = store.save(2, tensors=tensors, state={"step": 2})
    victim = bad / name
    data = victim.read_bytes()
    victim.unlink()
    if damage == "folder":
        victim.mkdir()
    elif damage != "delete":
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        changed = {"flip": flipped, "cut": data[:-1], "longer": data + b"\0", "empty": b""}
        victim.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING):
        assert store.latest() == good
    assert name in caplog.text
    with pytest.raises(ValueError, match=f"{name} .*newest valid one"):
        store.load(bad)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a3_any_flipped_bit(tmp_path: Path, name: str) -> None:
    """Bug: some bit of a file that no checksum covers; or a damaged manifest that reads as "a newer format,
    update"."""
    store = CheckpointStore(tmp_path)
    path = put(store, 1) / name
    whole = path.read_bytes()

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(place=st.integers(0, len(whole) - 1), bit=st.integers(0, 7))
    def flip(place: int, bit: int) -> None:
        data = bytearray(whole)
        data[place] ^= 1 << bit
        path.write_bytes(bytes(data))
        assert store.latest() is None

    flip()
    path.write_bytes(whole)
    assert store.latest() == path.parent


def test_a3_only_the_manifest_decides(tmp_path: Path) -> None:
    """Bug: "the largest number wins". Empty folders, strangers and renamed ones are passed over."""
    store = CheckpointStore(tmp_path)
    assert CheckpointStore(tmp_path / "missing").latest() is None
    good = put(store, 1)
    (tmp_path / "step-000009").mkdir()
    (tmp_path / "step-final").mkdir()
    (tmp_path / "step-000008").write_text("a file")
    (tmp_path / ".tmp-step-000007-1").mkdir()
    assert store.latest() == good
    good.rename(tmp_path / "step-000005")
    assert store.latest() is None
    put(store, 2)
    assert not (tmp_path / ".tmp-step-000007-1").exists()


# -- A4: what stays ---------------------------------------------------------------------------------


def test_a4_retention_never_leaves_none(tmp_path: Path) -> None:
    """Bug: a full disk, and keep=1 that ever deletes the only one."""
    store = CheckpointStore(tmp_path / "two", keep=2)
    for step in (1, 2, 3, 10):
        put(store, step)
    assert sorted(p.name for p in store.folder.iterdir()) == ["step-000003", "step-000010"]
    one = CheckpointStore(tmp_path / "one", keep=1)
    for step in (1, 2):
        put(one, step)
        assert one.latest() == one.folder / f"step-{step:06d}"
    assert len(list(one.folder.iterdir())) == 1


def test_a4_keep_1_has_a_whole_one_at_every_call(tmp_path: Path) -> None:
    """Bug: between two calls of a save with keep=1 there is no checkpoint at all: a failure there, or a
    reader that looks then, finds nothing."""
    store = CheckpointStore(tmp_path, keep=1)
    seen: list[str | None] = []

    def look(_: Point) -> None:
        found = [path.name for path in tmp_path.glob("*step-*") if manifest.looks_valid(path)]
        seen.append(min(found, default=None))

    put(store, 1)
    for step in (2, 3, 3):
        with Disk(look).watch():
            put(store, step)
    assert len(seen) > 100
    assert None not in seen


def test_a4_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    """Bug: keep=2 keeps one good and one cut checkpoint while a second good one goes."""
    store = CheckpointStore(tmp_path, keep=2)
    put(store, 1)
    cut = put(store, 2) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    put(store, 3)
    assert (tmp_path / "step-000001").exists()


READER = """
import json, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from reflectvlm.train.checkpoint import CheckpointStore

store, ready = CheckpointStore(Path(sys.argv[1])), Path(sys.argv[2])
ready.touch()
looks, seen, none, gone, mixed = 0, set(), 0, 0, []
while ready.exists():
    looks += 1
    path = store.latest()
    if path is None:
        none += bool(seen)
        continue
    try:
        found = store.load(path)
    except ValueError as error:  # it was rotated away since
        assert "is no valid checkpoint" in str(error), error
        gone += 1
        continue
    values = {float(v) for part in found.tensors.values() for v in part["w"].unique()}
    if values | {found.state["step"]} != {float(found.step)}:
        mixed.append([found.step, sorted(values)])
    seen.add(found.step)
print(json.dumps({"looks": looks, "seen": len(seen), "none": none, "gone": gone, "mixed": mixed}))
"""


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize(
    "saves", [pytest.param(120, id="quick"), pytest.param(4000, marks=pytest.mark.torture, id="long")]
)
def test_a4_a_reader_while_saves_rotate(tmp_path: Path, keep: int, saves: int) -> None:
    """Bug: a second process, such as one that evaluates checkpoints, crashes, finds none or reads a mixture
    while the trainer rotates them away under it."""
    script, ready = tmp_path / "reader.py", tmp_path / "ready"
    script.write_text(f"import sys\n{READER}")
    store = CheckpointStore(tmp_path / "c", keep=keep)
    command = [sys.executable, str(script), str(store.folder), str(ready)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        while not ready.exists():
            assert reader.poll() is None, reader.communicate()
        for step in range(1, saves + 1):
            value = torch.full((2000,), float(step))
            tensors = {"model": {"w": value}, "optimizer": {"w": value}}
            store.save(step, tensors=tensors, state={"step": float(step)})
        ready.unlink()
        out, err = reader.communicate(timeout=60)
    assert reader.returncode == 0, err
    result = json.loads(out)
    assert result["mixed"] == []
    assert result["none"] == 0
    assert result["seen"] > 5


def test_a4_a_checkpoint_that_goes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the same, at the one instant that a race seldom meets: between finding a file and reading it."""
    store = CheckpointStore(tmp_path, keep=1)
    old = put(store, 1)
    digest = manifest.sha256

    def rotate(path: Path) -> str:
        if path.parent == old and old.exists():
            put(store, 2)
        return digest(path)

    monkeypatch.setattr(manifest, "sha256", rotate)
    assert store.latest() == tmp_path / "step-000002"
    with pytest.raises(ValueError, match="step-000001 is no valid checkpoint"):
        store.load(old)


@pytest.mark.parametrize("target", ["", "gone/step-000009", "latest", "step-000001"])
def test_a4_a_link_named_latest_is_nobodys(tmp_path: Path, target: str) -> None:
    """Bug: a `latest` that another tool or a user left, empty, dangling or pointing at itself, decides or
    crashes the resume. Our own rule needs no such file."""
    store = CheckpointStore(tmp_path, keep=1)
    good = put(store, 1)
    latest = tmp_path / "latest"
    latest.symlink_to(target) if target else latest.write_text("")
    (tmp_path / "step-000005").symlink_to(tmp_path / "nowhere")
    assert store.latest() == good
    new = put(store, 2)
    assert store.latest() == new
    assert os.path.lexists(latest)


def test_a4_same_step_twice_and_going_back(tmp_path: Path) -> None:
    """Bug: "directory not empty" on a step saved again, and a resume that mixes two histories."""
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        put(store, step)
    put(store, 3)
    store.supersede_after(1)
    assert store.latest() == tmp_path / "step-000001"
    kept = ["step-000001", "superseded-step-000002", "superseded-step-000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    put(store, 2)
    store.supersede_after(1)
    assert store.latest() == tmp_path / "step-000001"
    assert (tmp_path / "superseded-step-000002-again").is_dir()


# -- A5: other formats, and no code in data ---------------------------------------------------------


@pytest.mark.parametrize(("by", "remedy"), [(1, "Update reflectvlm"), (-1, "Start anew")])
def test_a5_another_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: int, remedy: str
) -> None:
    """Bug: a program misreads, or silently passes over, a checkpoint of another version of itself."""
    store, ours = CheckpointStore(tmp_path), checkpoint.FORMAT_VERSION
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", ours + by)
    path = put(store, 1)
    monkeypatch.undo()
    says = rf"format {ours + by}; this version of reflectvlm reads {ours}\. {remedy}"
    for read in (store.latest, lambda: store.load(path)):
        with pytest.raises(ValueError, match=says):
            read()


PLANTED = """
import builtins, io, json, os, pickle
from pathlib import Path
import torch
from reflectvlm.train.checkpoint import CheckpointStore

class Evil:
    def __reduce__(self):
        return (os.mkdir, (sys.argv[1] + "-executed",))

store = CheckpointStore(Path(sys.argv[1]))
path = store.save(1, tensors={"model": {"w": torch.ones(2)}}, state={"step": 1})
planted = ["pytorch_model.bin", "optimizer.pt", "state.pkl", "training_args.bin", "model.ckpt", "rng.pth"]
for name in planted:
    for folder in (path, store.folder):
        (folder / name).write_bytes(pickle.dumps(Evil()))
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
sys.addaudithook(lambda event, args: opened.append("unpickled") if event == "pickle.find_class" else None)
found = store.load(store.latest())
assert found.state == {"step": 1}
print(json.dumps([sorted({name for name in opened if Path(name).name in planted or name == "unpickled"}),
                  os.path.exists(sys.argv[1] + "-executed"), any("state.json" in name for name in opened)]))
"""


def test_a5_a_planted_pickle_is_never_opened(tmp_path: Path) -> None:
    """Bug: a checkpoint from somebody else runs code when it is loaded."""
    opened, executed, watched = in_child(tmp_path, PLANTED)
    assert watched, "the hook sees no file at all"
    assert opened == []
    assert not executed


def test_a5_pickle_inside_of_a_tensor_file_is_no_tensor_file(tmp_path: Path) -> None:
    """Bug: a file that says safetensors and holds a pickle is unpickled, because a loader guesses."""
    store = CheckpointStore(tmp_path / "c")
    value = {"w": torch.ones(2)}
    path = store.save(1, tensors={"model": value}, state={})
    torch.save(value, path / "model.safetensors")
    # Somebody who can write there can also write a manifest that fits.
    body = json.loads((path / "manifest.json").read_text())
    del body["checksum"]
    file = path / "model.safetensors"
    body["files"]["model.safetensors"] = {"size": file.stat().st_size, "sha256": manifest.sha256(file)}
    whole = {**body, "checksum": manifest.checksum(body)}
    (path / "manifest.json").write_text(manifest.canonical(whole))
    assert store.latest() == path
    with pytest.raises(ValueError, match=r"is no valid checkpoint: .*deserializing"):
        store.load(path)


# -- A6: two processes ------------------------------------------------------------------------------

HOLDER = """
from pathlib import Path
from reflectvlm.train.run_folder import RunFolder

with RunFolder.create(Path(sys.argv[1]), "a", recipe_yaml="steps: 3", overrides=(), resume="auto") as run:
    print(run.path.name, flush=True)
    sys.stdin.read()
"""


def take(root: Path) -> str:
    with RunFolder.create(root, "a", recipe_yaml="steps: 3", overrides=(), resume="auto") as run:
        return run.path.name


def test_a6_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    """Bug: two trainers write into one run; or a run whose process was killed is locked for ever."""
    script, root = tmp_path / "holder.py", tmp_path / "runs"
    script.write_text(f"import sys\n{HOLDER}")
    command = [sys.executable, str(script), str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "a\n"
        with pytest.raises(RuntimeError, match=rf"in use by process {other.pid} on {socket.gethostname()}"):
            take(root)
        with pytest.raises(RuntimeError, match="in use by process"):
            RunFolder.reopen(root / "a", recipe_yaml="steps: 3", overrides=())
        os.kill(other.pid, signal.SIGKILL)
        # Not waited for yet: a zombie is dead, too.
        while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            pass
        assert take(root) == "a"
    assert take(root) == "a"
