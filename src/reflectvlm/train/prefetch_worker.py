"""The process of a worker of `prefetch.py`: receives what reads rows, then a position, answers, and so on.

Left out: anything that needs a policy's weights or a GPU.
"""

from __future__ import annotations

import io
import logging
import logging.handlers
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple


@dataclass(kw_only=True, eq=False)
class Reply:
    """What reading one position came to."""

    value: Any = None
    error: Exception | None = None
    logs: list[logging.LogRecord] = field(default_factory=list)
    warnings: list[Warned] = field(default_factory=list)


class Warned(NamedTuple):
    """A Python warning."""

    message: str
    category: type[Warning]
    filename: str
    lineno: int


class InWorker(Exception):
    """The cause of an error, as the worker saw it: what `raise … from` names cannot travel itself."""


def serve(pipe: Connection, level: int) -> None:
    """Answers until the other end of the pipe is closed."""
    _settle()
    logs = _Logs()
    logging.getLogger().addHandler(logs)
    logging.getLogger().setLevel(level)
    try:
        read = _reader(pipe.recv_bytes())
        while True:
            pipe.send_bytes(packed(_reply(read, pipe.recv(), logs)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # nobody asks any more


def packed(reply: Reply) -> bytes:
    """A reply as bytes; one that cannot be pickled becomes one that says so."""
    import cloudpickle  # type: ignore[import-untyped]

    try:
        return _pickled(reply)
    except Exception:  # noqa: BLE001  boundary: rows may hold anything
        try:  # a class of the main script has no name here, but travelled by value once
            body: bytes = cloudpickle.dumps(reply)
            return body
        except Exception as error:  # noqa: BLE001
            return _pickled(Reply(error=_not_sent(reply, error), logs=reply.logs))


def unpacked(body: bytes) -> Reply:
    reply: Reply = pickle.loads(body)  # noqa: S301  our own process wrote it
    if reply.error is not None:
        cause = reply.error.__dict__.pop("_in_worker", None)
        reply.error.__cause__ = None if cause is None else InWorker(f"\n{cause}")
    return reply


# -- parts ------------------------------------------------------------------------------------------


def _settle() -> None:
    """A process that disturbs nobody and outlives nobody."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its workers
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A closed pipe ends a worker that waits for work; this one that is reading a row, or hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _reader(body: bytes) -> Callable[[int], Any]:
    try:
        read: Callable[[int], Any] = pickle.loads(body)  # noqa: S301  sent by our own parent
    except Exception as error:  # noqa: BLE001  boundary: unpickling may import and run anything
        failed = ValueError(
            f"What reads rows cannot be made anew in another process: {type(error).__name__}: {error}. Put "
            "its code where a fresh interpreter can import it, or set workers=0."
        )
        return _Failing(failed)
    return read


class _Failing:
    """Raises the same error for every row."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, _position: int) -> Any:
        raise self.error


def _reply(read: Callable[[int], Any], position: int, logs: _Logs) -> Reply:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            reply = Reply(value=read(position))
        except Exception as error:  # noqa: BLE001  raised where the row is taken
            cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
            if cause is not None:
                vars(error)["_in_worker"] = "".join(traceback.format_exception(cause))
            reply = Reply(error=_travelling(error))
    reply.warnings = [Warned(str(one.message), one.category, one.filename, one.lineno) for one in caught]
    reply.logs = logs.taken()
    return reply


def _travelling(error: Exception) -> Exception:
    """The error, or where it cannot be pickled and made anew, one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301
    except Exception:  # noqa: BLE001  whatever its constructor does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _not_sent(reply: Reply, error: Exception) -> Exception:
    what = "What a row's reading raised" if reply.error is not None else "A row"
    return ValueError(
        f"{what} cannot be sent from the process that read it: {type(error).__name__}: {error}. Keep plain "
        "values in the columns of rows, or set workers=0."
    )


def _pickled(reply: Reply) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(reply)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Tensors as arrays, whose bytes are copied as they are."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        if type(value) is torch.Tensor and value.dtype in (torch.float32, torch.float64, torch.int64):
            return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


class _Logs(logging.handlers.QueueHandler):
    """Collects records in a form that travels."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self._records: list[logging.LogRecord] = []

    def enqueue(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def taken(self) -> list[logging.LogRecord]:
        taken, self._records = self._records, []
        return taken
