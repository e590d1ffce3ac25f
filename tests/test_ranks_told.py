"""What processes tell each other, and how one that waits tells its own errors from those of others."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from reflectvlm import pulse, stages
from reflectvlm.train import keeping
from reflectvlm.train.compute import Compute
from reflectvlm.train.group import Group, _free_port, _Rank
from reflectvlm.train.keeper import seconds_to_save
from reflectvlm.train.launch import Launch
from reflectvlm.train.ranks import LostRank, Ranks
from reflectvlm.train.signals import StopRequest, agreed
from reflectvlm.train.update import Updater
from reflectvlm.train.zero import check_shareable


class Two(Ranks):
    """The second of two processes; the first has told `THEIRS`."""

    THEIRS: Any = None

    def gather(self, value: Any) -> list[Any]:
        return [self.THEIRS, value]


def two(theirs: Any) -> Ranks:
    return type("Told", (Two,), {"THEIRS": theirs})(rank=1, world=2)


class LongTale(ValueError):
    """Can be written and not read: it is made of two things and keeps one."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def test_what_the_network_says_is_a_lost_process() -> None:
    """Bug: the error of gloo, from which nobody learns that another process died."""
    with pytest.raises(LostRank, match="rank 1 lost the other processes"), Ranks(rank=1, world=2).heard():
        raise RuntimeError("Connection closed by peer")


def test_a_full_device_is_this_process_s_own_error() -> None:
    """Bug: out of memory in a backward pass that also sends, told as a process that died."""
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"), Ranks(world=2).heard():
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_one_process_loses_nobody() -> None:
    """Bug: ZeRO in one process that tells any error of a pass as the loss of others."""
    with pytest.raises(RuntimeError, match=r"^shapes do not fit"), Ranks().heard():
        raise RuntimeError("shapes do not fit")


def test_a_mistake_of_the_user_is_a_value_error_in_all_processes() -> None:
    """Bug: a row that is too long, read by rank 1: exit code 2 there and 1 in the others."""
    problem = LongTale("a", "b")

    def fail() -> None:
        raise problem

    sent: list[Any] = []

    class Sends(Ranks):
        def gather(self, value: Any) -> list[Any]:
            sent.append(value)
            return [value]

    with pytest.raises(LongTale):
        Sends(rank=1, world=2).together(fail)
    with pytest.raises(ValueError, match="a and b"):
        two(sent[0]).together(lambda: None)


def test_all_stop_for_one_reason() -> None:
    """Bug: one process ends with 143 and another, whose minutes were over as well, with 75."""
    stop = StopRequest(max_minutes=0.0)
    with stop:
        assert agreed(two(("SIGTERM", 143)), stop)
    assert (stop.reason, stop.exit_code) == ("SIGTERM", 143)


def rubric(failed: int) -> dict[str, Any]:
    return {"failed": failed, "recent": {}}


def test_groups_that_wait_come_back_to_whom_their_rows_belong() -> None:
    """Bug: after a resume groups in another order, or with other processes than before, so that sums round
    otherwise and the run is not the unbroken one."""
    own, theirs = ([{"position": at} for at in places] for places in ((3, 7), (2, 4)))
    ranks = two({"pending": theirs, "rubric": rubric(0)})
    joined = keeping._joined({"pending": own, "rubric": rubric(5), "updates": 1}, ranks)
    assert joined["pending"] == [{"position": at} for at in (2, 3, 4, 7)]
    assert keeping._part(joined, ranks)["pending"] == own
    assert keeping._part(joined, Ranks())["pending"] == joined["pending"]


def test_a_resumed_process_has_no_new_budget_of_failures() -> None:
    """Bug: the first process's failures for all: a process whose reward server fails begins anew."""
    ranks = two({"rubric": rubric(2)})
    joined = keeping._joined({"rubric": rubric(5)}, ranks)
    assert keeping._part(joined, ranks) == {"rubric": rubric(5)}
    assert keeping._part(joined, Ranks(rank=0, world=2)) == {"rubric": rubric(2)}
    assert keeping._part(joined, Ranks(rank=0, world=3)) == {"rubric": rubric(5)}
    assert keeping._part({"rubric": rubric(1)}, ranks) == {"rubric": rubric(1)}


def test_a_shared_weight_counts_whole() -> None:
    """Bug: under zero3 a save that is thought to take one second, so that max_minutes ends in its middle."""
    layer = torch.nn.Linear(1, 1, bias=False)
    vars(layer.weight)["ds_numel"] = 10**9
    assert seconds_to_save(layer) == pytest.approx(1 + 3 * 4e9 / 5e8)


def test_a_folder_is_tried_under_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: two processes of the same number on two machines that take each other's file away."""
    monkeypatch.setenv(stages.VARIABLE, str(tmp_path))
    (tmp_path / "stages" / f".probe-{os.getpid()}").mkdir(parents=True)
    assert stages.stages_folder() == tmp_path / "stages"
    assert len(list((tmp_path / "stages").iterdir())) == 1


def started(folder: Path, number: int) -> _Rank:
    at = folder / f"pulse-{number}"
    pulse.create(at)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], text=True)
    return _Rank(number=number, process=process, pulse=at)


def test_processes_are_ended_if_another_cannot_start(tmp_path: Path) -> None:
    """Bug: those that had started go on alone."""
    made: list[_Rank] = []

    class Short(Group):
        def _start(self, local: int) -> _Rank:
            if local:
                raise OSError("no more processes")
            made.append(started(tmp_path, local))
            return made[0]

    with pytest.raises(OSError, match="no more"):
        Short(Launch(processes=2, on_gpu=False), [], tmp_path).run()
    assert made[0].ended() == -signal.SIGKILL


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_peak_that_is_no_number_is_seen(order: tuple[int, int]) -> None:
    """Bug: the largest of NaN and 2 is 2, or NaN, by which process comes first."""
    told = [({"loss": 1.0}, {"ratio_gap": math.nan}), ({"loss": 2.0}, {"ratio_gap": 2.0})]
    ranks = SimpleNamespace(gather=lambda _: [told[at] for at in order])
    joined = Updater._joined(SimpleNamespace(runtime=SimpleNamespace(ranks=ranks)), [])  # type: ignore[arg-type]
    assert joined["loss"] == 3.0
    assert math.isnan(joined["ratio_gap"])


def test_what_zero_cannot_divide_is_refused() -> None:
    """Bug: 8-bit moments beside the 32-bit ones of DeepSpeed, or a base in 4 bits cut in pieces."""
    layer = nn.Linear(2, 2)
    plain = torch.optim.AdamW(layer.parameters())
    eight = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": "bitsandbytes.optim"})(layer.parameters())
    with pytest.raises(ValueError, match=r"optimizer\.bits is 8.*Set optimizer\.bits=32"):
        check_shareable(layer, eight, Compute(kind="zero1"))
    layer.weight.quant_state = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"base is quantised.*Take compute=zero2 or ddp"):
        check_shareable(layer, plain, Compute(kind="zero3"))
    check_shareable(layer, plain, Compute(kind="zero2"))


LEAVES = """
import os, sys, time
import torch.distributed
from reflectvlm.train.ranks import Ranks, leaving

rank, fails = int(os.environ["RANK"]), sys.argv[1] == "fails"
try:
    with leaving():
        Ranks.joined().barrier()
        if fails and rank == 1:
            raise ValueError("a row")
        time.sleep(2 * (rank == 0 and not fails))
        began = time.monotonic()
except ValueError:
    pass
print(rank, torch.distributed.is_initialized(), 0.0 if fails else time.monotonic() - began, flush=True)
os._exit(0) if fails else None
"""


@pytest.mark.parametrize("ends", ["well", "fails"])
def test_processes_leave_together(ends: str) -> None:
    """Bug: one exits while threads of gloo run on, which abort it now and then after its last step; or one
    that has failed waits for the others."""
    port = str(_free_port())
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "REFLECTVLM_CPU": "1"}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES, ends],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ((0, 1) if ends == "well" else (1, 0))
    ]
    told = [one.communicate(timeout=60)[0].split() for one in started if ends == "well" or one is started[0]]
    for one in started[1:] if ends == "fails" else ():
        one.kill()
        one.communicate()
    assert [line[1] for line in told] == ["False"] * len(told)
    if ends == "well":
        waited = {line[0]: float(line[2]) for line in told}
        assert waited["1"] > 1.5 > waited["0"]
