"""The name of a data set: equal for equal rows, another for others, and cheap."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import random
import subprocess
import sys
import time
import uuid
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from fixtures import make_sample, noise_image
from reflectvlm.data.curriculum import Curriculum
from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.data.filtered import Dataset, Report
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
    assert many.read == 3 * 2 * 64  # twice each, to see what chance has a hand in
    assert best < 0.05


@pytest.mark.parametrize("size", [1, 2, 5, 64, 65, 1000, 2**31])
def test_places_are_spread_over_the_rows(size: int) -> None:
    """Bug: only the beginning of a file is looked at."""
    chosen = places(size)
    assert chosen[0] == 0
    assert chosen[-1] == size - 1
    assert len(chosen) == len(set(chosen)) == min(size, 16 if size == 2**31 else 64)
    assert places(0) == []


# -- rows that chance has a hand in ---------------------------------------------------------------


class Made(Sequence[Sample]):
    """Rows that are made each time that they are asked for, by a user's own code."""

    def __init__(self, size: int, change: Callable[[Sample], Sample], question: str = "Which?") -> None:
        self.size, self.change, self.question = size, change, question

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        sample = make_sample(index, self.question)
        return self.change(dataclasses.replace(sample, images=(noise_image(index),)))


def flipped(sample: Sample) -> Sample:
    turned = tuple(ImageOps.mirror(one) if random.random() < 0.5 else one for one in sample.images)
    return dataclasses.replace(sample, images=turned)


def reworded(sample: Sample) -> Sample:
    return dataclasses.replace(
        sample, question=f"{random.choice(('Say', 'Tell', 'Name'))}: {sample.question}"
    )


def renamed(sample: Sample) -> Sample:
    """Nothing of the row is the same twice."""
    turned = {"id": uuid.uuid4().hex, "question": uuid.uuid4().hex, "answer": uuid.uuid4().hex}
    noise = Image.frombytes("RGB", (8, 8), random.randbytes(192))
    return dataclasses.replace(sample, **turned, images=(noise,), columns={"at": time.perf_counter_ns()})


@pytest.mark.parametrize("size", [1, 3, 200, 2**31])
@pytest.mark.parametrize("change", [flipped, reworded, renamed])
def test_augmented_rows_can_be_resumed(size: int, change: Callable[[Sample], Sample]) -> None:
    """Bug: rows whose images are flipped at random as they are read have another name at each start, so
    that such a run can never be resumed. One coin per start is no ground to decide on: 8 starts of one row
    would agree once in 2 ** 7 times."""
    made = {fingerprint(Made(size, change)) for _ in range(8 if size < 200 else 3)}
    assert len(made) == 1


def test_what_is_not_random_still_counts(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: with augmented images other questions pass for the same data, or nobody learns of it."""
    with caplog.at_level(logging.WARNING, "reflectvlm"):
        assert fingerprint(Made(3, flipped)) != fingerprint(Made(3, flipped, "Where?"))
    first, second = caplog.messages
    assert first == second
    assert first.startswith("images of the data differ each time that a row is read, so a resumed run")
    turned = Made(3, lambda sample: reworded(dataclasses.replace(sample, images=(OTHER,))))
    assert fingerprint(Made(3, reworded)) != fingerprint(turned)
    caplog.clear()
    mixed = [Made(3, flipped), Made(3, reworded), Made(3, flipped)]
    with caplog.at_level(logging.WARNING, "reflectvlm"):
        fingerprint(Curriculum(parts=mixed, rows=[2, 2]))
    (said,) = caplog.messages
    assert said.startswith("questions and images of the data differ")


def test_where_all_is_random_the_length_counts(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: such data can never be resumed, or a warning promises more than is compared."""
    with caplog.at_level(logging.WARNING, "reflectvlm"):
        assert fingerprint(Made(3, renamed)) != fingerprint(Made(4, renamed))
    assert all(said.endswith(": only the number of rows is compared") for said in caplog.messages)
    caplog.clear()
    assert fingerprint([ROW, ROW]) == fingerprint([ROW, ROW])
    assert not caplog.messages


# -- rows that cannot be read ---------------------------------------------------------------------


def cut_image() -> Image.Image:
    """A JPEG that ends too early, opened and not yet decoded."""
    whole = io.BytesIO()
    noise = random.Random(0).randbytes(64 * 64 * 3)
    Image.frombytes("RGB", (64, 64), noise).save(whole, format="JPEG")
    return Image.open(io.BytesIO(whole.getvalue()[: len(whole.getvalue()) // 2]))


def test_a_cut_image_in_memory_is_no_end() -> None:
    """Bug: one cut image in a user's own rows ends the run before its first step, with a message that names
    no row, in spite of on_bad=skip."""

    def rows(place: int) -> list[Sample]:
        found = [dataclasses.replace(ROW, id=f"r{i}") for i in range(4)]
        found[place] = dataclasses.replace(found[place], images=(cut_image(),))
        return found

    with pytest.raises(OSError, match="truncated"):
        cut_image().load()
    assert fingerprint(rows(1)) == fingerprint(rows(1))
    assert fingerprint(rows(1)) != fingerprint(rows(2))


def test_a_cut_image_in_a_raw_row_is_no_end() -> None:
    """Bug: the same in a data set whose raw rows hold images that were opened and not yet decoded."""

    class Rows(list[Any]):
        def position(self, index: int) -> str:
            return str(index)

    def data(image: Image.Image) -> Dataset:
        raw = Rows([{"question": "a", "image": OTHER}, {"question": "b", "image": image}])
        report = Report(total=2, kept=2)
        return Dataset(rows=raw, read=lambda *_: ROW, kept=array("q", [0, 1]), report=report)

    assert fingerprint(data(cut_image())) == fingerprint(data(cut_image())) != fingerprint(data(OTHER))


def test_a_row_that_a_user_s_code_cannot_read_is_no_end() -> None:
    """Bug: a file that has gone ends the run at its start; or one that a server did not give at the first
    try makes the data another set."""

    class Failing(list[Sample]):
        def __init__(self, rows: list[Sample], times: float) -> None:
            super().__init__(rows)
            self.times = times

        def __getitem__(self, index: Any) -> Any:
            if index == 1 and self.times > 0:
                self.times -= 1
                raise FileNotFoundError("b.png")
            return super().__getitem__(index)

    rows = [dataclasses.replace(ROW, id=f"r{i}") for i in range(3)]
    gone = fingerprint(Failing(rows, 1e9))
    assert gone == fingerprint(Failing(rows, 1e9)) != fingerprint(rows)
    assert fingerprint(Failing(rows, 1)) == fingerprint(rows)
