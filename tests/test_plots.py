"""Curves: numbers in, picture out, and nothing global touched."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from reflectvlm.train.plots import curves, moving_average, read_series


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_series_skip_what_is_no_number(tmp_path: Path) -> None:
    """Prevents a null (NaN), a cut line or a text from failing the plot, and two values for a step."""
    path = write(
        tmp_path / "m.jsonl",
        {"step": 2, "loss": 2.0, "kl": None, "entropy": float("nan")},
        {"step": 1, "loss": 9.0, "name": "x"},
        [1, 2],
        {"loss": 1.0},
        {"step": 1, "loss": 1.0, "eval/accuracy": 0.5},
    )
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo\xc3')
    assert read_series(path) == {"loss": ([1, 2], [1.0, 2.0]), "eval/accuracy": ([1], [0.5])}


@pytest.mark.parametrize(
    ("values", "window", "expected"),
    # Means of the pair 0, 3, of all three, and of the pair 3, 6.
    [([0.0, 3.0, 6.0], 3, [1.5, 3.0, 4.5]), ([1.0, 2.0], 1, [1.0, 2.0]), ([], 3, [])],
)
def test_moving_average(values: list[float], window: int, expected: list[float]) -> None:
    """Prevents a curve shifted against its points, or pulled to 0 at its ends."""
    assert moving_average(values, window) == expected


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(image.width * image.height)
    assert found is not None
    return {colour for _, colour in found}


def width(path: Path) -> int:
    with Image.open(path) as image:
        return image.width


def test_picture(tmp_path: Path) -> None:
    """Prevents panels for keys that never came, missing evaluation points, and `$` read as maths."""
    rows = [{"step": s, "reward": s / 30, "accuracy": 0.5, "$odd_{$": 1.0} for s in range(30)]
    path = write(tmp_path / "m.jsonl", *rows)
    two = curves(path, tmp_path / "two.png", keys=("reward", "$odd_{$", "never"))
    one = curves(path, tmp_path / "one.png", keys=("reward",))
    assert width(two) == 2 * width(one)
    blue, orange = (37, 99, 235), (234, 88, 12)
    plain = colours(curves(path, tmp_path / "a.png", keys=("accuracy",)))
    assert blue in plain
    assert orange not in plain
    write(path, *rows, {"step": 30, "eval/accuracy": 0.75})
    assert orange in colours(curves(path, tmp_path / "b.png", keys=("accuracy",)))
    assert not list(tmp_path.glob(".*"))


def test_a_run_without_metrics_gets_a_picture(tmp_path: Path) -> None:
    """Prevents a run of zero steps from failing at its very end."""
    assert curves(tmp_path / "missing.jsonl", tmp_path / "c.png").stat().st_size > 0


def test_nothing_global(tmp_path: Path) -> None:
    """Prevents a notebook's backend or style from changing: pyplot is never even imported."""
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    curves(write(tmp_path / "m.jsonl", {"step": 1, "loss": 1.0}), tmp_path / "c.png")
    assert ("matplotlib.pyplot" in sys.modules) == loaded
    assert dict(mpl.rcParams) == before
