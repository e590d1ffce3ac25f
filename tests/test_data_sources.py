"""Files to a `Dataset`: every kind of file, every defect of one, and the report of what was lost."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from reflectvlm.data.filtered import Dataset
from reflectvlm.data.rows import BadRow, Columns
from reflectvlm.data.sources import Csv, HuggingFace, JsonLines, Parquet, dataset, pick

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For tests that write files: a busy disk is no bug."""

texts = st.text().filter(lambda text: text.strip() and "<image>" not in text)
"""Hypothesis also tries strings that it finds in our code, so the marker really comes up."""

text_only = partial(dataset, columns=Columns(images=None))


def png(colour: tuple[int, int, int] = (255, 0, 0), side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def line(number: int, **more: Any) -> str:
    return json.dumps({"question": f"q{number}", "answer": f"a{number}", **more}) + "\n"


def written(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join(part if isinstance(part, bytes) else part.encode() for part in lines))
    return path


def questions(data: Dataset) -> list[str]:
    return [sample.question for sample in data]


def skipped_line(tmp_path: Path, bad: str | bytes, reason: str, match: str) -> None:
    """Line 2 of three is bad: it is refused by "error", and exactly it is left out by "skip"."""
    path = written(tmp_path / "rows.jsonl", line(1), bad, line(3))
    with pytest.raises(BadRow, match=match) as caught:
        text_only(path, on_bad="error")
    assert caught.value.position == "rows.jsonl:2"
    assert "\n" not in str(caught.value)
    data = text_only(path, max_bad=0.5)
    assert questions(data) == ["q1", "q3"]
    assert data.report.reasons == {reason: ("rows.jsonl:2",)}
    assert [sample.id for sample in data] == ["rows.jsonl:1", "rows.jsonl:3"]


@pytest.mark.parametrize(
    ("bad", "reason", "match"),
    [
        (b'{"question": "\xff"}\n', "invalid UTF-8", "Byte 15 of the row"),
        ('{"question": "a", "answer": NaN}\n', "broken JSON", "NaN, which JSON does not have"),
        ('{"question": "a", "answer": "b", "answer": "c"}\n', "broken JSON", "the key 'answer' twice"),
        ('["question", "answer"]\n', "row is no object", "is a list, not an object"),
        ("17\n", "row is no object", "is a int, not an object"),
        ('{"question": "a"\n', "broken JSON", "no JSON at character"),
        ('{"question": "a", "answer": "b"} {}\n', "broken JSON", "Extra data"),
        ("[" * 100_000 + "\n", "broken JSON", "nested too deeply"),
        ('{"question": "a", "answer": ' + "9" * 5000 + "}\n", "broken JSON", "digits"),
        ('{"question": "a", "answer": ["b"]}\n', "answer is no text", "holds a list"),
        (line(1, id="rows.jsonl:1"), "duplicate id", "already the id of rows.jsonl:1"),
    ],
)
def test_bad_lines(tmp_path: Path, bad: str | bytes, reason: str, match: str) -> None:
    """One bad line costs itself, is named by file and line, and is never guessed at."""
    skipped_line(tmp_path, bad, reason, match)


def test_cut_last_line_is_named(tmp_path: Path) -> None:
    """An interrupted copy ends in the middle of a row."""
    path = written(tmp_path / "rows.jsonl", line(1), line(2)[:-9])
    with pytest.raises(BadRow, match=r"rows.jsonl:2: .* the file may be cut"):
        text_only(path, on_bad="error")
    whole = written(tmp_path / "whole.jsonl", line(1), line(2).rstrip("\n"))
    assert questions(text_only(whole)) == ["q1", "q2"]


def test_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    """Files from Windows: the first row is not lost, and line numbers are those of an editor."""
    crlf = line(3).replace("\n", "\r\n")
    path = written(tmp_path / "rows.jsonl", b"\xef\xbb\xbf", line(1), "\r\n", "  \n", crlf, "\n")
    data = text_only(path)
    assert [(sample.question, sample.id) for sample in data] == [
        ("q1", "rows.jsonl:1"),
        ("q3", "rows.jsonl:4"),
    ]


@patient
@given(st.lists(texts, min_size=1, max_size=5))
def test_any_text_survives_json_lines(tmp_path_factory: pytest.TempPathFactory, wanted: list[str]) -> None:
    """Splitting at U+2028 or \\x85, which JSON leaves bare, breaks rows that are fine."""
    rows = [json.dumps({"question": text, "answer": text}, ensure_ascii=False) + "\n" for text in wanted]
    path = written(tmp_path_factory.mktemp("t") / "rows.jsonl", *rows)
    assert questions(text_only(path)) == wanted


def test_gzip(tmp_path: Path) -> None:
    """A packed file gives the same rows under its own name; a cut one is refused whole."""
    packed = gzip.compress((line(1) + line(2)).encode())
    path = written(tmp_path / "rows.jsonl.gz", packed)
    data = text_only(path)
    assert questions(data) == ["q1", "q2"]
    assert data[1].id == "rows.jsonl.gz:2"
    for broken in (packed[:-12], b"no gzip at all"):
        with pytest.raises(ValueError, match=r"cannot be unpacked"):
            text_only(written(path, broken))


def test_long_line_and_long_cell(tmp_path: Path) -> None:
    """A row of 20 MB is fine in JSON; the csv module refuses a cell over 128 kB by default."""
    long = "x" * 20_000_000
    assert len(text_only(written(tmp_path / "a.jsonl", line(1, note=long)))[0].columns["note"]) == len(long)
    before = csv.field_size_limit()
    table = written(tmp_path / "a.csv", "question,answer,note\n", f"q,a,{long}\n")
    assert len(text_only(table)[0].columns["note"]) == len(long)
    assert csv.field_size_limit() == before


def test_changed_file_is_noticed(tmp_path: Path) -> None:
    """Rows are found by byte: after an edit, row 2 would be half of one and half of another."""
    path = written(tmp_path / "rows.jsonl", line(1), line(2))
    data = text_only(path)
    written(path, line(11), line(22))
    with pytest.raises(ValueError, match=r"rows.jsonl has changed since it was opened"):
        data[1]


def test_csv(tmp_path: Path) -> None:
    """Quoted line ends, commas and quotes stay in their cell, and positions are file lines."""
    (tmp_path / "x.png").write_bytes(png())
    rows = 'question,answer,images,level\r\n"two\nlines, ""q""",4,x.png,3\r\n\r\nplain,5,,\r\n'
    data = dataset(written(tmp_path / "t.csv", b"\xef\xbb\xbf", rows))
    assert [sample.id for sample in data] == ["t.csv:2", "t.csv:5"]
    assert data[0].question == 'two\nlines, "q"'
    assert len(data[0].images) == 1
    assert data[1].images == ()
    assert data[0].columns == {"level": "3"}
    tabs = written(tmp_path / "t.tsv", "question\tanswer\na,b\t4\n")
    assert questions(text_only(tabs)) == ["a,b"]
    packed = written(tmp_path / "t.csv.gz", gzip.compress(b"question,answer\na,4\n"))
    assert text_only(packed)[0].id == "t.csv.gz:2"


@patient
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_any_text_survives_csv(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    """Byte ranges found by the index must be exactly the records that the csv module wrote."""
    path = tmp_path_factory.mktemp("t") / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("question", "answer"), *rows])
    assert [(sample.question, sample.answer) for sample in text_only(path)] == rows


@pytest.mark.parametrize(
    ("bad", "reason", "match"),
    [
        (b"only one\n", "wrong number of cells", "1 cells and the header 2"),
        (b"a,b,c\n", "wrong number of cells", "3 cells and the header 2"),
        (b'"a"b,c\n', "broken CSV", "expected after"),
        (b"\xff,b\n", "invalid UTF-8", "Byte 1"),
        (b",b\n", "empty question", "Fill it"),
    ],
)
def test_bad_csv_rows(tmp_path: Path, bad: bytes, reason: str, match: str) -> None:
    """A shifted cell would make the answer of one column the question of another."""
    path = written(tmp_path / "t.csv", "question,answer\n", "q2,a\n", bad, "q4,a\n")
    with pytest.raises(BadRow, match=match):
        text_only(path, on_bad="error")
    data = text_only(path, max_bad=0.5)
    assert questions(data) == ["q2", "q4"]
    assert data.report.reasons == {reason: ("t.csv:3",)}


def test_open_quote_does_not_swallow_rows(tmp_path: Path) -> None:
    """One stray quote turns all rows after it into one bad row: 2 % lost would really be all."""
    path = written(tmp_path / "t.csv", "question,answer\n", 'q2,"a\n', *[f"q{i},a\n" for i in range(50)])
    with pytest.raises(ValueError, match=r"t.csv:2: a quote opened here .* up to line 52"):
        text_only(path, max_bad=1.0)
    cut = written(tmp_path / "cut.csv", "question,answer\n", "q2,a\n", 'q3,"a')
    assert text_only(cut, max_bad=0.5).report.reasons == {"broken CSV": ("cut.csv:3",)}


def test_bad_csv_headers(tmp_path: Path) -> None:
    """Two columns of one name: the second silently wins."""
    for head, match in [("a,a\n", "name of its own"), ("a,\n", "name of its own"), ("", "no header line")]:
        with pytest.raises(ValueError, match=match):
            text_only(written(tmp_path / "t.csv", head, "1,2\n" if head else ""))
    with pytest.raises(ValueError, match=r"header of .* cannot be read"):
        text_only(written(tmp_path / "t.csv", b"\xff\xfe,b\n1,2\n"))


def test_parquet_groups_and_shards(tmp_path: Path) -> None:
    """Row numbers must survive group and file borders, an empty file, and any order of access."""
    for name, count in [("b", 5), ("a", 3), ("c", 0)]:
        table = pa.table(
            {
                "question": pa.array([f"{name}{i}" for i in range(count)], pa.string()),
                "answer": pa.array(range(count), pa.int64()),
                "images": pa.array(
                    [[{"bytes": png((i, 0, 0)), "path": None}] for i in range(count)],
                    pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                ),
            }
        )
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    data = dataset(tmp_path)
    assert questions(data) == ["a0", "a1", "a2", "b0", "b1", "b2", "b3", "b4"]
    assert [data[i].id for i in (7, 0, 3)] == ["b.parquet:5", "a.parquet:1", "b.parquet:1"]
    assert data[6].answer == "3"
    assert data[6].images[0].getpixel((0, 0)) == (3, 0, 0)
    given = dataset(Parquet([tmp_path / "b.parquet", tmp_path / "a.parquet"]))
    assert questions(given)[0] == "b0"


def test_parquet_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bound, one pass over a file larger than memory keeps all of it."""
    from reflectvlm.data import tables

    table = pa.table({"question": ["q" * 100] * 40, "answer": ["a"] * 40})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=10)
    size = pq.read_metadata(tmp_path / "t.parquet").row_group(0).total_byte_size
    monkeypatch.setattr(tables, "_CACHE_BYTES", 2 * size)
    rows = tables.ParquetRows([tmp_path / "t.parquet"])
    for index in (0, 39, 15, 0, 25):
        assert rows[index]["answer"] == "a"
        assert len(rows._cache) <= 2


def test_bad_parquet(tmp_path: Path) -> None:
    """A cut file has no footer; a damaged page must cost its group and be named, not crash."""
    path = tmp_path / "t.parquet"
    table = pa.table({"question": [f"q{i:03}" for i in range(400)], "answer": ["a"] * 400})
    options: dict[str, Any] = {"row_group_size": 200, "compression": "gzip", "use_dictionary": False}
    pq.write_table(table, path, **options)
    data = bytearray(path.read_bytes())
    with pytest.raises(ValueError, match=r"no readable Parquet file"):
        text_only(written(tmp_path / "cut.parquet", bytes(data[:-20])))
    column = pq.read_metadata(path).row_group(1).column(0)
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 40] = bytes(40)
    damaged = text_only(written(path, bytes(data)), max_bad=0.5)
    assert len(damaged) == 200
    assert list(damaged.report.reasons) == ["broken Parquet"]
    assert damaged.report.skipped[0].position == "t.parquet:201"


def test_invalid_utf8_in_parquet(tmp_path: Path) -> None:
    """Arrow does not check text, so the error comes when a row is read."""
    raw = pa.array([b"fine", b"\xff"], pa.binary())
    text = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"question": text, "answer": ["a", "b"]}), tmp_path / "t.parquet")
    data = text_only(tmp_path / "t.parquet", max_bad=0.5)
    assert data.report.reasons == {"invalid UTF-8": ("t.parquet:2",)}


def test_saved_by_datasets(tmp_path: Path) -> None:
    """`datasets` decodes images itself, past our limits, and one broken image ends its iteration."""
    import datasets

    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answer": datasets.ClassLabel(names=["no", "yes"]),
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = [
        {"question": "q1", "answer": 1, "images": [{"bytes": png((1, 0, 0)), "path": None}]},
        {"question": "q2", "answer": 0, "images": [{"bytes": b"broken", "path": None}]},
        {"question": "q3", "answer": 0, "images": []},
    ]
    table = datasets.Dataset.from_list(rows, features=features, split="train")
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(tmp_path / "two")
    data = dataset(tmp_path / "one", max_bad=0.5)
    assert [(sample.question, sample.answer, len(sample.images)) for sample in data] == [
        ("q1", "yes", 1),
        ("q3", "no", 0),
    ]
    assert data.report.reasons == {"not an image": ("one:2",)}
    assert len(dataset(tmp_path / "two", split="train", max_bad=0.5)) == 2
    assert dataset(tmp_path / "two", split="test")[0].id == "two[test]:1"
    with pytest.raises(ValueError, match=r"has no split 'dev'. Choose one: train, test"):
        dataset(tmp_path / "two", split="dev")
    with pytest.raises(ValueError, match=r"holds the split 'train', not 'test'"):
        dataset(tmp_path / "one", split="test")


def test_folder_that_datasets_can_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a repository of the Hub keeps its files in `data/`; its images are relative to it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "x.png").write_bytes(png())
    for split, count in [("train", 2), ("test", 1)]:
        table = pa.table({"question": ["q"] * count, "answer": ["a"] * count, "images": ["x.png"] * count})
        pq.write_table(table, tmp_path / "set" / "data" / f"{split}-0.parquet")
    data = dataset(tmp_path / "set", split="test")
    assert [(sample.id, len(sample.images)) for sample in data] == [("set[test]:1", 1)]
    with pytest.raises(ValueError, match=r"has no split None. Choose one: train, test"):
        dataset(tmp_path / "set")


def test_unknown_name_without_network() -> None:
    """A misspelt folder looks like a name on the Hub: the message must speak of both."""
    with pytest.raises(ValueError, match=r"'nobody/none' is no file or folder here, and `datasets` cannot"):
        text_only("nobody/none")


def test_source_is_picked_by_name(tmp_path: Path) -> None:
    """A folder with train and test must never give both, nor a misspelt file a look at the Hub."""
    for name in ("train.jsonl", "test.jsonl", "val-0.parquet", "val-1.parquet"):
        (tmp_path / name).touch()
    assert pick(tmp_path / "train.jsonl") == JsonLines(tmp_path / "train.jsonl")
    assert pick(tmp_path, "test") == JsonLines(tmp_path / "test.jsonl")
    assert pick(tmp_path, "val") == Parquet([tmp_path / "val-0.parquet", tmp_path / "val-1.parquet"])
    assert pick("t.tsv.gz") == Csv(Path("t.tsv.gz"), "\t")
    assert pick("owner/name", "train", "sub") == HuggingFace("owner/name", "train", "sub")
    with pytest.raises(
        ValueError, match=r"has 4 files for split=None. Name one split or file of: test.jsonl"
    ):
        pick(tmp_path)
    with pytest.raises(ValueError, match=r"has 0 files for split='dev'"):
        pick(tmp_path, "dev")
    with pytest.raises(ValueError, match=r"is one file and has no split"):
        pick(tmp_path / "train.jsonl", "train")
    with pytest.raises(ValueError, match=r"'./nothing' does not exist"):
        pick("./nothing")
    with pytest.raises(ValueError, match=r"is not a file. Check the path"):
        dataset(tmp_path / "no.jsonl")
    (tmp_path / "x.json").touch()
    with pytest.raises(ValueError, match=r"of no known kind. Give a folder"):
        pick(tmp_path / "x.json")


def four_rows(tmp_path: Path) -> Path:
    (tmp_path / "x.png").write_bytes(png())
    rows = [
        line(1, images="x.png"),
        line(2, images="no.png"),
        line(3, images=[]),
        line(4, images=["gone.png"]),
    ]
    bad = json.dumps({"question": "q", "answer": ""}) + "\n"
    return written(tmp_path / "rows.jsonl", *rows, bad)


def test_summary_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Lost rows are said once, with reason, number and place, and counted in the report."""
    path = four_rows(tmp_path)
    with caplog.at_level(logging.INFO, "reflectvlm"):
        data = dataset(path, max_bad=0.6)
    expected = (
        "kept 2 of 5 rows (1 without images); 3 skipped: "
        "missing image 2 (rows.jsonl:2, rows.jsonl:4), empty answer 1 (rows.jsonl:5)"
    )
    assert caplog.messages == [expected] == [str(data.report)]
    assert caplog.records[0].levelname == "WARNING"
    assert "'gone.png' does not exist" in data.report.skipped[1].message


def test_every_skipped_row_has_a_line(tmp_path: Path) -> None:
    """The summary names three places of a reason; the fourth bad row was written nowhere."""
    rows = [line(i, images=[]) for i in range(5)]
    path = written(tmp_path / "rows.jsonl", *rows, *["{}\n"] * 4, line(9, images="no.png"))
    report = dataset(path, max_bad=1.0).report
    lines = report.lines()
    assert lines[0] == str(report)
    assert [text.split(": ")[0] for text in lines[1:]] == [f"rows.jsonl:{i}" for i in range(6, 11)]
    assert lines[-1].startswith("rows.jsonl:10: Image 'no.png' does not exist")
    said = dataset(path, max_bad=1.0).filter(lambda s: "too\nlong" if s.question == "q1" else None)
    assert said.report.lines()[-1] == "rows.jsonl:2: too long."


def test_an_image_that_goes_after_the_scan(tmp_path: Path) -> None:
    """A run must be able to pass over the row by one class of error; other rows stay readable."""
    (tmp_path / "x.png").write_bytes(png())
    (tmp_path / "y.png").write_bytes(png())
    data = dataset(written(tmp_path / "rows.jsonl", line(1, images="x.png"), line(2, images="y.png")))
    (tmp_path / "x.png").unlink()
    with pytest.raises(BadRow, match=r"^rows.jsonl:1: Image 'x.png' does not exist") as caught:
        data[0]
    assert caught.value.position == "rows.jsonl:1"
    assert data[1].question == "q2"


def test_summary_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Thousands are grouped, long lists end in dots, and a clean file is no warning."""
    path = written(tmp_path / "rows.jsonl", *[line(i) for i in range(1000)], *["{}\n"] * 5)
    with caplog.at_level(logging.INFO, "reflectvlm"):
        text_only(path)
        text_only(path, max_rows=1000)
    places = ", ".join(f"rows.jsonl:{i}" for i in (1001, 1002, 1003))
    assert caplog.messages[0] == f"kept 1,000 of 1,005 rows; 5 skipped: missing question 5 ({places}, …)"
    assert caplog.messages[1] == "kept 1,000 of 1,000 rows"
    assert caplog.records[1].levelname == "INFO"


def test_share_of_bad_rows(tmp_path: Path) -> None:
    """A wrong column or folder would skip nearly everything, and the run would go on with the rest."""
    path = written(tmp_path / "rows.jsonl", *[line(i) for i in range(19)], "{}\n")
    assert len(text_only(path)) == 19  # 1 of 20 is 5 %
    with pytest.raises(ValueError, match=r"max_bad=0.04 allows 0: kept 19 of 20 .* The first: rows.jsonl:20"):
        text_only(path, max_bad=0.04)


def test_nothing_left(tmp_path: Path) -> None:
    """An empty data set would end the run after zero steps, as a success."""
    with pytest.raises(ValueError, match=r"No row is left: kept 0 of 0 rows"):
        text_only(written(tmp_path / "empty.jsonl", ""))
    with pytest.raises(ValueError, match=r"No row is left: kept 0 of 0 rows"):
        text_only(written(tmp_path / "empty.jsonl", ""), check=False, on_bad="error")
    with pytest.raises(ValueError, match=r"No row is left: .* no column 'question'; its columns: problem"):
        text_only(written(tmp_path / "a.jsonl", '{"problem": "q"}\n'), max_bad=1.0)


def test_misspelt_image_column(tmp_path: Path) -> None:
    """With images in `image`, the default would train on text alone and never see a picture."""
    path = written(tmp_path / "rows.jsonl", line(1, image="x.png"))
    with pytest.raises(ValueError, match=r"No row has a column 'images'; the columns are answer, image, q"):
        dataset(path)
    with pytest.raises(ValueError, match=r"data\.columns\.images=image, or data\.columns\.images=null if"):
        dataset(path)
    with pytest.raises(
        ValueError, match=r"No row has a column 'None'.* data\.columns\.images=NAME, or .*=null"
    ):
        dataset(path, columns={"images": "None"})  # what columns.images=None on a command line is
    spoken = written(tmp_path / "spoken.jsonl", line(1, messages=[]))
    with pytest.raises(ValueError, match=r"or data=messages .* for rows of messages"):
        dataset(spoken)
    with pytest.raises(ValueError, match=r"No row has a column 'uid'.* data\.columns\.id=NAME \(g"):
        text_only(path, columns={"images": None, "id": "uid"})
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'anwser'"):
        dataset(path, columns={"anwser": "a"})


def test_root_and_limits_are_handed_on(tmp_path: Path) -> None:
    """Images often lie beside the folder of the rows."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "x.png").write_bytes(png(side=8))
    path = written(tmp_path / "rows" / "rows.jsonl", line(1, images="x.png"))
    assert dataset(path, root=tmp_path)[0].images[0].size == (8, 8)
    with pytest.raises(BadRow, match=r"63 are allowed"):
        dataset(path, root=tmp_path, limits={"max_pixels": 63}, on_bad="error")
    with pytest.raises(BadRow, match=r"does not exist in"):
        dataset(path, on_bad="error")


def test_sequence(tmp_path: Path) -> None:
    """Negative numbers, slices and the end of a loop, as of any list."""
    data = text_only(written(tmp_path / "rows.jsonl", *[line(i) for i in range(4)]), max_rows=3)
    assert len(data) == 3
    assert data[-1].question == "q2"
    assert [sample.question for sample in data[1:]] == ["q1", "q2"]
    assert questions(data) == ["q0", "q1", "q2"]
    with pytest.raises(IndexError):
        data[3]


def test_same_files_same_rows(tmp_path: Path) -> None:
    """The order decides what a resumed run sees next."""
    path = four_rows(tmp_path)
    first, second = dataset(path, max_bad=1.0), dataset(path, max_bad=1.0)
    assert questions(first) == questions(second) == ["q1", "q3"]
    assert first.report == second.report


def test_unchecked(tmp_path: Path) -> None:
    """Without a scan a bad row raises when it is reached; it must not be skipped, nor hide."""
    data = dataset(four_rows(tmp_path), check=False, on_bad="error")
    assert len(data) == 5
    assert data[0].question == "q1"
    with pytest.raises(BadRow, match=r"rows.jsonl:2: Image 'no.png'"):
        data[1]
    with pytest.raises(ValueError, match=r"check=False cannot skip"):
        dataset(four_rows(tmp_path), check=False)


def test_filter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows dropped later, e.g. for their length, stand in the same report as the first ones."""
    path = written(tmp_path / "rows.jsonl", line(1), "{}\n", *[line(i) for i in range(3, 6)])
    data = text_only(path, max_bad=0.2)
    short = data.filter(lambda sample: "prompt too long" if sample.question in ("q3", "q5") else None)
    assert questions(short) == ["q1", "q4"]
    assert questions(data) == ["q1", "q3", "q4", "q5"]
    assert short.report.reasons == {
        "prompt too long": ("rows.jsonl:3", "rows.jsonl:5"),
        "missing question": ("rows.jsonl:2",),
    }
    assert caplog.messages[-1].startswith("kept 2 of 5 rows; 3 skipped: prompt too long 2 (")
    assert questions(short.filter(lambda _: None)) == ["q1", "q4"]
    with pytest.raises(ValueError, match=r"No row is left: kept 0 of 5 rows; 5 skipped: no 4"):
        data.filter(lambda _: "no")


def make_json(folder: Path) -> Path:
    return written(folder / "t.jsonl", line(1), line(2))


def make_gzip(folder: Path) -> Path:
    return written(folder / "t.jsonl.gz", gzip.compress((line(1) + line(2)).encode()))


def make_csv(folder: Path) -> Path:
    return written(folder / "t.csv", "question,answer\nq1,a\nq2,a\n")


def make_parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"question": ["q1", "q2"], "answer": ["a", "a"]}), folder / "t.parquet")
    return folder / "t.parquet"


@pytest.mark.parametrize("make", [make_json, make_gzip, make_csv, make_parquet])
def test_pickling(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """Data workers that are spawned get the data set pickled."""
    data = text_only(make(tmp_path))
    assert questions(pickle.loads(pickle.dumps(data))) == ["q1", "q2"]


def test_no_file_stays_open(tmp_path: Path) -> None:
    """A file left open per row ends a long run at the limit of the system."""
    path = four_rows(tmp_path)
    data = dataset(path, max_bad=1.0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert len(list(data)) == 2
    assert len(os.listdir("/proc/self/fd")) <= before


def memory(name: str) -> int:
    """Memory of this process in kB: now (VmRSS) or at its highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def test_scan_holds_no_images(tmp_path: Path) -> None:
    """Twenty pictures of 48 MB each must never be in memory together."""
    header = struct.pack(">IIBBBBB", 4000, 4000, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(4001 * 4000), 1)
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]:
        data += struct.pack(">I", len(content)) + name + content
        data += struct.pack(">I", zlib.crc32(name + content))
    (tmp_path / "big.png").write_bytes(data)
    path = written(tmp_path / "rows.jsonl", *[line(i, images="big.png") for i in range(20)])
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the highest use so far
    before = memory("VmRSS")
    assert len(dataset(path)) == 20
    assert memory("VmHWM") - before < 250_000  # kB; all of them would be 960,000


def test_options_are_checked(tmp_path: Path) -> None:
    """`max_bad=5` is meant as 5 % and would allow everything."""
    path = make_json(tmp_path)
    with pytest.raises(ValueError, match=r"on_bad is 'warn'. It must be 'skip' or 'error'"):
        text_only(path, on_bad="warn")
    with pytest.raises(ValueError, match=r"max_bad is 5.0. It is a share"):
        text_only(path, max_bad=5.0)
    with pytest.raises(ValueError, match=r"max_rows is 0. It must be at least 1"):
        text_only(path, max_rows=0)
    with pytest.raises(ValueError, match=r"split and subset belong into the source"):
        text_only(JsonLines(path), split="train")
