"""Sections A3 to A6: damage, retention, formats, two processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reflectvlm.train import checkpoint, manifest
from reflectvlm.train.checkpoint import CheckpointStore
from reflectvlm.train.run_folder import RunFolder
from stores import in_child, put
from torture_disk import Disk, Point

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
