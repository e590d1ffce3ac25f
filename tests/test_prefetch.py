"""Rows that other processes read ahead: the same rows in the same order, and no process too many."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures import make_sample
from reflectvlm.building import draft_of
from reflectvlm.config import compose
from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.data.rows import BadRow
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.train.distill import Distiller
from reflectvlm.train.feed import Feed
from reflectvlm.train.prefetch import Prefetch, WorkerGone
from reflectvlm.train.prefetch_worker import InWorker, Reply, packed, unpacked
from reflectvlm.train.row_rules import RowRules
from reflectvlm.train.sft import GoldAnswer
from reflectvlm.types import Instruction, Sample, SamplingParams
from training import rubric, same_runs, small_rl, small_sft

HERE = str(Path(__file__).parent)


@dataclasses.dataclass
class Scripted:
    """What a position is asked to do."""

    acts: dict[int, str]

    def __call__(self, position: int) -> Any:
        act = self.acts.get(position, "")
        if act == "bad":
            try:
                raise FileNotFoundError("b.png")
            except FileNotFoundError as error:
                raise BadRow(f"rows:{position}", "images", "missing image", "Copy it.") from error
        if act == "odd error":
            raise Odd(1, 2)
        if act == "tells":
            logging.getLogger("reflectvlm.of_a_row").warning("row %d is odd", position)
            warnings.warn("pale colours", UserWarning, stacklevel=1)
        if act == "lock":
            return threading.Lock()
        if act == "about":
            main = getattr(sys.modules["__main__"], "__file__", "") or ""
            return os.getpid(), torch.get_num_threads(), os.environ["CUDA_VISIBLE_DEVICES"], main
        if act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "exit":
            os._exit(3)
        if act == "die amid the reply":
            (pipe,) = (one for one in gc.get_objects() if isinstance(one, Connection))
            os.write(pipe.fileno(), struct.pack("!i", 10**6) + b"a million bytes, it says")
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "hang":
            time.sleep(600)
        if act == "slow":
            time.sleep(0.3)
        return position, torch.arange(position + 3, dtype=torch.float32), (np.float64(position) / 7).item()


class Odd(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def gone(pid: int, seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


# -- one pool ---------------------------------------------------------------------------------------

ACTS = {0: "slow", 3: "bad", 4: "odd error", 5: "tells", 6: "tells", 7: "lock", 8: "about", 9: "about"}


@pytest.fixture(scope="module")
def pool() -> Iterator[Prefetch[Any]]:
    made: Prefetch[Any] = Prefetch(Scripted(ACTS), 2, 3)
    yield made
    made.close()


def test_values_come_by_position(pool: Prefetch[Any]) -> None:
    """Bug: rows come in the order in which workers finish, or a jump back gets what was read for another."""
    for position in (0, 1, 2, 10, 11, 0, 1, 12, 40, 2):
        number, tensor, exact = pool(position)
        assert number == position
        assert torch.equal(tensor, torch.arange(position + 3, dtype=torch.float32))
        assert exact == position / 7
        tensor.add_(1)  # its memory is its own


def test_errors_come_with_their_row(pool: Prefetch[Any]) -> None:
    """Bug: an error surfaces while another row is taken, as another kind of error, or without its cause."""
    assert pool(1)[0] == 1  # 3 and 4 are read ahead and fail meanwhile
    assert pool(2)[0] == 2
    with pytest.raises(BadRow, match=r"^rows:3: missing image in column 'images'\. Copy it\.") as caught:
        pool(3)
    assert isinstance(caught.value.__cause__, InWorker)
    assert "FileNotFoundError: b.png" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match=r"^Odd: 1 and 2"):  # it cannot be made anew from its text
        pool(4)


def test_what_a_row_tells_is_told_when_it_is_taken(pool: Prefetch[Any], caplog: Any) -> None:
    """Bug: warnings of rows are lost in a worker, told before their turn, or once for every worker."""
    with caplog.at_level(logging.WARNING, "reflectvlm"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        pool(2)
        time.sleep(0.5)
        assert caplog.messages == []
        pool(5)
        assert caplog.messages == ["row 5 is odd"]
        pool(6)
    assert caplog.messages == ["row 5 is odd", "row 6 is odd"]
    assert [str(one.message) for one in told] == ["pale colours"]  # one place in the code


def test_a_row_that_cannot_travel_says_so(pool: Prefetch[Any]) -> None:
    """Bug: an object in a row's columns ends the worker, or arrives as something else."""
    with pytest.raises(
        ValueError, match=r"A row cannot be sent from .*lock.* Keep plain .* or set workers=0"
    ):
        pool(7)


def test_a_worker_disturbs_nobody(pool: Prefetch[Any]) -> None:
    """Bug: workers take the trainer's cores or its GPU, or run the main script once more."""
    found = [pool(position) for position in (8, 9)]
    for pid, threads, devices, main in found:
        assert pid in pool.pids
        assert (threads, devices, main) == (1, "", "")


def test_a_wait_can_be_given_up(pool: Prefetch[Any]) -> None:
    """Bug: a signal is only heard once a slow row has come."""
    with pytest.raises(Abandoned), abandonable(lambda: True):
        pool(0)
    assert pool(0)[0] == 0


def test_classes_of_the_main_script_travel() -> None:
    """Bug: a class that no import finds cannot come back, although it went there by value."""
    local = type("Local", (), {"__module__": "__main__", "value": 3})
    back = unpacked(packed(Reply(value=local()))).value
    assert (type(back).__name__, back.value) == ("Local", 3)


# -- processes that end -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "says"),
    [
        ("die", r"was killed by SIGKILL \(the system does so when memory is used up\) at position 2"),
        ("exit", r"ended with exit code 3 at position 2"),
        ("die amid the reply", r"was killed by SIGKILL .* at position 2 .* Each of workers=1 .* workers=0"),
    ],
)
def test_a_killed_worker_is_an_error_and_no_hang(act: str, says: str) -> None:
    """Bug: the run waits for ever for a row whose reader was killed, or reads half a reply."""
    pool: Prefetch[Any] = Prefetch(Scripted({2: act}), 1, 1)
    try:
        assert pool(0)[0] == 0
        assert pool(1)[0] == 1
        for _ in range(2):  # and it stays one
            with pytest.raises(WorkerGone, match=says):
                pool(2)
            says = "at position 2"
        with pytest.raises(Abandoned), abandonable(lambda: True):  # the job as a whole was told to end
            pool(2)
    finally:
        pool.close()
    assert all(gone(pid) for pid in pool.pids)


def test_close_ends_a_worker_that_hangs() -> None:
    """Bug: a row that never comes keeps a run from ending."""
    pool: Prefetch[Any] = Prefetch(Scripted({1: "hang"}), 1, 1)
    pool(0)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 10
    assert all(gone(pid, 1) for pid in pool.pids)
    pool.close()  # again is nothing


def test_workers_end_with_the_object() -> None:
    """Bug: a trainer made in a notebook and thrown away leaves its workers behind."""
    pool: Prefetch[Any] = Prefetch(Scripted({}), 1, 1)
    pids = pool.pids
    pool(0)
    del pool
    assert all(gone(pid) for pid in pids)


SCRIPT = """
import os, sys, time
sys.path.insert(0, {here!r})
from reflectvlm.train.prefetch import Prefetch
from test_prefetch import Scripted
print("main", flush=True)
pool = Prefetch(Scripted({{1: "hang"}}), 2, 1)  # no `if __name__ == "__main__":`
pool(0)
print(*pool.pids, flush=True)
time.sleep(600)
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """Bug: `kill -9` of a run leaves processes behind, one of them amid a row that never comes; or a script
    that guards nothing is run again by each of its workers."""
    (tmp_path / "script.py").write_text(SCRIPT.format(here=HERE))
    child = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "main\n"
        pids = [int(word) for word in child.stdout.readline().split()]
        assert len(pids) == 2
        child.kill()
        child.wait()
        assert child.stdout.read() == ""
    assert all(gone(pid) for pid in pids)


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from training import small_rl

quick = {{"evaluation": None, "test": None, "output": {{"checks": False}}}}
trainer = small_rl(Path({root!r}), steps=500, workers=2, **quick)
share = trainer.feed.share
def told(count, position):
    found = share(count, position)
    if position == 0:
        print(*trainer.feed._ahead.pids, flush=True)
    return found
trainer.feed.share = told
sys.exit(trainer.run().exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_ends_all_and_saves(number: signal.Signals, tmp_path: Path) -> None:
    """Bug: Ctrl-C, which every process of a terminal gets, or a scheduler's SIGTERM kills workers first, and
    the run ends with their error instead of saving; or they outlive it."""
    code = RUN.format(here=HERE, root=str(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    with child.stdout:
        pids = next(line for line in child.stdout if line.replace(" ", "").strip().isdigit())
        time.sleep(0.3)
        os.killpg(child.pid, number)
        rest = child.stdout.read()
    assert child.wait() == 128 + number
    assert "Go on with resume=auto" in rest
    assert "Traceback" not in rest
    assert all(gone(int(pid)) for pid in pids.split())


# -- what cannot be sent ----------------------------------------------------------------------------


class Locked(Digits):
    """Data that holds what no other process can have."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle '_thread.lock' object")


def test_data_that_cannot_be_pickled_is_named(tmp_path: Path) -> None:
    """Bug: a message about a lock somewhere, deep in the library, without a remedy."""
    trainer = small_rl(tmp_path, data=Locked(size=4), workers=2)
    with pytest.raises(
        ValueError,
        match=r"workers is 2, but data \(Locked\) cannot be sent .*lock.* Make it picklable .* workers=0",
    ):
        trainer.next_prompts(1)


def test_the_policy_s_weights_stay_here(tiny_policy: QwenVL) -> None:
    """Bug: each worker gets a copy of a model of gigabytes."""
    import cloudpickle

    light = feed(tiny_policy, Digits(size=2)).reader.for_workers()
    assert light.policy.model is None
    parameters = sum(one.numel() for one in tiny_policy.module.parameters())
    assert len(cloudpickle.dumps(light)) < parameters


# -- the same rows ----------------------------------------------------------------------------------


class Mixed(Sequence[Sample]):
    """Rows with two images, without, bad, too long, and of many colours."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: Any) -> Any:
        if index >= 9:
            raise IndexError(index)
        if index in (2, 5):
            raise BadRow(f"rows.jsonl:{index + 1}", "images", "missing image", "Copy it.")
        sizes = {0: ((64, 48), (48, 48)), 1: (), 6: ((256, 256),)}.get(index, ((64, 64),))
        question = "why " * 200 if index in (3, 6) else "Which?"
        sample = make_sample(index, question, sizes)
        columns = {"trace": f"It is {index}.", "kind": ("a", index), "array": np.arange(index)}
        return dataclasses.replace(sample, columns=columns)


def instructed(position: int) -> Instruction:
    return Instruction(text="Box it." if position % 2 else "Say it.")


def feed(policy: QwenVL, data: Sequence[Sample], **changes: Any) -> Feed:
    given: dict[str, Any] = {
        "data": data, "policy": policy, "seed": 3, "rules": RowRules(on_long="truncate_text", max_bad=1.0),
        "limit": 120, "limit_name": "max_tokens", "instruction": instructed,
        "answer": GoldAnswer("trace"),
    }  # fmt: skip
    return Feed(**given | changes)


def plain(value: Any) -> Any:
    """A nest of values that can be compared with ==."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return "array", value.dtype, value.shape, value.tobytes()
    if isinstance(value, Image.Image):
        return "image", value.mode, value.size, value.tobytes()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), [plain(getattr(value, one.name)) for one in dataclasses.fields(value)]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [plain(one) for one in value]
    return value


def test_a_feed_gives_the_same_with_workers(tiny_policy: QwenVL, caplog: Any) -> None:
    """Bug: a bit of a pixel, an id, a count or a warning is other when rows are read elsewhere."""
    found = []
    for workers in (0, 2):
        caplog.clear()
        one = feed(tiny_policy, Mixed(), workers=workers, prefetch=4)
        with caplog.at_level(logging.WARNING, "reflectvlm"):
            items, end = one.take(7, 0)
            more, end = one.take(8, end)
            again = one.these(range(3, 6))
        one.close()
        found.append((plain(items + more + again), end, one.counts, caplog.messages))
    assert found[0] == found[1]
    assert found[0][2].unreadable >= 2
    assert found[0][2].shortened >= 1
    assert any("left out" in line for line in found[0][3])


def test_a_look_at_single_rows_starts_no_workers(tiny_policy: QwenVL) -> None:
    """Bug: the checks at the start, which look at a row at a time, start workers of their own, or make those
    of the run drop what they have read ahead."""
    one = feed(tiny_policy, Mixed(), workers=2)
    assert [len(one.these([position], ahead=False)) for position in range(3)] == [
        len(feed(tiny_policy, Mixed()).these([position])) for position in range(3)
    ]
    assert len(one.first(2)) == 2
    assert "_ahead" not in vars(one)


def test_strict_rules_raise_the_same_with_workers(tiny_policy: QwenVL) -> None:
    """Bug: a row that is too long is another error, or none, when it was read elsewhere."""
    rules = RowRules(on_bad="skip", on_long="error")
    said = []
    for workers in (0, 1):
        one = feed(tiny_policy, Mixed(), rules=rules, workers=workers)
        with pytest.raises(ValueError, match=r"Row 'sample-[36]' has \d+ tokens, more than max_to") as caught:
            one.take(9, 0)
        one.close()
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("make", [small_rl, small_sft])
def test_a_run_with_workers_is_the_run_without(make: Any, tmp_path: Path) -> None:
    """Bug: training depends on who read its rows, or workers outlive their run."""
    settings: dict[str, Any] = {"steps": 3, "evaluation": None}
    quick = {"checks": False}
    with_workers = make(tmp_path / "two", workers=2, prefetch=5, **settings, output=quick)
    same_runs(with_workers.run().folder, make(tmp_path / "none", **settings, output=quick).run().folder)
    assert "_ahead" not in vars(with_workers.feed)


def test_distillation_with_workers_writes_the_same_rows(tmp_path: Path, tiny_policy: QwenVL) -> None:
    """Bug: a distillation asks other rows, or loses those that were read ahead, between two batches."""
    lines = []
    for workers in (0, 1):
        distiller = Distiller(
            policy=tiny_policy, data=DigitTraces(data=Digits(size=5)), rubric=rubric(),
            accept={"remainder": 0.2}, wrong="repair", rows_per_batch=2, workers=workers,
            sampling=SamplingParams(max_tokens=4),
            output=small_rl(tmp_path / str(workers)).output,
        )  # fmt: skip
        lines.append(distiller.run().rows.read_text())
    assert lines[0] == lines[1]
    assert lines[0].count("\n") == 5


# -- settings ---------------------------------------------------------------------------------------


def test_settings_are_checked(tmp_path: Path) -> None:
    """Bug: a negative number of workers fails in the standard library, after the model was loaded."""
    with pytest.raises(ValueError, match=r"workers is -1. It must be 0, to read rows in this process, or m"):
        small_rl(tmp_path, workers=-1)
    with pytest.raises(ValueError, match=r"prefetch is 0. Read at least 1 row ahead, or give null"):
        small_sft(tmp_path, workers=1, prefetch=0)
    with pytest.raises(ValueError, match=r"prefetch is 4, but workers is 0, so nothing is read ahead"):
        small_sft(tmp_path, prefetch=4)


@pytest.mark.parametrize("recipe", ["lookback_rl", "lookback_sft", "qwen_la_distill"])
def test_workers_are_keys_of_a_recipe(recipe: str) -> None:
    """Bug: a setting that can only be given in Python."""
    overrides = ["workers=2", "prefetch=8", "start_from=null"]
    draft = draft_of(compose(recipe, overrides).values, slow=False)
    assert (draft.workers, draft.prefetch) == (2, 8)
    plain_draft = draft_of(compose(recipe, ["start_from=null"]).values, slow=False)
    assert (plain_draft.workers, plain_draft.prefetch) == (0, None)
