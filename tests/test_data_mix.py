"""`reflectvlm data mix` and `to-hub`: files of rows that say what they were made of."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from PIL import Image

import reader_files
from bad_rows import encoded, written
from reflectvlm.curate.types import Question
from reflectvlm.data import mix_command, to_hub_command
from reflectvlm.data.mix import Mixture, Part
from reflectvlm.data.mix_command import weighted
from reflectvlm.data.readers import questions
from reflectvlm.data.sources import dataset
from reflectvlm.data.to_hub import Published
from reflectvlm.recipe_check import RecipeError
from reflectvlm.types import Sample


def part(name: str, count: int, weight: float = 1.0) -> Part:
    made = [Question(id=str(i), question="q", answer="a") for i in range(count)]
    return Part(name=name, rows=lambda: iter(made), weight=weight)


def test_shares_follow_weights() -> None:
    """Bug: weights are by source size, or the larger source ends the mixture."""
    mixture = Mixture(parts=[part("a", 10, 3.0), part("b", 1000, 1.0)], rows=4000, seed=1)
    rows = list(mixture)
    counts = Counter(row.source for row in rows)
    # 4,000 draws at 3/4: a standard deviation is 27.
    assert abs(counts["a"] - 3000) < 110
    assert mixture.shares["a"] == (0.75, counts["a"] / 4000)
    assert mixture.rounds == {"a": -(-counts["a"] // 10), "b": 1 + (counts["b"] - 1) // 1000}
    assert len({row.id for row in rows}) == 4000
    assert rows[0].id.startswith(f"{rows[0].source}/")
    again = [row.id for row in rows if row.source == "a"]
    assert again[9:12] == ["a/9", "a/0~2", "a/1~2"]


def test_all_rows_once() -> None:
    """Bug: without a number a small source comes again, or a mixture ends with the first that is used up."""
    rows = list(Mixture(parts=[part("a", 3, 9.0), part("b", 20)]))
    assert Counter(row.id for row in rows) == Counter(
        [f"a/{i}" for i in range(3)] + [f"b/{i}" for i in range(20)]
    )
    assert [row.id for row in rows if row.source == "b"] == [f"b/{i}" for i in range(20)]


def test_seeds() -> None:
    """Bug: the order hangs on a hash that differs from process to process, or on nothing."""

    def order(seed: int) -> list[str]:
        return [row.id for row in Mixture(parts=[part("a", 20), part("b", 20)], seed=seed)]

    assert order(0) == order(0)
    assert order(0) != order(1)


@pytest.mark.parametrize(
    ("parts", "settings", "match"),
    [
        ([("a", 0.0)], {}, r"weight of a is 0.0. It must be more than 0"),
        ([("a/b", 1.0)], {}, r"no '/' in it"),
        ([("a", 1.0), ("a", 1.0)], {}, r"Two sources of a mixture have one name: a, a"),
        ([("a", 1.0)], {"rows": 0}, r"rows is 0"),
        ([], {}, r"at least one source"),
    ],
)
def test_wrong_mixtures(parts: list[tuple[str, float]], settings: dict[str, Any], match: str) -> None:
    """Bug: a source without weight is drawn for ever, two of one name give ids that are not unique."""
    with pytest.raises(ValueError, match=match):
        Mixture(parts=[part(name, 1, weight) for name, weight in parts], **settings)


def two_files(folder: Path) -> tuple[Path, Path]:
    """JSON lines with a path, and Parquet with an image inside, of one folder."""
    (folder / "in").mkdir()
    (folder / "in/good.png").write_bytes(encoded())
    lines = [
        {"question": f"<image> {i}", "answer": str(i), "images": ["good.png"], "level": i, "note": {"a": [i]}}
        for i in range(6)
    ]
    path = written(folder / "in/lines.jsonl", *lines)
    stored = {"bytes": encoded(Image.new("RGB", (9, 9), (1, 2, 3))), "path": None}
    rows = [{"id": f"t{i}", "question": "q", "answer": "x", "images": [stored]} for i in range(4)]
    reader_files.table(folder / "in/table.parquet", *rows)
    return path, folder / "in/table.parquet"


def test_files_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: two splits of one data set, or `a/train.jsonl` and `b/train.jsonl`, cannot be mixed; a file that
    is named twice is mixed twice."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        written(
            tmp_path / folder / "rows.jsonl",
            {"id": "1", "question": f"of {folder}", "answer": "x", "images": []},
        )
    words = [f"{tmp_path}/a/rows.jsonl", f"{tmp_path}/b/rows.jsonl"]
    assert mix_command.run([*words, f"out={tmp_path}/mixed.jsonl"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "mixed.jsonl").read_text().splitlines()]
    assert {row["id"]: row["question"] for row in rows} == {"a/1": "of a", "b/1": "of b"}
    with pytest.raises(RecipeError, match=r"'x' is no weight. Write a number"):
        mix_command.run([words[0], f"{words[1]}:x", f"out={tmp_path}/more.jsonl"])
    with pytest.raises(RecipeError, match="is named twice"):
        mix_command.run([words[0], f"{words[0]}:2", f"out={tmp_path}/more.jsonl"])
    monkeypatch.chdir(tmp_path)
    for again in ("./a/rows.jsonl", "b/../a/rows.jsonl:2", words[0]):
        with pytest.raises(RecipeError, match="is named twice"):
            mix_command.run(["a/rows.jsonl", again, "out=more.jsonl"])


@pytest.mark.parametrize("name", ["mixed.jsonl", "mixed.parquet"])
def test_a_mixture_reads_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: image paths are relative to a folder in which the new file is not; a column changes its kind."""
    lines, table = two_files(tmp_path)
    out = tmp_path / name
    assert mix_command.run([f"{lines}:2", str(table), f"out={out}", "seed=3"]) == 0
    mixed = {sample.id: sample for sample in dataset(out, on_bad="error")}
    assert len(mixed) == 10
    for sample in dataset(lines):
        other = mixed[f"lines/{sample.id}"]
        assert (other.question, other.answer) == (sample.question, sample.answer)
        assert {**sample.columns, "source": "lines"} == dict(other.columns)
        assert [i.tobytes() for i in other.images] == [i.tobytes() for i in sample.images]
    assert mixed["table/t2"].images[0].getpixel((0, 0)) == (1, 2, 3)
    assert {key for key, value in mixed["table/t2"].columns.items() if value is not None} == {"source"}
    said = capsys.readouterr().out
    assert "| lines  |    6 | 0.600 |     0.667 |      1 |" in said
    before = out.read_bytes()
    with pytest.raises(RecipeError, match=rf"out=.*{name} exists"):
        mix_command.run([str(lines), f"out={out}"])
    out.unlink()
    mix_command.run([f"{lines}:2", str(table), f"out={out}", "seed=3"])
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_images_elsewhere(tmp_path: Path) -> None:
    """Bug: rows that name images outside of their folder, which `dataset()` refuses."""
    lines, _ = two_files(tmp_path)
    (tmp_path / "other").mkdir()
    out = tmp_path / "other/mixed.jsonl"
    with pytest.raises(
        RecipeError, match=r"Image 'good.png' of lines/lines.jsonl:1 does not lie below .*embed"
    ):
        mix_command.run([str(lines), f"out={out}"])
    assert list((tmp_path / "other").iterdir()) == []
    mix_command.run([str(lines), f"out={out}", "images=embed", "rows=9"])
    mixed = dataset(out, on_bad="error")
    assert len(mixed) == 9
    assert mixed[0].images[0].tobytes() == dataset(lines)[0].images[0].tobytes()


def test_weights_behind_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a reader's folder is taken for a weight, or a file with a colon cannot be named."""
    monkeypatch.chdir(tmp_path)
    assert weighted("a.jsonl:2.5") == ("a.jsonl", 2.5)
    assert weighted("a.jsonl") == ("a.jsonl", 1.0)
    assert weighted("geo170k:folder") == ("geo170k:folder", 1.0)
    assert weighted("geo170k:folder:3") == ("geo170k:folder", 3.0)
    Path("a:2").write_text("")
    assert weighted("a:2") == ("a:2", 1.0)


# -- to-hub -----------------------------------------------------------------------------------------


def odd_rows(folder: Path) -> Path:
    """Rows whose columns a table has no kind for."""
    (folder / "good.png").write_bytes(encoded())
    (folder / "photo.jpg").write_bytes(encoded(kind="JPEG"))
    common = {"answer": "1", "images": ["good.png", "photo.jpg"]}
    rows = [
        {"id": "a", "question": "<image><image> one", "level": 1, "mixed": 1, "tags": ["x"], **common},
        {"id": "b", "question": "two", "level": 2, "mixed": "two", "tags": ["y", "z"], **common},
        {"id": "c", "question": "three", "answer": "2", "level": None, "mixed": 2.5, "empty": []},
        {
            "id": "d",
            "question": "four",
            "answer": 3,
            "deep": {"a": [1, {"b": None}]},
            "rate": 0.5,
            "yes": True,
        },
    ]
    return written(folder / "rows.jsonl", *rows)


def same(one: Sample, other: Sample) -> None:
    assert (one.id, one.question, one.answer) == (other.id, other.question, other.answer)
    assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
    assert {key: value for key, value in one.columns.items() if value is not None} == {
        key: value for key, value in other.columns.items() if value is not None
    }


def test_published_rows_read_back_equal(tmp_path: Path) -> None:
    """Bug: a table turns 1 into "1", an object into one with more keys, a JPEG into another JPEG."""
    path, folder = odd_rows(tmp_path), tmp_path / "hub"
    assert to_hub_command.run([str(path), f"out={folder}", "title=Odd rows"]) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "train-00000-of-00001.parquet"]
    before, after = list(dataset(path)), list(dataset(folder, on_bad="error"))
    assert len(before) == len(after) == 4
    for one, other in zip(before, after, strict=True):
        same(one, other)
    for one, row in zip(before, questions(folder), strict=True):  # the way of streams
        assert (one.id, one.columns.get("mixed")) == (row.id, row.columns["mixed"])
    table = pyarrow.parquet.read_table(folder / "train-00000-of-00001.parquet")
    assert table["images"][0][1].as_py() == {
        "bytes": (tmp_path / "photo.jpg").read_bytes(),
        "path": "photo.jpg",
    }
    assert table["tags"].type == "list<element: string>" or str(table["tags"].type).startswith("list<")


def test_the_hub_s_library_reads_it(tmp_path: Path) -> None:
    """Bug: the images are structs of bytes to everybody else."""
    import datasets

    path, folder = odd_rows(tmp_path), tmp_path / "hub"
    to_hub_command.run([str(path), f"out={folder}"])
    loaded = datasets.Dataset.from_parquet(
        str(folder / "train-00000-of-00001.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert loaded.features["images"] == datasets.List(datasets.Image())
    assert loaded[0]["images"][0].size == (60, 40)
    assert loaded[1]["mixed"] == '"two"'


def test_shards_and_the_card(tmp_path: Path) -> None:
    """Bug: shards whose names do not say how many there are; a card with figures of another set."""
    folder = tmp_path / "hub"
    noise = encoded(Image.effect_noise((1024, 1024), 90), "BMP")  # 1 MB each
    rows = [
        Question(id=str(i), question="q" * (i + 1), answer="a", images=(noise,), source=("a|b", "c")[i % 2])
        for i in range(5)
    ]
    card = Published(title="Five", shard_mb=2, contamination="None found.")(lambda: iter(rows), folder)
    assert (card.rows, card.shards) == (5, 3)
    names = [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert sorted(file.name for file in folder.glob("*.parquet")) == names
    assert [sample.id for sample in dataset(folder)] == list("01234")
    text = (folder / "README.md").read_text()
    import yaml

    front = yaml.safe_load(text.split("---\n")[1])
    assert front["dataset_info"]["splits"] == [{"name": "train", "num_examples": 5}]
    assert {one["name"] for one in front["dataset_info"]["features"]} == {
        "id", "question", "answer", "images", "source",
    }  # fmt: skip
    assert front["license"] == "unknown"
    assert text.count("TO BE FILLED IN") == 4
    assert "| question | 1 | 3 | 5 |" in text
    assert "| a\\|b | 3 |" in text
    assert "None found." in text
    with pytest.raises(ValueError, match=r"hub exists. Name a new folder"):
        Published(title="x")(lambda: iter(rows), folder)


def test_nothing_half_made_stays(tmp_path: Path) -> None:
    """Bug: a folder that looks whole after a run that failed."""
    path = written(tmp_path / "rows.jsonl", {"id": "a", "question": "q", "answer": "1", "images": "x.png"})
    (tmp_path / "x.png").write_bytes(b"x")
    calls = []

    def rows() -> Any:
        calls.append(1)
        if len(calls) == 2:
            (tmp_path / "x.png").unlink()
        return questions(path) if len(calls) < 2 else iter([next(iter(first))])

    first = list(questions(path))
    with pytest.raises(ValueError, match=r"Image 'x.png' does not exist"):
        Published(title="x")(rows, tmp_path / "hub")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.jsonl"]


def test_lines_of_a_mixture_are_strict_json(tmp_path: Path) -> None:
    """Bug: a NaN of a table becomes a line that no reader takes."""
    reader_files.table(tmp_path / "t.parquet", {"question": "q", "answer": "1", "rate": float("nan")})
    with pytest.raises(ValueError, match=r"Column 'row' holds what JSON cannot"):
        mix_command.run([str(tmp_path / "t.parquet"), f"out={tmp_path / 'o.jsonl'}"])
    assert json.loads('{"a": 1}') == {"a": 1}
