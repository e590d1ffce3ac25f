"""Checkpoints: whole or not at all, checked by their manifest, and exact."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reflectvlm.train.checkpoint import CheckpointStore
from reflectvlm.train.packing import (
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


def test_what_a_user_may_not_write(tmp_path: Path) -> None:
    """Prevents parts that overwrite each other or leave the folder, and late JSON errors."""
    store = CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match=r"keep is 0\. It must be at least 1"):
        CheckpointStore(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step is -1"):
        store.save(-1, tensors={}, state={})
    with pytest.raises(ValueError, match=r"'\.\./x\.safetensors' is no plain file name"):
        store.save(1, tensors={"../x": {}}, state={})
    with pytest.raises(ValueError, match=r"state\['w'\] is not JSON.*`pack`"):
        store.save(1, tensors={}, state={"w": torch.zeros(1)})


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
