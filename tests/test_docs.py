"""Every Python block of README and docs runs, and prints what the text beside it says."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```python\n(?P<code>.*?)```(?:\n+```text\n(?P<printed>.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]\d+)?")
RECORD = os.environ.get("REFLECTVLM_RECORD_DOCS") == "1"
"""Set it to write what the blocks print into the pages, instead of comparing."""


def same(printed: str, expected: str) -> bool:
    """Equal text; decimal numbers may differ in their third digit, as between two machines."""
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (printed, expected)]
    shapes = [NUMBER.sub("#", text).split() for text in (printed, expected)]
    return shapes[0] == shapes[1] and all(
        math.isclose(a, b, rel_tol=0.02, abs_tol=0.002) for a, b in zip(*numbers, strict=True)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    """Bug: an example in the docs that no longer runs, or shows numbers nothing prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REFLECTVLM_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {"__name__": "__docs__"}
    text = page.read_text()
    for block in BLOCK.finditer(text):
        out = io.StringIO()
        line = text[: block.start()].count("\n") + 1
        with contextlib.redirect_stdout(out):
            exec(compile(block["code"], f"{page.name}:{line}", "exec"), names)
        if block["printed"] is None:
            continue
        if RECORD:
            page.write_text(
                page.read_text().replace(block[0], block[0].replace(block["printed"], out.getvalue()))
            )
        else:
            assert same(out.getvalue(), block["printed"]), f"{page.name}:{line} printed\n{out.getvalue()}"


def test_comparison_can_fail():
    """Bug: a comparison so lenient that no page can be wrong."""
    assert same("loss -0.1234", "loss -0.1235")
    assert not same("loss -0.1234", "loss 0.1234")
    assert not same("loss -0.123", "loss -0.163")
    assert not same("two rows", "three rows")
