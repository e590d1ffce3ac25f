"""The benchmarks' own help."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("name", ["insertion", "qwen_la", "torture"])
def test_help_is_the_docstring_as_written(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands and formulas that argparse runs together into one paragraph."""
    file = FOLDER / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(file), run_name="__main__")
    written = file.read_text(encoding="utf-8").split('"""')[1]
    assert written.strip() in capsys.readouterr().out
