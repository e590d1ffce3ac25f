"""The form Look-Back keeps GeoMath, TallyQA and MME in, and the files of benchmarks in general."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval_files_maths import picture, png, sharegpt_row, stored, write_json, write_parquet
from reflectvlm.data.images import load_image
from reflectvlm.eval.tasks.files import hub_rows, json_rows, table_rows, unique
from reflectvlm.eval.tasks.sharegpt import sharegpt_items


def test_rows_are_read_as_look_back_reads_them(tmp_path: Path) -> None:
    """Bug: the first message of a role wins, or a second image is asked, and the question is another one."""
    picture(tmp_path / "images/7.png", 40)
    more = sharegpt_row("b", "3")
    more["images"].append("images/8.png")
    more["messages"] += [{"role": "user", "content": "last"}, {"role": "system", "content": "s"}]
    write_json(tmp_path / "f.json", [sharegpt_row("a", " 4\n"), {**more, "extra": 1}])
    one, two = sharegpt_items(tmp_path / "f.json")
    assert (one.id, one.question, one.answer, one.images) == (
        "a",
        "<image>How many in a?",
        "4",
        ("images/7.png",),
    )
    assert one.lookback_answer == " 4\n"  # its scorer gets what the row says
    assert (two.question, two.answer, two.lookback_answer, two.images) == (
        "last",
        "3",
        None,
        ("images/7.png",),
    )
    assert two.columns == {"extra": 1}
    assert load_image(one.images[0], one.root).getpixel((0, 0)) == (40, 40, 40)


def test_ids_that_repeat_or_are_missing_get_their_place(tmp_path: Path) -> None:
    """Bug: two rows share an id, and the second one's reply is taken for the first one's."""
    row = sharegpt_row("a", "1")
    bare = {key: value for key, value in row.items() if key != "id"}
    write_json(tmp_path / "f.json", [row, row, bare])
    assert [item.id for item in sharegpt_items(tmp_path / "f.json")] == ["a", "a#2", "#3"]
    assert unique(["x#2", "x", "x"]) == ["x#2", "x", "x#3"]


def test_a_row_without_an_image_stays(tmp_path: Path) -> None:
    """Bug: the row is dropped, and the denominator shrinks."""
    write_json(tmp_path / "f.json", [{**sharegpt_row("a", "1"), "images": []}])
    assert sharegpt_items(tmp_path / "f.json")[0].images == ()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    """Bug: a cut download ends in a traceback that does not name the file."""
    write_json(tmp_path / "f.json", [{"id": "a", "messages": "no"}])
    with pytest.raises(ValueError, match=r"f\.json, row 1: 'messages' and 'images' must be lists"):
        sharegpt_items(tmp_path / "f.json")
    (tmp_path / "cut.json").write_text('[{"id":')
    with pytest.raises(ValueError, match=r"cut\.json is no readable JSON .* Fetch the file again"):
        sharegpt_items(tmp_path / "cut.json")
    (tmp_path / "cut.jsonl").write_text('{"id": 1}\n{"id')
    with pytest.raises(ValueError, match=r"cut\.jsonl:2 is no readable JSON"):
        json_rows(tmp_path / "cut.jsonl")
    write_json(tmp_path / "text.json", ["a"])
    with pytest.raises(ValueError, match="holds no list of objects"):
        json_rows(tmp_path / "text.json")


def test_images_of_a_table_are_read_when_asked_for(tmp_path: Path) -> None:
    """Bug: loading a benchmark holds all of its images, gigabytes for TallyQA."""
    rows = [{"id": n, "image": stored(n), "many": [stored(n), stored(n + 1)], "text": "t"} for n in range(3)]
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", rows)
    found = hub_rows(tmp_path, "test")
    assert found is not None
    assert [row["text"] for row in found] == ["t", "t", "t"]
    image = found[2]["image"]
    assert not isinstance(image, dict)  # nothing but the place
    assert image["bytes"] == png(2)
    assert [one["bytes"] for one in found[1]["many"]] == [png(1), png(2)]
    assert load_image(image, tmp_path).getpixel((0, 0)) == (2, 2, 2)
    assert dict(image) == {"bytes": png(2), "path": None}
    with pytest.raises(KeyError):
        image["width"]


def test_an_image_whose_table_is_gone_is_a_bad_image(tmp_path: Path) -> None:
    """Bug: a table that vanishes ends the evaluation instead of its rows."""
    from reflectvlm.data.fetch import BadImage

    path = tmp_path / "test.parquet"
    write_parquet(path, [{"image": stored(1)}, {"image": stored(2)}])
    found = hub_rows(tmp_path, "test")
    assert found is not None
    rows = found[0]["image"].rows
    rows._cache.clear()
    path.unlink()
    with pytest.raises(BadImage, match=r"of row test\.parquet:1"):
        load_image(found[0]["image"], tmp_path)


def test_splits_and_subsets_of_a_folder(tmp_path: Path) -> None:
    """Bug: the train split of a downloaded folder is evaluated with the test split."""
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", [{"id": "train"}])
    write_parquet(tmp_path / "data/test-00000-of-00002.parquet", [{"id": "one"}])
    write_parquet(tmp_path / "data/test-00001-of-00002.parquet", [{"id": "two"}])
    write_parquet(tmp_path / "other/testmini/0000.parquet", [{"id": "mini"}])
    assert [row["id"] for row in hub_rows(tmp_path, "test") or []] == ["one", "two"]
    assert [row["id"] for row in hub_rows(tmp_path, "testmini") or []] == ["mini"]
    assert [row["id"] for row in hub_rows(tmp_path, "testmini", "other") or []] == ["mini"]
    assert hub_rows(tmp_path, "testmini", "third") is None
    assert hub_rows(tmp_path / "nowhere", "test") is None


def test_a_data_set_saved_by_datasets(tmp_path: Path) -> None:
    """Bug: a folder of `save_to_disk` is not recognised, or its images are decoded without limits."""
    import datasets

    table = datasets.Dataset.from_list([{"id": "a", "image": stored(6)}])
    table = table.cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "saved"))
    (row,) = hub_rows(tmp_path / "saved", "test") or []
    assert row["id"] == "a"
    assert row["image"]["bytes"] == png(6)


def test_tables_with_line_ends_in_cells(tmp_path: Path) -> None:
    """Bug: a question of several lines shifts all rows after it."""
    (tmp_path / "t.tsv").write_text('index\tq\n1\t"a\nb"\n2\tc\n')
    assert table_rows(tmp_path / "t.tsv") == [{"index": "1", "q": "a\nb"}, {"index": "2", "q": "c"}]
