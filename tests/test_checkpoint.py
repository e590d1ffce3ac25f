"""Checkpoints: whole or not at all, checked by their manifest, and exact."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reflectvlm.train import checkpoint
from reflectvlm.train.checkpoint import (
    CheckpointStore,
    optimizer_from_tensors,
    optimizer_to_tensors,
    pack,
    rng_state,
    set_rng_state,
    unpack,
)


def put(store: CheckpointStore, step: int) -> Path:
    """A small checkpoint whose content tells its step."""
    value = torch.full((8,), float(step))
    return store.save(step, tensors={"model": {"w": value}, "optimizer": {"m": value}}, state={"step": step})


def test_round_trip(tmp_path: Path) -> None:
    """Prevents lost dtypes, 0-dim or strided tensors, and tied weights that safetensors refuses."""
    base = torch.arange(12.0).view(3, 4)
    model = {"a": base, "tied": base, "turned": base.T, "tail": base[1:], "zero": torch.tensor(7)}
    model |= {"half": torch.ones(2, dtype=torch.bfloat16), "empty": torch.zeros(0, 3)}
    store = CheckpointStore(tmp_path)
    path = store.save(3, tensors={"model": model, "none": {}}, state={"loss": 0.1, "nan": float("inf")})
    found = store.load(path)
    assert (found.step, found.state, path.name) == (3, {"loss": 0.1, "nan": float("inf")}, "step-000003")
    assert found.tensors["none"] == {}
    for name, value in model.items():
        assert found.tensors["model"][name].dtype == value.dtype
        assert torch.equal(found.tensors["model"][name], value), name


def test_copies_of_files_and_folders(tmp_path: Path) -> None:
    """Prevents a model folder or tokenizer from lying outside of what the manifest protects."""
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "deep" / "x.txt").write_text("x")
    (tmp_path / "tokenizer.json").write_text("{}")
    store = CheckpointStore(tmp_path / "c")
    copies = {"model": tmp_path / "model", "tokenizer.json": tmp_path / "tokenizer.json"}
    path = store.save(1, tensors={}, state={}, copies=copies)
    assert (path / "tokenizer.json").read_text() == "{}"
    (path / "model" / "deep" / "x.txt").write_text("y")
    with pytest.raises(ValueError, match=r"model/deep/x\.txt has another sha256"):
        store.load(path)
    with pytest.raises(OSError, match="does not exist"):
        store.save(2, tensors={}, state={}, copies={"gone": tmp_path / "gone"})
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-000001"]


def test_retention(tmp_path: Path) -> None:
    """Prevents a full disk, and keep=1 from ever deleting the only one."""
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        put(store, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000010"]
    one = CheckpointStore(tmp_path / "one", keep=1)
    for step in (1, 2):
        put(one, step)
        assert one.latest() == tmp_path / "one" / f"step-{step:06d}"
    assert len(list((tmp_path / "one").iterdir())) == 1


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    """Prevents keep=2 from keeping one good and one cut checkpoint while a second good one goes."""
    store = CheckpointStore(tmp_path, keep=2)
    put(store, 1)
    cut = put(store, 2) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    put(store, 3)
    assert (tmp_path / "step-000001").exists()


def test_same_step_twice_and_going_back(tmp_path: Path) -> None:
    """Prevents "directory not empty" on a step saved again, and a resume that mixes two histories."""
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        put(store, step)
    put(store, 3)
    store.truncate_after(1)
    assert store.latest() == tmp_path / "step-000001"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "empty"])
def test_damage_is_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    """Prevents a resume from wrong numbers: whatever happens to a file, the earlier one is taken."""
    store = CheckpointStore(tmp_path)
    good, bad = put(store, 1), put(store, 2)
    victim = bad / name
    data = victim.read_bytes()
    if damage == "delete":
        victim.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        victim.write_bytes({"flip": flipped, "cut": data[:-1], "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert store.latest() == good
    assert name in caplog.text
    with pytest.raises(ValueError, match=f"{name} .*newest valid one"):
        store.load(bad)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_manifest(tmp_path: Path, place: float, bit: int) -> None:
    """Prevents a damaged manifest from passing, or from reading as "a newer format, update"."""
    store = CheckpointStore(tmp_path)
    path = put(store, 1) / "manifest.json"
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(bytes(data))
    assert store.latest() is None


def test_only_the_manifest_decides(tmp_path: Path) -> None:
    """Prevents "the largest number wins": empty folders, strangers and renamed ones are passed over."""
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


def test_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an old program from misreading, or silently passing over, a newer checkpoint."""
    store = CheckpointStore(tmp_path)
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    path = put(store, 1)
    monkeypatch.undo()
    for read in (store.latest, lambda: store.load(path)):
        with pytest.raises(ValueError, match=r"format 2; this version of reflectvlm reads up to 1\. Update"):
            read()


def test_what_a_user_may_not_write(tmp_path: Path) -> None:
    """Prevents parts that overwrite each other or leave the folder, and late JSON errors."""
    store = CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match=r"keep is 0\. It must be at least 1"):
        CheckpointStore(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step is -1"):
        store.save(-1, tensors={}, state={})
    with pytest.raises(ValueError, match=r"'\.\./x\.safetensors' is no plain file name"):
        store.save(1, tensors={"../x": {}}, state={})
    with pytest.raises(ValueError, match=r"'state\.json' occurs twice"):
        store.save(1, tensors={}, state={}, copies={"state.json": tmp_path})
    with pytest.raises(ValueError, match=r"state\['w'\] is not JSON.*`pack`"):
        store.save(1, tensors={}, state={"w": torch.zeros(1)})


def test_unwritable_folder(tmp_path: Path) -> None:
    """Prevents an unclear error where the folder cannot be made."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Checkpoint of step 1 could not be written to .*Free space or fix"):
        put(CheckpointStore(tmp_path / "file"), 1)


# A child imports torch once and forks for every place to die at: before, in the middle of and after
# each write, flush, rename and deletion of a save that also overwrites nothing, or the same step.
KILLER = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from reflectvlm.train import checkpoint
from reflectvlm.train.checkpoint import CheckpointStore

def put(store, step, value):
    tensors = {name: {"w": torch.full((8,), value)} for name in ("model", "optimizer")}
    store.save(step, tensors=tensors, state={"value": value}, copies={"copied": Path(__file__)})

def arm(deadly):
    seen = 0
    def point(path=None):
        nonlocal seen
        seen += 1
        if seen == deadly:
            if path is not None and path.is_file():
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    def wrap(name):
        real = getattr(checkpoint, name)
        def wrapped(path, *rest):
            point()
            if name == "_remove":
                for file in sorted(path.rglob("*"))[:1]:
                    file.unlink()
                point()
            real(path, *rest)
            if name == "_write":
                point(path)
            point()
        setattr(checkpoint, name, wrapped)
    for name in ("_write", "_fsync", "_rename", "_remove"):
        wrap(name)

root, step, keep = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
results = []
for deadly in range(1, 200):
    store = CheckpointStore(root / str(deadly), keep=keep)
    put(store, 1, 1.0)
    child = os.fork()
    if child == 0:
        arm(deadly)
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
print(json.dumps(results))
"""


def in_child(tmp_path: Path, script: str, *arguments: object) -> Any:
    file = tmp_path / "child.py"
    file.write_text(script)
    command = [sys.executable, str(file), str(tmp_path / "runs"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("step", "keep"), [(2, 1), (1, 2)])
def test_kill_at_every_instant(tmp_path: Path, step: int, keep: int) -> None:
    """Prevents the loss of the last good checkpoint, a mixture of two, and leftovers, for a new step
    with keep=1 (which deletes the old one) and for the same step saved again."""
    results = in_child(tmp_path, KILLER, step, keep)
    # 5 writes x 3 points, 5 file and 2 folder flushes x 2, 1 rename x 2, and the put-aside and deletion.
    assert len(results) > 30
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


FULL = """
import json, resource, sys
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


def test_full_disk(tmp_path: Path) -> None:
    """Prevents a full disk from raising a stranger's exception, leaving junk, or costing the old one.
    The limit of 64 KiB a file stands for the disk; errno 27 is its "File too large"."""
    messages, left, intact = in_child(tmp_path, FULL)
    assert [code for code, _ in messages] == [27, 27]
    assert all("step 2 could not be written" in text and "too large" in text for _, text in messages)
    assert left == ["step-000001"]
    assert intact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_goes_on_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    """Prevents moments or step counts that change on their way: two more steps are equal bit by bit."""

    def setup(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)
        groups = [{"params": list(model[0].parameters()), "lr": 0.1}, {"params": list(model[1].parameters())}]
        return model, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95))

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for scale in (1.0, -0.3):
            optimizer.zero_grad()
            model(torch.full((2, 3), scale, dtype=dtype)).float().square().sum().backward()
            optimizer.step()

    model, optimizer = setup(0)
    train(model, optimizer)
    packed = optimizer_to_tensors(optimizer.state_dict())
    store = CheckpointStore(tmp_path)
    tensors = {"model": model.state_dict(), "optimizer": packed.tensors}
    found = store.load(store.save(2, tensors=tensors, state={"optimizer": packed.json}))
    other, fresh = setup(1)
    other.load_state_dict(dict(found.tensors["model"]))
    state = optimizer_from_tensors(found.tensors["optimizer"], found.state["optimizer"])
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]
    assert state["param_groups"][0]["betas"] == (0.8, 0.95)
    fresh.load_state_dict(state)
    train(model, optimizer)
    train(other, fresh)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def draw() -> tuple[float, float, list[float]]:
    # The old global generator is meant: it is what other libraries draw from.
    return random.gauss(0, 1), float(np.random.standard_normal()), torch.randn(3).tolist()


def test_rng_state_through_a_file(tmp_path: Path) -> None:
    """Prevents a resumed run that draws other numbers. Odd counts of Gaussians leave one in reserve in
    python's and numpy's generators: the state is more than the keys."""
    before = rng_state()
    draw()
    packed = rng_state()
    expected = [draw(), draw()]
    store = CheckpointStore(tmp_path)
    found = store.load(store.save(1, tensors={"rng": packed.tensors}, state={"rng": packed.json}))
    set_rng_state(found.tensors["rng"], found.state["rng"])
    assert [draw(), draw()] == expected
    set_rng_state(before.tensors, before.json)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=12,
)


@given(values)
def test_pack_is_undone_exactly(value: object) -> None:
    """Prevents tuples that come back as lists and int keys that come back as strings."""
    packed = pack(value)
    assert repr(unpack(packed.tensors, json.loads(json.dumps(packed.json)))) == repr(value)


def test_pack_tensors_and_strangers() -> None:
    """Prevents two tensors from sharing a name, and an object from being dropped silently."""
    packed = pack({1: torch.tensor(1), "1": torch.tensor(2), "x": [torch.tensor(3)]})
    assert len(packed.tensors) == 3
    back = unpack(packed.tensors, packed.json)
    assert (back[1].item(), back["1"].item(), back["x"][0].item()) == (1, 2, 3)
    with pytest.raises(ValueError, match="a/0 is a set, which a checkpoint cannot hold"):
        pack({"a": [{1}]})
