"""Trackers: what is written reads back exactly, and none of them can stop a run."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reflectvlm.train import trackers as trackers_module
from reflectvlm.train.tracker_thread import WAITING
from reflectvlm.train.trackers import JsonLines, TensorBoard, Trackers, Wandb, finite
from reflectvlm.train.written import sample_rows
from reflectvlm.types import Prompt, Rollout, Sample, ScoredGroup, Text, Visual


def group(*rewards: float, name: str = "s") -> ScoredGroup:
    sample = Sample(id=name, question="q?", answer="1", images=(Image.new("RGB", (4, 4), "red"),))
    prompt = Prompt(sample=sample, spans=())
    spans = (Text(ids=(1, 2), trained=True, logprobs=(-0.1, -0.2)), Visual(image=0, keep=(0,)))
    rollouts = tuple(
        Rollout(prompt=prompt, spans=spans, text=f"<back>{reward}", stop="eos") for reward in rewards
    )
    parts = {"accuracy": tuple(rewards), "judge": (math.nan,) * len(rewards)}
    return ScoredGroup(rollouts=rollouts, rewards=rewards, parts=parts, scored=(True,) * len(rewards))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_metrics_are_exact_and_on_the_disk_at_once(tmp_path: Path) -> None:
    """Prevents rounded floats, "NaN" (no JSON), and lines lost in a buffer when the process dies."""
    tracker = JsonLines(tmp_path)
    values = {
        "loss": 0.1 + 0.2,
        "kl": math.nan,
        "big": math.inf,
        "n": 3.0,
        "step": 9,
    }
    tracker.metrics(7, values)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert line == ('{"step": 7, "loss": 0.30000000000000004, "kl": null, "big": null, "n": 3.0}')
    tracker.close()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_read_back_bit_for_bit(value: float) -> None:
    """Prevents a resumed run from looking different because of how its numbers were written."""
    assert json.loads(json.dumps(finite({"x": [value]})))["x"][0].hex() == value.hex()


def test_samples(tmp_path: Path) -> None:
    """Prevents logs of megabytes of pictures, and a sample log that shows only one kind of answer."""
    tracker = JsonLines(tmp_path, samples_per_step=3)
    tracker.rollouts(2, [group(0.5, 0.0, 1.0, name="a"), group(0.25, 0.25, name="b"), group(1.0, name="c")])
    tracker.close()
    found = rows(tmp_path / "samples.jsonl")
    # Best and worst of "a", then the only distinct one of "b"; "c" is over the limit of 3.
    assert [(row["sample"], row["reward"]) for row in found] == [("a", 1.0), ("a", 0.0), ("b", 0.25)]
    first = found[0]
    assert first["parts"] == {"accuracy": 1.0, "judge": None}
    assert (first["text"], first["stop"], first["length"], first["inserted"]) == ("<back>1.0", "eos", 2, 1)
    assert [len(digest) for digest in first["images"]] == [64]
    assert first["step"] == 2


def test_image_hash_tells_pictures_apart() -> None:
    """Prevents a hash of the object or of the size alone."""
    pictures = [Image.new("RGB", (2, 8)), Image.new("RGB", (8, 2)), Image.new("RGB", (2, 8), "red")]
    pictures.append(pictures[0].copy())
    hashes = []
    for picture in pictures:
        prompt = Prompt(sample=Sample(id="s", question="", answer="", images=(picture,)), spans=())
        rollout = Rollout(prompt=prompt, spans=(), text="", stop="eos")
        one = ScoredGroup(rollouts=(rollout,), rewards=(0.0,), parts={}, scored=(True,))
        hashes += [next(sample_rows([one], 1))["images"][0]]
    assert len(set(hashes)) == 3
    assert hashes[0] == hashes[3]


def test_truncate_after_drops_later_steps_and_a_cut_line(tmp_path: Path) -> None:
    """Prevents a resumed run from writing steps twice, or after half a line a kill has left."""
    tracker = JsonLines(tmp_path)
    for step in (1, 2, 3):
        tracker.metrics(step, {"loss": float(step)})
        tracker.rollouts(step, [group(1.0)])
    path = tmp_path / "metrics.jsonl"
    with path.open("ab") as file:
        file.write('{"step": 1, "text": "é'.encode()[:-1])
    tracker.truncate_after(2)
    tracker.metrics(3, {"loss": 30.0})
    tracker.close()
    assert [(row["step"], row["loss"]) for row in rows(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


@pytest.mark.parametrize("end", ['\n{"step": 2, "lo', ""])
def test_appending_repairs_a_cut_line(tmp_path: Path, end: str) -> None:
    """Prevents the first line of a new process from being glued to the last one of a dead one,
    whether that was cut inside or just before its line break."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}' + end)
    tracker = JsonLines(tmp_path)
    tracker.metrics(2, {"loss": 2.0})
    tracker.close()
    assert [row["loss"] for row in rows(tmp_path / "metrics.jsonl")] == [1.0, 2.0]


def test_card(tmp_path: Path) -> None:
    """Prevents a card with a path or NaN in it from failing the start of a run."""
    JsonLines(tmp_path).start({"recipe": {"lr": 1e-6, "path": Path("x")}, "nan": math.nan})
    assert json.loads((tmp_path / "card.json").read_text()) == {
        "recipe": {"lr": 1e-6, "path": "x"},
        "nan": None,
    }


def test_jsonlines_refuses_a_negative_count(tmp_path: Path) -> None:
    """Prevents a negative limit from meaning something by accident."""
    with pytest.raises(ValueError, match="samples_per_step is -1"):
        JsonLines(tmp_path, samples_per_step=-1)


def test_tensorboard_points_read_back(tmp_path: Path) -> None:
    """Prevents wrong tags or steps, and points of the dead run shown beside those of the resumed one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoard(tmp_path)
    tracker.start({"lr": 1.0})
    for step in (1, 2, 3):
        tracker.metrics(step, {"reward/accuracy": float(step), "kl": math.nan})
        tracker.rollouts(step, [group(0.0, 1.0)])
    tracker.close()
    time.sleep(1.1)  # files are read by their names: a second, then a count whose 10 sorts before its 9
    tracker.truncate_after(2)
    tracker.metrics(3, {"reward/accuracy": 30.0})
    tracker.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("reward/accuracy")]
    assert points == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert "samples/0/text_summary" in events.Tags()["tensors"]


class Failing:
    """A tracker without a network: it starts, and then raises."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, card: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.calls.append("start")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:  # noqa: ARG002
        self.calls.append("metrics")
        raise ConnectionError("no network")

    def rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None:  # noqa: ARG002
        self.calls.append("rollouts")

    def close(self) -> None:
        self.calls.append("close")
        raise ConnectionError("still none")


def test_a_failing_tracker_is_reported_once_and_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents a dead dashboard from stopping a run, from flooding its log, or from hiding silently."""
    failing = Failing()
    trackers = Trackers((failing, JsonLines(tmp_path)), patience=3)
    with caplog.at_level(logging.WARNING):
        trackers.start({})
        for step in (1, 2, 3, 4):
            trackers.metrics(step, {"loss": 1.0})
        trackers.close()
    assert failing.calls == ["start", "metrics", "metrics", "metrics", "close"]  # start works
    assert [record.message for record in caplog.records] == [
        "Tracker Failing failed; training goes on, and it is tried again. no network",
        "Tracker Failing failed 3 times in a row and is dropped; training goes on. no network",
    ]
    assert "no network" in caplog.text
    assert len(rows(tmp_path / "metrics.jsonl")) == 4


def test_a_hiccup_of_a_tracker_costs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents a disk that was full for a moment, or a short cut of the network, from ending the log."""
    own = JsonLines(tmp_path)
    trackers = Trackers((own,), patience=2)
    write = own.metrics

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.WARNING):
        for step in range(1, 7):
            own.metrics = full if step % 2 else write  # type: ignore[method-assign]
            trackers.metrics(step, {"loss": 1.0})
    trackers.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [2, 4, 6]
    assert len(caplog.records) == 3


def test_trackers_truncate_those_that_can(tmp_path: Path) -> None:
    """Prevents a resume from failing because one tracker knows no `truncate_after`."""
    trackers = Trackers((Failing(), JsonLines(tmp_path)))
    trackers.trackers[1].metrics(1, {"loss": 1.0})
    trackers.trackers[1].metrics(2, {"loss": 1.0})
    trackers.truncate_after(1)
    trackers.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1]


def test_wandb_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a run from losing its dashboard at step 1: the recipe fails when it is built."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"reflectvlm\[wandb\]"):
        Wandb(project="p")
    with pytest.raises(ValueError, match=r"mode is 'of'\. It must be one of online, offline, disabled"):
        Wandb(project="p", mode="of")


# wandb's own code warns about deprecations of others; that is not what is tested here.
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents calls that a released wandb does not take."""
    pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = Wandb(project="p", mode="offline", folder=tmp_path, name="n")
    tracker.start({"lr": 1e-6, "path": Path("x"), "nan": math.nan})
    tracker.metrics(1, {"reward/accuracy": 0.5, "kl": math.nan})
    tracker.rollouts(1, [group(0.0, 1.0)])
    tracker.close()
    tracker.close()
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


class Slow:
    """A tracker behind a network that hangs until it is let go."""

    may_stall = True

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.free = threading.Event()

    def start(self, card: Mapping[str, Any]) -> None:
        self.free.wait(20)
        self.calls.append(("start", dict(card)))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("metrics", step, dict(values)))
        if values.get("fails"):
            raise ConnectionError("no route")

    def rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        self.calls.append(("rollouts", step, len(groups)))

    def close(self) -> None:
        self.calls.append(("close",))


def test_no_step_waits_for_a_tracker_that_stalls(tmp_path: Path) -> None:
    """Bug: a dashboard that does not answer for a minute stops training for a minute; or calls come in
    another order, with values of a later step, or are lost at the end."""
    slow, files = Slow(), JsonLines(tmp_path)
    trackers = Trackers((slow, files))
    began = time.monotonic()
    trackers.start({"name": "run"})
    values = {"loss": 1.0}
    for step in range(3):
        values["loss"] = float(step)
        trackers.metrics(step, values)
    trackers.rollouts(2, [group(1.0, 0.0)])
    assert time.monotonic() - began < 5
    assert slow.calls == []
    assert len(rows(tmp_path / "metrics.jsonl")) == 3  # files are written at once, as checkpoints count on
    slow.free.set()
    trackers.close()
    told = [("metrics", step, {"loss": float(step)}) for step in range(3)]
    assert slow.calls == [("start", {"name": "run"}), *told, ("rollouts", 2, 1), ("close",)]
    trackers.close()  # as at the end of a run and once more behind it


def test_a_failing_tracker_in_the_background_is_reported_and_dropped(caplog: Any) -> None:
    """Bug: errors of a thread vanish, or are told for every step; or a dropped tracker goes on failing."""
    slow = Slow()
    slow.free.set()
    trackers = Trackers((slow,), patience=3)
    with caplog.at_level(logging.WARNING):
        for step in range(6):
            trackers.metrics(step, {"fails": 1.0})
        trackers.close()
    assert [message.split(";")[0] for message in caplog.messages] == [
        "Tracker Slow failed",
        "Tracker Slow failed 3 times in a row and is dropped",
    ]
    assert slow.calls.count(("close",)) == 1
    assert sum(call[0] == "metrics" for call in slow.calls) == 3


def test_what_a_tracker_cannot_keep_up_with_is_told_and_counted(
    caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: values of days pile up in memory for a dashboard that is gone, or the run waits for it at the end
    for ever; or points are missing and nobody says so."""
    monkeypatch.setattr(trackers_module, "_LAST_CALLS", 0.2)
    slow = Slow()
    trackers = Trackers((slow,))
    with caplog.at_level(logging.WARNING):
        trackers.start({})
        for step in range(WAITING + 50):
            trackers.metrics(step, {})
        began = time.monotonic()
        trackers.close()
    assert time.monotonic() - began < 5
    assert [message.split(";")[0] for message in caplog.messages] == [
        "Tracker Slow is slower than the run",
        "Tracker Slow had not finished 0 seconds after the run, and is left alone.",
        caplog.messages[-1],
    ]
    lost = int(caplog.messages[-1].split()[3])
    assert caplog.messages[-1] == f"Tracker Slow lacks {lost} calls of this run."
    assert lost in (50, 51)  # the thread may have taken `start` out of the queue by then, or not yet
    slow.free.set()
