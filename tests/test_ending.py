"""How the process of a command ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ABORTS = """
import atexit, logging, os, sys, threading, time
from logging.handlers import MemoryHandler
from resource import RLIMIT_CORE, setrlimit
from reflectvlm.ending import exit_with

setrlimit(RLIMIT_CORE, (0, 0))  # no files of 100 MB where a test aborts

class AbortsWhenTakenDown:  # stands for a thread of C++ that lets go of its last tensor now
    def __del__(self):
        os.abort()

def late():
    time.sleep(0.2)
    print("a thread's last line")

def main():
    global held
    held = AbortsWhenTakenDown()
    atexit.register(print, "an exit handler's last line")
    logging.getLogger().addHandler(MemoryHandler(9, target=logging.StreamHandler(sys.stdout)))
    logging.warning("a log's last line")
    threading.Thread(target=late).start()
    return 0

exit_with(main)
"""
WORKS_ON = """
import threading, time, torch
from resource import RLIMIT_CORE, setrlimit
from reflectvlm.ending import exit_with

setrlimit(RLIMIT_CORE, (0, 0))

def work():
    while True:
        a @ a

def main():
    global a
    a = torch.ones(300, 300)
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.2)
    return 0

exit_with(main)
"""


def ended(program: str, *words: str, **variables: str) -> tuple[int, list[str], str]:
    """The exit code, the lines and the errors of a program."""
    done = subprocess.run(
        [sys.executable, *(words or ("-c", program))],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("return 0", 0),
        ("return 143", 143),
        ("raise SystemExit(130)", 130),
        ("sys.exit()", 0),
        ("sys.exit('no')", 1),
        ("raise OSError('no disk')", 1),
        ("raise KeyboardInterrupt", 130),
        ("return 2**40 + 3", 3),
    ],
)
def test_the_interpreter_is_not_taken_down(end: str, code: int) -> None:
    """Bug: a pipeline in two processes wrote all and ended with SIGABRT, for a thread met an interpreter that
    was being taken down; or the way around it loses an exit code, an exit handler, a thread or a line."""
    status, lines, errors = ended(ABORTS.replace("return 0", end))
    assert status == code, errors
    assert lines == ["a thread's last line", "an exit handler's last line", "a log's last line"]
    assert ("no" in errors) == ("no" in end)


def test_a_thread_at_work_in_torch_does_not_abort_the_end() -> None:
    """Bug: a reward that was left behind in torch turns the exit code of a run that is done into 134."""
    status, _, errors = ended(WORKS_ON)
    assert status == 0, errors


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(ABORTS, id="stand-in"),
        pytest.param(
            WORKS_ON,
            id="torch",
            marks=pytest.mark.skipif(
                sys.version_info >= (3, 14), reason="CPython 3.14 lets a thread hang there"
            ),
        ),
    ],
)
def test_a_plain_exit_aborts(program: str) -> None:
    """Bug: the tests above pass whatever `exit_with` does."""
    plain = program.replace("exit_with(main)", "raise SystemExit(main())")
    assert ended(plain)[0] == -6


HELD = """
import builtins, os
from resource import RLIMIT_CORE, setrlimit

setrlimit(RLIMIT_CORE, (0, 0))

class AbortsWhenTakenDown:
    def __del__(self, abort=os.abort):
        abort()

builtins.held = AbortsWhenTakenDown()
"""


def test_the_command_ends_so(tmp_path: Path) -> None:
    """Bug: `python -m reflectvlm` or the script `reflectvlm` goes by another way."""
    (tmp_path / "sitecustomize.py").write_text(HELD)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    assert ended("", "-c", "pass", PYTHONPATH=path)[0] == -6
    assert ended("", "-m", "reflectvlm", "--version", PYTHONPATH=path)[0] == 0
    wrong = ended("from reflectvlm.cli import command; command()", PYTHONPATH=path)
    assert wrong[0] == 0, wrong[2]
    script = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert script == {"reflectvlm": "reflectvlm.cli:command"}
