"""Every promise of docs/reliability.md has a test that carries its name."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
PROMISES = {"a": 6, "b": 6, "c": 4, "d": 6, "e": 7, "f": 6, "h": 6}
"""Sections and how many cases each has. G, many ranks, is not promised yet."""


def test_every_case_has_a_test() -> None:
    """Bug: a promise stays in the table after its last test was renamed or deleted."""
    names = {
        name
        for file in HERE.glob("test_reliability_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    cases = [f"{section}{number}" for section, count in PROMISES.items() for number in range(1, count + 1)]
    lacking = [case for case in cases if not any(name.startswith(f"test_{case}_") for name in names)]
    assert not lacking


def test_the_table_names_no_file_that_is_not_there() -> None:
    """Bug: the document points to a test file that has moved."""
    text = (HERE.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    for file in re.findall(r"`(tests/test_\w+\.py)`", text):
        assert (HERE.parent / file).is_file(), file
    for link in re.findall(r"\]\((\.\./[^)#]+)\)", text):
        assert (HERE.parent / "docs" / link).resolve().is_file(), link
