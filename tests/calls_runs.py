"""Work with a teacher that is killed: a process that has imported everything forks a child for each try. One
JSON request a line comes on standard input, one answer a line goes out (see `torture_server.py`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

KILLED = -signal.SIGKILL


class Tries:
    """Example: `with Tries() as tries: tries.run({"url": …, "cache": …, "out": …, "texts": […]})`"""

    def __enter__(self) -> Tries:
        here = Path(__file__).parent
        paths = os.pathsep.join([str(here), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, str(here / "calls_runs.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        assert self._answer() == {"ready": True}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """The child's exit code, -9 if it was killed, and its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that forks has gone"
        return dict(json.loads(line))


def serve() -> None:
    import httpx  # noqa: F401

    import reflectvlm.curate.calls
    import reflectvlm.curate.teachers.http  # noqa: F401

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(attempt(json.loads(line))), flush=True)


def attempt(request: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(in_child(request))
    limit = started + request.get("kill_after", 120.0)
    while time.monotonic() < limit:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.0005)
    else:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - started}


def in_child(request: dict[str, Any]) -> int:
    from reflectvlm.curate.calls import Calls, until_stopped
    from reflectvlm.curate.teachers.http import HttpTeacher
    from reflectvlm.curate.types import Request

    log = os.open(request["out"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        if "deadly" in request:
            die_in_write(*request["deadly"])
        teacher = HttpTeacher(
            url=request["url"], model="m", backoff=0.01, timeout=1.0, retries=6, concurrency=4
        )
        calls = Calls(teacher, cache=request["cache"])
        asked = [
            Request(row=str(place), purpose="answer", text=text)
            for place, text in enumerate(request["texts"])
        ]

        def work() -> None:
            lines = [
                {"row": one.row, "text": said.text, "why": said.why}
                for one, said in zip(asked, calls(asked), strict=True)
            ]
            lines.append(dict(calls.counts.errors))
            Path(request["out"]).write_text("".join(json.dumps(line) + "\n" for line in lines))

        return until_stopped(work)
    except BaseException:  # noqa: BLE001  boundary: whatever it was, the log has it and the parent its code
        import traceback

        traceback.print_exc()
        return 1


def die_in_write(number: int, where: str) -> None:
    """Kills this process at the cache's `number`-th write: before it, in the middle of its line, after it."""
    from reflectvlm.rewards import judge_cache

    count = 0

    class Os:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, fd: int, data: bytes) -> int:
            nonlocal count
            count += 1
            if count < number:
                return os.write(fd, data)
            os.write(fd, {"before": b"", "middle": data[: len(data) // 2], "after": data}[where])
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

    judge_cache.os = Os()  # type: ignore[assignment]


if __name__ == "__main__":
    serve()
