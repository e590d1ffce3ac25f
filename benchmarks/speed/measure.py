"""What every side measures, and how it tells the driver: seconds, memory, one line of JSON.

Memory is in MB: that of the GPU if there is one, else resident memory of the process and its workers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import Work


def now() -> float:
    """Seconds, once the device has done all it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = now()
    call()
    return now() - start


def memory() -> float:
    """In use now."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e6
    return _status("self", "VmRSS")


def peak_memory() -> float:
    """Most that was in use so far. Worker processes count with their own peaks."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    workers = [child.pid for child in multiprocessing.active_children()]
    return _status("self", "VmHWM") + sum(_status(str(pid), "VmHWM") for pid in workers)


def _status(process: str, name: str) -> float:
    """A line such as `VmHWM:  1234 kB`."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # a kernel without it


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every side is told on its command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Work.read, default=Work())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1e9, help="no further repeat once so many are spent")
    parser.add_argument("--threads", type=int, default=0, help="0 is torch's own choice")
    parser.add_argument("--memory", type=int, default=0, help="fail beyond so many MB of data; 0 is no limit")
    parser.add_argument("--settings", type=json.loads, default={}, help="this side's own, as JSON")
    return parser


def begin(args: argparse.Namespace) -> None:
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory:
        resource.setrlimit(resource.RLIMIT_DATA, (args.memory * 10**6, args.memory * 10**6))
    torch.manual_seed(0)


def trained_parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def report(**values: Any) -> None:
    """One line that the driver reads."""
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print("RESULT " + json.dumps(values | {"versions": versions, "threads": torch.get_num_threads()}))
    sys.stdout.flush()
