"""A process that imports everything once and forks a child for every run, so that a run costs its steps and
not its imports. Started by `torture_runs.Forks`: one JSON request a line on standard input, one answer a
line on standard output.

No operation of torch happens before a fork: a child of a process with worker threads may hang.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

import matplotlib.figure  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402
import transformers  # noqa: E402

import reflectvlm.train.plots  # noqa: E402, F401
import training  # noqa: E402
from reflectvlm.models.loading import image_processor_class, load_tokenizer  # noqa: E402
from torture_disk import Disk, KillAt, Point  # noqa: E402


class Crash(Exception):
    """Stands for any error of a step."""


def serve() -> None:
    _preload()
    answer({"ready": True, "threads": threading.active_count()})
    for line in sys.stdin:
        answer(attempt(json.loads(line)))


def answer(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def attempt(request: dict[str, Any]) -> dict[str, Any]:
    """One run in a child of its own, killed after `kill_after` seconds if it still lives then."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_in_child(request))
    limit = started + (request.get("kill_after") or 300.0)
    while time.monotonic() < limit:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.001)
    else:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    seconds = time.monotonic() - started
    return {"code": os.waitstatus_to_exitcode(status), "seconds": seconds}


def _in_child(request: dict[str, Any]) -> int:
    root = Path(request["root"])
    root.mkdir(parents=True, exist_ok=True)
    log = os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdin = open(os.devnull)  # noqa: SIM115  the parent's requests are not this child's
    try:
        output = {"resume": "auto", "save_every": 1, "eval_every": 2} | request.get("output", {})
        make = getattr(training, request["kind"])
        trainer = make(root, steps=request["steps"], output=output, **request.get("changes", {}))
        if request.get("crash_at") is not None:
            _crash_at(trainer, request["crash_at"])
        if request.get("in_evaluation") is not None:
            _die_in_evaluation(trainer, request["in_evaluation"])
        if request.get("in_save") is not None:
            _die_in_save(request["in_save"], request["deadly"], root / "points.json")
        return int(trainer.run().exit_code)
    except Crash:
        return 3
    except BaseException:  # noqa: BLE001  boundary: whatever it was, the log has it and the parent its code
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _crash_at(trainer: Any, step: int) -> None:
    take = trainer.step

    def step_or_crash(number: int) -> Any:
        if number == step:
            raise Crash
        return take(number)

    trainer.step = step_or_crash


def _die_in_evaluation(trainer: Any, number: int) -> None:
    """Kills this process while its `number`-th evaluation is generating: at its third token."""
    from reflectvlm.rollout.decoding import Decoding

    evaluate, step, begun, tokens = trainer.evaluate, Decoding._step, 0, 0
    inside = False

    def evaluated(evaluation: Any) -> Any:
        nonlocal begun, tokens, inside
        begun, tokens, inside = begun + 1, 0, True
        found = evaluate(evaluation)
        inside = False
        return found

    def counted(decoding: Any, *arguments: Any) -> Any:
        nonlocal tokens
        tokens += inside
        if inside and (begun, tokens) == (number, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(decoding, *arguments)

    trainer.evaluate = evaluated
    Decoding._step = counted  # type: ignore[method-assign]


def _die_in_save(number: int, deadly: int, points: Path) -> None:
    """Kills this process at the `deadly`-th point of its `number`-th save; 0: writes down how many points
    that save has."""
    from reflectvlm.train.checkpoint import CheckpointStore

    saves, save = 0, CheckpointStore.save
    seen: list[Point] = []

    def watched(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves != number:
            return save(self, *arguments, **named)
        with Disk(KillAt(deadly) if deadly else seen.append).watch():
            found = save(self, *arguments, **named)
        if not deadly:
            points.write_text(json.dumps(seen))
        return found

    CheckpointStore.save = watched  # type: ignore[method-assign]


def _preload() -> None:
    """What a run imports only when it gets there."""
    _ = transformers.Qwen2_5_VLForConditionalGeneration, image_processor_class()
    load_tokenizer("tiny")


if __name__ == "__main__":
    serve()
