"""Long tests, run by `make torture`: a training process killed at random moments, again and again."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from test_resume import start
from training import logged

pytestmark = pytest.mark.torture
SEED, KILLS, STEPS = 20261121, 20, 40


@pytest.mark.timeout(3600)
def test_random_kills_change_nothing(tmp_path):
    """Bug: some instant of a run at which a kill loses or changes what follows."""
    dice = random.Random(SEED)
    assert start(tmp_path / "whole", STEPS).wait() == 0
    for _ in range(KILLS):
        child = start(tmp_path / "cut", STEPS)
        time.sleep(dice.uniform(4, 14))
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert start(tmp_path / "cut", STEPS).wait() == 0
    assert logged(tmp_path / "cut" / "rl") == logged(tmp_path / "whole" / "rl")
