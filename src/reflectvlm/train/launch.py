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
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from reflectvlm import pulse
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.printing import put_error
from reflectvlm.train.ranks import LOST, PATIENCE_MINUTES

GRACE = 20.0
"""Seconds in which the others may end by themselves once one has failed, and once more when told to."""
_LOOK = 0.1
"""Seconds between two looks."""
_WORDS = ("gpus", "processes", "nodes", "node_rank", "main_address", "main_port")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
        given = {name: value for name, _, value in (word.partition("=") for word in words) if name in _WORDS}
        rest = [word for word in words if word.partition("=")[0] not in _WORDS]
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
            return _Group(self, command, Path(folder)).run()


@dataclass(kw_only=True, eq=False)
class _Rank:
    """One process and what it has said."""

    number: int
    process: subprocess.Popen[str]
    pulse: Path
    said: deque[str] = field(default_factory=lambda: deque(maxlen=40))
    """Its last lines on stderr; the first rank has the terminal and keeps none."""

    def ended(self) -> int | None:
        return self.process.poll()

    def told(self) -> str:
        """How it ended and in what."""
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"rank {self.number} {how} in its phase {pulse.read(self.pulse).phase!r}"


class _Group:
    """All processes of this machine."""

    def __init__(self, launch: Launch, command: Sequence[str], folder: Path) -> None:
        self.launch, self.command, self.folder = launch, list(command), folder
        self.port = launch.main_port or _free_port()
        self.ranks: list[_Rank] = []
        self.patience = 60 * float(os.environ.get("REFLECTVLM_TIMEOUT", PATIENCE_MINUTES))

    def run(self) -> int:
        try:
            with self._passed_on():
                for local in range(self.launch.processes):
                    self.ranks.append(self._start(local))  # known at once to signals and to `finally`
                failed = self._watch()
                return 0 if failed is None else self._end(failed)
        finally:
            for rank in self.ranks:  # also when this function is left by an error
                if rank.ended() is None:
                    rank.process.kill()
                rank.process.wait()

    def _start(self, local: int) -> _Rank:
        number = self.launch.node_rank * self.launch.processes + local
        at = self.folder / f"pulse-{number}"
        pulse.create(at)
        process = subprocess.Popen(
            [sys.executable, "-m", "reflectvlm", *self.command],
            env={**os.environ, **self._environment(number, local), pulse.VARIABLE: str(at)},
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends
            stdout=None if number == 0 else subprocess.DEVNULL,
            stderr=None if number == 0 else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C comes once, from here
        )
        rank = _Rank(number=number, process=process, pulse=at)
        if process.stderr is not None:
            threading.Thread(target=_listen, args=(process.stderr, rank), daemon=True).start()
        return rank

    def _environment(self, number: int, local: int) -> Mapping[str, str]:
        launch = self.launch
        threads = max(1, len(os.sched_getaffinity(0)) // launch.processes)
        made = {
            "RANK": str(number),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(launch.processes * launch.nodes),
            "LOCAL_WORLD_SIZE": str(launch.processes),
            "MASTER_ADDR": launch.main_address,
            "MASTER_PORT": str(self.port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        }
        return made if launch.on_gpu else made | {"REFLECTVLM_CPU": "1"}

    def _watch(self) -> _Rank | None:
        """Waits until all have ended well, or returns the one that has not."""
        while True:
            codes = [rank.ended() for rank in self.ranks]
            if all(code == 0 for code in codes):
                return None
            if any(code is not None and code != 0 for code in codes):
                return self._first_failed()
            if (hanging := self._hanging()) is not None:
                return hanging
            time.sleep(_LOOK)

    def _first_failed(self) -> _Rank:
        """Of those that have failed, one that did so by itself; the others may only have lost it."""
        time.sleep(2 * _LOOK)  # a death and what it does to others are seen in any order
        failed = [rank for rank in self.ranks if rank.ended() not in (None, 0)]
        return next((rank for rank in failed if rank.ended() != LOST), failed[0])

    def _hanging(self) -> _Rank | None:
        """One that has not got on for too long and does not wait for others."""
        now = time.time()
        states = {rank.number: pulse.read(rank.pulse) for rank in self.ranks if rank.ended() is None}
        for rank in self.ranks:
            state = states.get(rank.number)
            if state is not None and not state.waits and now - state.at > self.patience:
                return rank
        return None

    def _end(self, failed: _Rank) -> int:
        """Ends the others, tells what happened, and returns the exit code of all."""
        hangs = failed.ended() is None
        if hangs:
            state = pulse.read(failed.pulse)
            put_error(
                f"error: rank {failed.number} hangs: in its phase {state.phase!r} it has not got on for "
                f"{time.time() - state.at:.0f} s (REFLECTVLM_TIMEOUT={self.patience / 60:g} minutes). All "
                "are ended; resume=auto goes on from the last checkpoint.\n"
            )
            failed.process.kill()
            failed.process.wait()
        else:
            self._wait(GRACE)
        codes = {rank.ended() for rank in self.ranks}
        self._finish_off()
        code = failed.process.returncode
        if not hangs and (code < 0 or codes != {code}):
            put_error(
                f"error: {failed.told()}; all are ended. resume=auto goes on from the last checkpoint.\n"
            )
        if failed.number and code not in (-signal.SIGKILL, -signal.SIGTERM):
            said = [line for line in failed.said if not line.startswith("warning: rank")]
            put_error("".join(f"rank {failed.number}: {line}" for line in said[-3:]))
        return code if code > 0 else 128 - code  # as a shell reports a signal

    def _finish_off(self) -> None:
        for last in (signal.SIGTERM, signal.SIGKILL):
            for rank in self.ranks:
                if rank.ended() is None:
                    rank.process.send_signal(last)
            self._wait(GRACE / 4)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(rank.ended() is None for rank in self.ranks):
            time.sleep(_LOOK)

    @contextlib.contextmanager
    def _passed_on(self) -> Iterator[None]:
        """Within the block signals to this process go to all of its processes, and end them, not it."""

        def handle(number: int, _frame: FrameType | None) -> None:
            for rank in self.ranks:
                if rank.process.poll() is None:
                    rank.process.send_signal(number)

        before: dict[signal.Signals, Any] = {}
        for asked in _SIGNALS:
            if signal.getsignal(asked) is not signal.SIG_IGN:  # nohup, a job in the background
                before[asked] = signal.signal(asked, handle)
        try:
            yield
        finally:
            for asked, handler in before.items():
                signal.signal(asked, signal.SIG_DFL if handler is None else handler)


def leave_with_launcher() -> None:
    """In a process that was launched: a signal to stop, once the launcher is gone."""
    if pulse.VARIABLE not in os.environ:
        return

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def _listen(stream: IO[str], rank: _Rank) -> None:
    for line in stream:
        rank.said.append(line)
        if line.startswith("warning: rank"):
            put_error(line)


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


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
