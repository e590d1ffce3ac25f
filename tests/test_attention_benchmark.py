"""benchmarks/attention.py at a tiny size: its tables and figures come from models named on its command
line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reflectvlm.attention.readings import SHARES, Reading
from reflectvlm.attention_rows import Looked
from reflectvlm.types import SamplingParams

FILE = Path(__file__).parent.parent / "benchmarks/attention.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script as a module, which writes to a folder of the test."""
    spec = importlib.util.spec_from_file_location("attention_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "SAMPLING", SamplingParams(max_tokens=24, temperature=0.0))
    return module


def test_two_models_on_a_few_pages(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: hours of training, and then a benchmark that cannot write its table."""
    words = ["attention.py", "--lookback", "tiny", "--grpo", "tiny", "--pages", "3"]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    found = json.loads((tmp_path / "results/attention.json").read_text())
    names = ["Look-Back", "Look-Back, image at <back>", "Look-Back, text at <back>", "GRPO"]
    assert list(found["rows"]) == names
    commands = ["reflectvlm train recipe=lookback_rl", "reflectvlm train recipe=grpo"]
    assert found["training"] == commands
    (row,) = found["rows"]["GRPO"]
    assert row["answers"] == 3
    assert 0 <= row["accuracy"] <= 1
    # No answer of the base looks back, so all of them are GRPO's.
    assert row["parts"] == found["rows"]["Look-Back"][0]["parts"]
    table = (tmp_path / "results/attention.md").read_text()
    assert table in capsys.readouterr().out
    assert "| Look-Back, text at `<back>` |" in table
    assert "(n 3)" in next(line for line in table.splitlines() if line.startswith("| GRPO |"))
    figures = {file.stem for file in (tmp_path / "results").glob("*.png")}
    drawn = ["lengths", "parts", "hallucination"]
    drawn += [f"{model}_{what}" for model in ("lookback", "grpo") for what in ("trend", "maps")]
    assert figures == {f"attention_{name}" for name in drawn}


def test_models_must_be_named(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a table of nothing."""
    monkeypatch.setattr(sys, "argv", ["attention.py"])
    with pytest.raises(SystemExit):
        script.main()
    assert "name trained models" in capsys.readouterr().err


def test_the_fair_partner_of_what_is_inside(script: Any) -> None:
    """Bug: early tokens of GRPO, which attend to the image more, in the mean of its late ones."""
    columns = np.repeat(np.array([0.9, 0.8, 0.3, 0.1])[:, None], len(SHARES), 1)
    rows = [Reading(id=str(n), text="", shares=columns[:n], part=np.full(n, -1)) for n in (4, 3, 2)]
    made = script.late(Looked(name="GRPO", reattention="", readings=rows), 2)
    # Two answers have tokens from number 2 on: (0.3 + 0.1) / 2 and 0.3.
    assert made["late_answers"] == 2
    assert made["late_visual"] == pytest.approx((0.2 + 0.3) / 2)


def test_how_models_were_trained_is_read_from_their_runs(script: Any, tmp_path: Path) -> None:
    """Bug: numbers without the command that made their models, or with a path of one machine."""
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/overrides.txt").write_text("seed=2\nroot=/somewhere/else\n")
    options = argparse.Namespace(lookback=[], grpo=[str(tmp_path / "run/model")], copy=[])
    assert script.training(options) == ["reflectvlm train recipe=grpo seed=2"]


def test_a_rate_stands_beside_what_it_is_of(script: Any) -> None:
    """Bug: a mean of three answers looks like one of six hundred; one seed with a deviation of 0."""
    assert script.spread([1.0, 3.0, None]) == "2.000 ± 1.414"
    assert script.spread([None, float("nan")]) == "–"
    rows = [{"kept": 0.5, "rows": 40.0}, {"kept": 0.7, "rows": 30.0}, {"kept": None, "rows": 9.0}]
    assert script.of(rows, "kept", "rows", 2) == "0.60 ± 0.14 (n 70)"
    assert script.of(rows[:1], "kept", "rows") == "0.500 (n 40)"
    assert script.of([{}], "kept", "rows") == "–"
    assert script.counted(200, {"a": [1, 2, 3], "b": [1, 2]}) == "200 test pages, 2 to 3 seeds"
    assert script.counted(200, {"a": [1]}) == "200 test pages, 1 seed"
