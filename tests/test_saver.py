"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from reflectvlm.train.checkpoint import CheckpointStore
from reflectvlm.train.saver import Saver


class Slow(CheckpointStore):
    """A store that waits for a word before it writes."""

    go = threading.Event()

    def save(self, *arguments, **named):
        assert self.go.wait(20)
        return super().save(*arguments, **named)


def test_what_is_saved_is_what_was_there_when_save_was_called(tmp_path: Path) -> None:
    """Bug: training changes a weight, or a list of the state, while the thread writes it."""
    Slow.go.clear()
    saver = Saver(Slow(tmp_path))
    weight, rows = torch.zeros(3), [1]
    saver.save(1, tensors={"model": {"w": weight}}, state={"rows": rows})
    weight += 1
    rows.append(2)
    Slow.go.set()
    saver.wait()
    found = saver.store.load(tmp_path / "step-000001")
    assert found.tensors["model"]["w"].tolist() == [0, 0, 0]
    assert found.state == {"rows": [1]}
    assert saver.saved == 1
    assert saver.seconds > 0


def test_views_of_one_memory_keep_their_values(tmp_path: Path) -> None:
    """Bug: two views of equal shape, one of them transposed, are saved as the same."""
    saver = Saver(CheckpointStore(tmp_path))
    a = torch.arange(4.0).view(2, 2)
    saver.save(0, tensors={"model": {"a": a, "t": a.T, "bits": a.view(torch.int32), "tied": a}}, state={})
    saver.wait()
    found = saver.store.load(tmp_path / "step-000000").tensors["model"]
    assert found["a"].tolist() == found["tied"].tolist() == [[0, 1], [2, 3]]
    assert found["t"].tolist() == [[0, 2], [1, 3]]
    assert found["bits"].dtype == torch.int32


def test_a_failed_save_is_told_once_and_the_next_one_is_tried(tmp_path: Path) -> None:
    """Bug: a full disk is never told, or the save after it is not even begun."""
    (tmp_path / "file").write_text("")
    saver = Saver(CheckpointStore(tmp_path / "file" / "folder"))
    saver.save(1, tensors={"model": {"w": torch.zeros(1)}}, state={})
    with pytest.raises(OSError, match="Checkpoint of step 1 could not be written"):
        saver.wait()
    saver.wait()
    saver.store = CheckpointStore(tmp_path / "good")
    saver.save(2, tensors={"model": {"w": torch.zeros(1)}}, state={})
    saver.wait()
    assert saver.saved == 2


def test_state_that_is_no_json_is_told_at_once(tmp_path: Path) -> None:
    """Bug: a state that cannot be written is told at the next save, by the wrong line."""
    with pytest.raises(TypeError, match="not JSON serializable"):
        Saver(CheckpointStore(tmp_path)).save(1, tensors={}, state={"x": {1, 2}})


def test_what_is_ready_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a checkpoint that was put together for this save is held a second time in the host's memory."""
    given = {"model": {"w": torch.ones(3)}, "rng": {"r": torch.zeros(2)}}
    written: dict[str, Any] = {}
    store = CheckpointStore(tmp_path)

    def save(*_: Any, **named: Any) -> None:
        written.update(named["tensors"])

    monkeypatch.setattr(CheckpointStore, "save", save)
    saver = Saver(store)
    saver.save(1, tensors=given, state={}, ready=("model",))
    saver.wait()
    assert written["model"]["w"] is given["model"]["w"]
    assert written["rng"]["r"].data_ptr() != given["rng"]["r"].data_ptr()
