"""What the wheel carries: a user who installs it has recipes, weights and data, and no checkout."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = [
    "reflectvlm/py.typed",
    "reflectvlm/recipes/lookback_rl.yaml",
    "reflectvlm/recipes/_rl.yaml",
    "reflectvlm/recipes/policy/tiny.yaml",
    "reflectvlm/recipes/data/digits.yaml",
    "reflectvlm/models/tiny_base/model.safetensors",
    "reflectvlm/models/tiny_base/tokenizer.json",
    "reflectvlm/models/tiny_base/README.md",
    "reflectvlm/data/digits.npz",
    "reflectvlm/report/assets/page.css",
    "reflectvlm/report/assets/main.js",
    "reflectvlm/curate/review/assets/page.css",
    "reflectvlm/curate/review/assets/main.js",
    "reflectvlm/data/instructions/semantic_back.txt",
]


def test_wheel_is_complete_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: `pip install` gives a package whose recipes, weights or licences stayed in the checkout."""
    build = pytest.importorskip("hatchling.build", reason="hatchling builds the wheel; the dev extra has it")
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        names = set(wheel.namelist())
        base = sum(i.compress_size for i in wheel.infolist() if "models/tiny_base/" in i.filename)
    assert not [name for name in NEEDED if name not in names]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("licenses/NOTICE") for name in names)
    assert not [name for name in names if name.startswith("tests/")]
    assert base < 12e6
