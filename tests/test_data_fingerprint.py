"""The name of a data set: equal for equal rows, another for others, and cheap."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fixtures import make_sample
from reflectvlm.data.curriculum import Curriculum
from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.data.fingerprint import fingerprint, places
from reflectvlm.data.rows import BadRow, Columns
from reflectvlm.data.shapes import Shapes
from reflectvlm.data.sources import dataset
from reflectvlm.types import Sample

ROW = make_sample()
OTHER = Image.new("RGB", (64, 64), (1, 2, 3))


def test_it_is_the_same_in_another_process() -> None:
    """Bug: hashes of texts differ between processes, so no run could ever be resumed."""
    code = (
        "from reflectvlm.data.fingerprint import fingerprint; from reflectvlm.data.digits import Digits\n"
        "print(fingerprint(Digits(size=100)))"
    )
    for seed in ("1", "2"):
        told = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert told.stdout.strip() == fingerprint(Digits(size=100))
    assert fingerprint(Digits(size=100)).startswith("100-")


@pytest.mark.parametrize(
    "changed",
    [
        [],
        [ROW, ROW],
        [dataclasses.replace(ROW, id="b")],
        [dataclasses.replace(ROW, question="Other?")],
        [dataclasses.replace(ROW, answer="8")],
        [dataclasses.replace(ROW, columns={"level": 3})],
        [dataclasses.replace(ROW, columns={"level": "3"})],
        [dataclasses.replace(ROW, images=(OTHER,))],
        [dataclasses.replace(ROW, images=(*ROW.images, OTHER))],
        # The same characters, otherwise divided.
        [dataclasses.replace(ROW, question=ROW.question + ROW.answer, answer="")],
    ],
)
def test_any_change_of_a_row_shows(changed: list[Sample]) -> None:
    """Bug: a resumed run goes on with other rows under the old position."""
    assert fingerprint(changed) != fingerprint([ROW])
    assert fingerprint([dataclasses.replace(ROW)]) == fingerprint([ROW])


def test_order_and_settings_of_data_sets_show() -> None:
    """Bug: another seed, another split or another order of the same rows passes for the same data."""
    sets: list[Sequence[Sample]] = [
        Digits(size=20),
        Digits(size=21),
        Digits(size=20, split="test"),
        Digits(size=20, seed=5),
        DigitTraces(data=Digits(size=20)),
        list(reversed(list(Digits(size=20)))),
        Shapes(split="train", size=20),
        Curriculum(parts=[Digits(size=20), Digits(size=20, seed=5)], rows=[5]),
        Curriculum(parts=[Digits(size=20), Digits(size=20, seed=5)], rows=[6]),
    ]
    assert len({fingerprint(data) for data in sets}) == len(sets)


def lines(path: Path, count: int, changed: int = 7, **changes: Any) -> Path:
    rows = [{"question": f"q{i}", "answer": f"a{i}", "images": "x.png"} for i in range(count)]
    for key, value in changes.items():
        rows[changed][key] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_are_known_by_their_text_and_their_kept_rows(tmp_path: Path) -> None:
    """Bug: a file swapped between start and resume is not noticed, or a copy of it elsewhere is refused."""
    OTHER.save(tmp_path / "x.png")
    path = lines(tmp_path / "rows.jsonl", 60)
    before = fingerprint(dataset(path))
    (tmp_path / "copy").mkdir()
    OTHER.save(tmp_path / "copy" / "x.png")
    assert fingerprint(dataset(lines(tmp_path / "copy" / "rows.jsonl", 60))) == before
    assert fingerprint(dataset(path, check=False, on_bad="error")).startswith("60-")
    for change in ({"question": "other"}, {"answer": "b"}, {"level": 2}):
        assert fingerprint(dataset(lines(path, 60, **change))) != before
    # As many rows, but not the same ones: row 8 is gone and one more is there.
    kept = dataset(lines(path, 61, images="gone.png"))
    assert len(kept) == 60
    assert fingerprint(kept) != before


def test_another_kept_row_shows_wherever_it_is(tmp_path: Path) -> None:
    """Bug: as many rows are good as before, and one that is not looked at is another one: places(199)
    are multiples of 198 / 63, so 9 and 12 are looked at and 10 and 11 are not."""
    assert {9, 12} <= {*places(199)} <= {*range(199)} - {10, 11}
    OTHER.save(tmp_path / "x.png")
    path = tmp_path / "rows.jsonl"
    names = []
    for row in (10, 11):
        data = dataset(lines(path, 200, row, images="gone.png"))
        assert len(data) == 199
        names.append(fingerprint(data))
    assert names[0] != names[1]


def test_images_are_not_opened(tmp_path: Path) -> None:
    """Bug: an image that goes during a run, which the run passes over, makes its data another set."""
    OTHER.save(tmp_path / "x.png")
    data = dataset(lines(tmp_path / "rows.jsonl", 60))
    before = fingerprint(data)
    (tmp_path / "x.png").unlink()
    assert fingerprint(data) == before


def test_rows_that_cannot_be_read_have_a_name_too(tmp_path: Path) -> None:
    """Bug: a broken line, which the run passes over, stops it at the fingerprint."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n{\n')
    data = dataset(path, check=False, on_bad="error", columns=Columns(images=None))
    assert fingerprint(data) == fingerprint(data)

    class Broken(list[Sample]):
        def __getitem__(self, index: Any) -> Any:
            raise BadRow("x:1", "images", "missing image", "Copy it.")

    assert fingerprint(Broken([ROW])) != fingerprint([ROW])


def test_odd_values_in_columns_are_no_trouble() -> None:
    """Bug: an object's text holds its address, so the same data has another name in each process."""
    odd = {"a": object(), "b": {1: [None, float("nan"), b"x", (True, 1)]}, "c": "\ud83d"}
    again = odd | {"a": object()}
    first, second = ([dataclasses.replace(ROW, columns=columns)] for columns in (odd, again))
    assert fingerprint(first) == fingerprint(second)


def test_it_is_cheap() -> None:
    """Bug: a hash of all rows takes minutes before the first step."""

    class Counted(list[Sample]):
        read = 0

        def __getitem__(self, index: Any) -> Any:
            self.read += 1
            return super().__getitem__(index)

    many = Counted([ROW] * 100_000)
    best = 1.0
    for _ in range(3):
        started = time.perf_counter()
        fingerprint(many)
        best = min(best, time.perf_counter() - started)
    assert many.read == 3 * 64
    assert best < 0.05


@pytest.mark.parametrize("size", [1, 2, 5, 64, 65, 1000, 2**31])
def test_places_are_spread_over_the_rows(size: int) -> None:
    """Bug: only the beginning of a file is looked at."""
    chosen = places(size)
    assert chosen[0] == 0
    assert chosen[-1] == size - 1
    assert len(chosen) == len(set(chosen)) == min(size, 16 if size == 2**31 else 64)
    assert places(0) == []
