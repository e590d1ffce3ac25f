"""Shape checks in all tests, one thread, no network, and the tiny policies that tests share."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import Any

import jaxtyping
from beartype import beartype


def checked(function: Any) -> Any:
    """beartype for the annotations that state shapes, and for no others: a test of a message about a
    wrong `Literal` must reach that message, and scripted fakes stand in for a whole `Policy`."""
    hints = getattr(function, "__annotations__", {})
    shapes = {name: hint for name, hint in hints.items() if "Tensor" in str(hint) or "ndarray" in str(hint)}
    if not shapes:
        return function
    function.__annotations__ = shapes
    return beartype(function)


# Every shape in the library's signatures becomes a check while tests run.
jaxtyping.install_import_hook("reflectvlm", f"{__name__}.checked")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

from fixtures import make_policy  # noqa: E402
from reflectvlm.models.qwen_vl import QwenVL  # noqa: E402

# Background jobs and nohup ignore these two, and so would the tests that send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-golden", action="store_true", help="write tests/golden anew")


@pytest.fixture(scope="session")
def tiny_policy() -> QwenVL:
    """A random tiny policy with enlarged weights. Tests must not change it; those that train or
    break a policy make their own with `make_policy`."""
    return make_policy()


@pytest.fixture(scope="session")
def exact_policy() -> QwenVL:
    """The same in float64, for parity: see `make_policy`."""
    return make_policy(dtype=torch.float64)
