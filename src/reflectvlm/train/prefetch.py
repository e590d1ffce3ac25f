"""Rows that are read ahead in other processes: positions in, what the reader makes of them out, in order.

Nothing here is state of a run. Which row comes when is a function of the position, so whatever was read
ahead and not taken is read again after a resume, and a run with workers has the bits of one without.

- A worker is a fresh interpreter (spawn, which is safe after CUDA was started) that never runs the main
  script again, holds no weights, computes on one thread and sees no GPU.
- Each has a pipe of its own and is driven by a thread, so one that is killed, even amid a reply, is an
  error at once and no lock stays behind. Plain pickling takes rows back: sharing tensors would save a copy
  and cost an open file or a name in /dev/shm for each image, which a killed process leaves behind.
- Workers end with `close`, with the object, and with the process they work for, however it ends.
- What a row's reading raises, warns and logs is raised, warned and logged here when the row is taken.

Left out: a worker that takes the place of a dead one; what killed it would kill the next. And rows that
depend on random numbers of the process that reads them: they would be others in each.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import sys
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from reflectvlm.interrupt import safe_point
from reflectvlm.train.prefetch_worker import Reply, serve, unpacked

T = TypeVar("T")

_PATIENCE = 0.1
"""Seconds between two looks whether a stop was asked for while a row is awaited."""
_GRACE = 1.0
"""Seconds in which a stop of the whole job may follow the death of a worker."""


def check_workers(workers: int, prefetch: int | None) -> None:
    """Raises ValueError for numbers that make no sense."""
    if workers < 0:
        raise ValueError(f"workers is {workers}. It must be 0, to read rows in this process, or more.")
    if prefetch is not None and not workers:
        raise ValueError(f"prefetch is {prefetch}, but workers is 0, so nothing is read ahead. Give workers.")
    if prefetch is not None and prefetch < 1:
        raise ValueError(
            f"prefetch is {prefetch}. Read at least 1 row ahead, or give null for those of one step; "
            "workers=0 reads none ahead."
        )


class WorkerGone(RuntimeError):
    """A process that reads rows ahead was killed or has crashed."""


class Prefetch(Generic[T]):
    """`read(position)` in one of `workers` processes, up to `ahead` positions before it is asked for.

    Example: `Prefetch(reader, workers=2, ahead=16)(0)` is `reader(0)`, and 1 to 16 are being read.
    """

    def __init__(self, read: Callable[[int], T], workers: int, ahead: int) -> None:
        body = _body(read, workers)
        self.ahead = ahead
        self._asked: dict[int, Future[bytes]] = {}
        self._workers = tuple(_Worker(body, workers) for _ in range(workers))
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="rows")
        for _ in self._workers:  # they import while this process prepares what else it needs
            self._threads.submit(_prepare_one, self._idle)
        self._warned: dict[Any, Any] = {}
        """What Python's warnings keep so that each is told once."""
        self._end = weakref.finalize(self, _end, self._threads, self._workers)

    def __call__(self, position: int) -> T:
        """What `read(position)` returns or raises. Raises WorkerGone if the process has died."""
        self._ask(range(position, position + self.ahead + 1))
        future = self._asked.pop(position)
        while True:
            try:
                body = future.result(timeout=_PATIENCE)
                break
            except NotYet:
                safe_point()
            except WorkerGone:
                _stop_if_asked()
                raise
        reply = unpacked(body)
        self._retell(reply)
        if reply.error is not None:
            raise reply.error
        value: T = reply.value
        return value

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(worker.pid for worker in self._workers)

    def close(self) -> None:
        """Ends the workers, whatever they do, and waits for them."""
        self._asked.clear()
        self._end()

    def _ask(self, wanted: range) -> None:
        """Exactly these positions are being read, or have been."""
        for position in [one for one in self._asked if one not in wanted]:
            self._asked.pop(position).cancel()
        for position in wanted:
            if position not in self._asked:
                self._asked[position] = self._threads.submit(_read_in, self._idle, position)

    def _retell(self, reply: Reply) -> None:
        for record in reply.logs:
            logger = logging.getLogger(record.name)
            if logger.isEnabledFor(record.levelno):
                logger.handle(record)
        for one in reply.warnings:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno, registry=self._warned)


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, body: bytes, workers: int) -> None:
        self._body: bytes | None = body
        self._workers = workers
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        level = logging.getLogger().getEffectiveLevel()
        self._process = context.Process(target=serve, args=(theirs, level), name="rows", daemon=True)
        with _main_set_aside():
            self._process.start()
        theirs.close()  # or its end would never show
        self.pid = int(self._process.pid or 0)

    def read(self, position: int) -> bytes:
        """The packed reply. Raises WorkerGone."""
        try:
            self.prepare()
            self._pipe.send(position)
            return self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._gone(position) from error

    def prepare(self) -> None:
        """Sends what reads rows, once; in a thread, since it may be large and the process needs a while."""
        if self._body is not None:
            self._pipe.send_bytes(self._body)
            self._body = None

    def end(self) -> None:
        self._process.kill()  # it only reads; and one that hangs would not hear a kinder word
        self._process.join()

    def close(self) -> None:
        self._pipe.close()
        self._process.close()

    def _gone(self, position: int) -> WorkerGone:
        self._process.join(timeout=5)
        code = self._process.exitcode
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        why = " (the system does so when memory is used up)" if code == -signal.SIGKILL else ""
        return WorkerGone(
            f"A process that reads rows ahead {how}{why} at position {position} of the data's order. Each of "
            f"workers={self._workers} holds its own copy of what the data keeps in memory, and rows read "
            "ahead wait here. Give fewer workers, a smaller prefetch or more memory; workers=0 reads rows in "
            "this process. resume=auto goes on from the last checkpoint."
        )


def _stop_if_asked() -> None:
    """A scheduler that ends a job tells every process of it, and a worker may be the first to hear."""
    until = time.monotonic() + _GRACE
    while time.monotonic() < until:
        safe_point()
        time.sleep(_PATIENCE)


def _prepare_one(idle: SimpleQueue[_Worker]) -> None:
    worker = idle.get()
    try:
        worker.prepare()
    except OSError:
        pass  # it is gone, which its first row will tell
    finally:
        idle.put(worker)


def _read_in(idle: SimpleQueue[_Worker], position: int) -> bytes:
    """In a thread; there are as many threads as workers."""
    worker = idle.get()
    try:
        return worker.read(position)
    finally:
        idle.put(worker)


def _end(threads: ThreadPoolExecutor, workers: tuple[_Worker, ...]) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.end()
    threads.shutdown(wait=True)  # each has met the end of its pipe
    for worker in workers:
        worker.close()


def _body(read: Callable[[int], Any], workers: int) -> bytes:
    """What a worker needs, by cloudpickle: things of the main script or a notebook travel by value."""
    import cloudpickle  # type: ignore[import-untyped]

    try:
        body: bytes = cloudpickle.dumps(read)
    except Exception as error:  # any object may refuse to be pickled, in any way
        what, reason = _refusing(read, error)
        raise ValueError(
            f"workers is {workers}, but {what} cannot be sent to another process: {reason} Make it "
            "picklable (no open files, locks or connections), or set workers=0."
        ) from error
    return body


def _refusing(read: Any, error: Exception) -> tuple[str, str]:
    """The part that cannot be pickled, and why."""
    import cloudpickle

    parts: Mapping[str, Any] = getattr(read, "parts", {})
    for name, part in parts.items():
        try:
            cloudpickle.dumps(part)
        except Exception as own:  # noqa: BLE001  as above
            return f"{name} ({type(part).__name__})", f"{type(own).__name__}: {own}."
    return f"what reads rows ({type(read).__name__})", f"{type(error).__name__}: {error}."


@contextlib.contextmanager
def _main_set_aside() -> Iterator[None]:
    """Within the block a process is started that does not run the main script again: one without the
    `if __name__ == "__main__":` that spawning asks for would start its training over in every worker."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
