"""The end of a command's process.

A thread may still be at work in torch when all is done: a reward that was left behind, a checkpoint's
writer after a second signal, those of gloo and of data parallelism that let go of tensors. It then asks for
the interpreter's lock, and an interpreter that is being taken down ends the thread that asks (CPython before
3.14). C++ does not stand that: `terminate called without an active exception`, SIGABRT, and a launcher or a
job script hears of a failure. So a command leaves behind its exit handlers, before the interpreter is taken
down. Left out: programs that import the library; they end as they choose.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from reflectvlm.train.printing import settle


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Exits with what `main` returns. Threads that are no daemons are waited for, exit handlers run.

    Handlers run in the reverse order, and this one ends the process: those that were registered before the
    call are skipped, but for logging's, and so is what an object does only in `__del__`.
    Example: `exit_with(main)` in `__main__.py`
    """
    code = 1  # of an exception
    atexit.register(lambda: _leave(code))
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
        raise
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
        raise
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    try:
        logging.shutdown()
        settle()
    finally:  # Ctrl-C in the middle of it
        os._exit(code & 0xFF)
