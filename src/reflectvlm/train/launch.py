"""Several processes of one command: started, watched, and ended together.

    reflectvlm train recipe=… gpus=8            one process per GPU of this machine
    reflectvlm train recipe=… processes=2       the same on a machine without, on its cores
    … nodes=2 node_rank=0 main_address=node-a main_port=29500      on each of several machines

Every process runs the same command with RANK, WORLD_SIZE and the like in its environment, as torchrun,
`accelerate launch` and `deepspeed` set them; started by one of those the command joins in the same way. The
first one has the terminal. If one dies or hangs, the others are ended, and what is known of it is told: its
rank, how it ended, and what it was doing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectvlm import pulse
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.group import Group

ORPHANED = 300.0
"""Seconds in which a process may stop and save once its launcher has gone."""
WORDS = ("gpus", "processes", "nodes", "node_rank", "main_address", "main_port")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How many processes, and where.

    Example: `Launch.read(["recipe=grpo", "gpus=8"])` -> (8 processes on GPUs, ["recipe=grpo"])
    """

    processes: int
    """On this machine."""
    on_gpu: bool
    nodes: int = 1
    node_rank: int = 0
    main_address: str = "127.0.0.1"
    main_port: int | None = None
    """Of the first machine; None takes a free one, which only one machine can."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            name = "gpus" if self.on_gpu else "processes"
            raise RecipeError(f"{name}={self.processes}. It must be at least 1.")
        if self.nodes < 1 or not 0 <= self.node_rank < self.nodes:
            raise RecipeError(
                f"node_rank={self.node_rank} with nodes={self.nodes}. Machines count from 0 to nodes - 1."
            )
        if self.nodes > 1 and (self.main_port is None or self.main_address == "127.0.0.1"):
            raise RecipeError(
                f"nodes={self.nodes} needs main_address=… and main_port=…, the same on all machines: those "
                "of the machine with node_rank=0."
            )

    @classmethod
    def read(cls, words: Sequence[str]) -> tuple[Launch | None, list[str]]:
        """The words of a command that say how it is started, and the others. None: in this process."""
        given = {name: value for name, _, value in (word.partition("=") for word in words) if name in WORDS}
        rest = [word for word in words if word.partition("=")[0] not in WORDS]
        if not given:
            return None, rest
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            raise RecipeError(
                f"{next(iter(given))}=… starts processes, but this is one of {os.environ['WORLD_SIZE']} that "
                "were started already (WORLD_SIZE is set). Leave it out."
            )
        if len({"gpus", "processes"} & set(given)) != 1:
            raise RecipeError("Give gpus=N, or processes=N on a machine without GPUs; one of the two.")
        on_gpu = "gpus" in given
        count = _whole(given, "gpus" if on_gpu else "processes", 0)
        if on_gpu:
            _check_gpus(count)
        return cls(
            processes=count,
            on_gpu=on_gpu,
            nodes=_whole(given, "nodes", 1),
            node_rank=_whole(given, "node_rank", 0),
            main_address=given.get("main_address", "127.0.0.1"),
            main_port=_whole(given, "main_port", 0) or None,
        ), rest

    def run(self, command: Sequence[str]) -> int:
        """Runs `python -m reflectvlm COMMAND` in all processes; returns the exit code."""
        with tempfile.TemporaryDirectory(prefix="reflectvlm-") as folder:
            return Group(self, command, Path(folder)).run()


def leave_with_launcher() -> None:
    """In a process that was launched: a signal to stop, once the launcher is gone."""
    if not pulse.begin():
        return

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHANED)
        os._exit(1)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def _check_gpus(count: int) -> None:
    import torch

    there = torch.cuda.device_count()
    if there == 0:
        raise RecipeError(
            f"gpus={count}, but this machine has no GPU that torch can use. On its cores: processes={count}."
        )
    if count > there:
        raise RecipeError(f"gpus={count}, but this machine has {there}. Give at most gpus={there}.")


def _whole(given: Mapping[str, str], name: str, otherwise: int) -> int:
    try:
        return int(given.get(name, otherwise))
    except ValueError:
        raise RecipeError(f"{name} is {given[name]!r}. It must be a whole number.") from None
