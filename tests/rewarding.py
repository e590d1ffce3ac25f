"""Groups of answers by hand, and a check that no process of a reward is left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reflectvlm.types import Prompt, Rollout, Sample, Text


def group(*texts: str, name: str = "row", answer: str = "5") -> tuple[Rollout, ...]:
    prompt = Prompt(sample=Sample(id=name, question="2 + 3?", answer=answer, columns={"n": 1}), spans=())
    spans = (Text(ids=(1,), trained=True, logprobs=(-0.1,)),)
    return tuple(Rollout(prompt=prompt, spans=spans, text=text, stop="eos", offsets=(0,)) for text in texts)


def marked() -> list[int]:
    """Processes that were started by a worker of ours, workers included, whoever their parent is now."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"REFLECTVLM_WORKER=" in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def zombies() -> list[int]:
    """Children of this process that have ended and that nobody has waited for."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except (OSError, ValueError):
            continue
        if state == "Z" and int(parent) == os.getpid():
            found.append(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(marked())
    yield
    end = time.monotonic() + 3.0
    while (left := [pid for pid in marked() if pid not in before]) and time.monotonic() < end:
        time.sleep(0.05)
    found = (left, zombies())
    assert found == ([], []), found
