"""One row to one `Sample`: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import math
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reflectvlm.data.images import ImageLimits
from reflectvlm.data.rows import BadRow, Columns, read_row
from reflectvlm.types import Sample

PICTURE = Image.new("RGB", (4, 4), (255, 0, 0))
OTHER = Image.new("RGB", (4, 4), (0, 0, 255))


def read(row: dict[str, Any], columns: Columns | None = None, limits: ImageLimits | None = None) -> Sample:
    return read_row(row, "rows.jsonl:17", columns or Columns(), limits or ImageLimits(), Path("."))


def refused(row: dict[str, Any], field: str, reason: str, match: str, columns: Columns | None = None) -> None:
    with pytest.raises(BadRow, match=match) as caught:
        read(row, columns)
    bad = caught.value
    assert (bad.position, bad.field, bad.reason) == ("rows.jsonl:17", field, reason)
    assert str(bad).startswith("rows.jsonl:17: ")
    assert "\n" not in str(bad)


def test_columns_are_mapped_and_the_others_kept() -> None:
    """A renamed column that also stays among the others hands the gold answer to a reward twice."""
    row = {"problem": "What?", "gold": "4", "pic": PICTURE, "uid": 7, "level": 3, "id": "x"}
    sample = read(row, Columns(question="problem", answer="gold", images="pic", id="uid"))
    assert (sample.id, sample.question, sample.answer) == ("7", "What?", "4")
    assert sample.images[0].getpixel((0, 0)) == (255, 0, 0)
    assert sample.columns == {"level": 3, "id": "x"}


def test_rows_without_gold_answers() -> None:
    """A question that nobody grades is refused for its missing answer, or is given one that a reward
    could take for gold."""
    columns = Columns(answer=None)
    assert read({"question": "a"}, columns).answer == ""
    kept = read({"question": "a", "answer": [1]}, columns)
    assert (kept.answer, kept.columns) == ("", {"answer": [1]})
    refused({"query": "a"}, "question", "missing question", r"its columns: query\.", columns)


def test_id_is_the_place_by_default() -> None:
    """Rows without ids would all be called None."""
    for row in ({}, {"id": None}, {"id": ""}):
        assert read({"question": "a", "answer": "b", **row}).id == "rows.jsonl:17"
    assert read({"question": "a", "answer": "b", "id": 0}).id == "0"
    refused({"question": "a", "answer": "b", "id": [1]}, "id", "id is no text", "holds a list")


@pytest.mark.parametrize("part", ["question", "answer"])
def test_missing_and_empty_text(part: str) -> None:
    """A prompt or a gold answer of "None" or "nan" trains without a word."""
    good = {"question": "a", "answer": "b"}
    absent = {key: value for key, value in good.items() if key != part}
    refused(absent, part, f"missing {part}", f"no column '{part}'; its columns: .*columns.{part}")
    refused({**good, part: None}, part, f"missing {part}", f"missing {part} in column '{part}'. Fill it")
    refused({**good, part: math.nan}, part, f"missing {part}", "Fill it")
    refused({**good, part: ""}, part, f"empty {part}", "Fill it")
    refused({**good, part: " \n\t"}, part, f"empty {part}", "Fill it")
    refused({**good, part: ["a"]}, part, f"{part} is no text", "holds a list")
    refused({**good, part: {"a": 1}}, part, f"{part} is no text", "holds an object")
    refused({**good, part: "\ud83d"}, part, f"{part} is no Unicode", "lone surrogate at character 0")


def test_number_answers_become_text() -> None:
    """`12` in JSON is a common gold answer; `true` has no one text and infinity is a mistake."""
    for value, text in [(12, "12"), (0, "0"), (-1.5, "-1.5"), (2.0, "2.0"), (Decimal("1.50"), "1.50")]:
        assert read({"question": "a", "answer": value}).answer == text
    refused({"question": "a", "answer": True}, "answer", "answer is no text", "a truth value")
    refused({"question": "a", "answer": math.inf}, "answer", "answer is no text", "holds inf")
    refused({"question": 12, "answer": "b"}, "question", "question is no text", "holds a number")


@given(st.text().filter(lambda text: text.strip() and "<image>" not in text))
def test_text_is_never_altered(text: str) -> None:
    """Stripping or escaping changes what the user asked: `<|im_end|>` stays what it is."""
    for question in (text, f"<|im_end|>{text}</think><back>"):
        sample = read({"question": question, "answer": text})
        assert (sample.question, sample.answer) == (question, text)


@given(markers=st.integers(0, 3), images=st.integers(0, 3))
def test_markers_and_images(markers: int, images: int) -> None:
    """With fewer markers than images, one image would be dropped or shown at the wrong place."""
    row = {"question": "<image>" * markers + "What?", "answer": "a", "images": [PICTURE] * images}
    if markers in (0, images):
        assert len(read(row).images) == images
    else:
        with pytest.raises(BadRow, match=f"has {images} image.* has {markers} '<image>' marker"):
            read(row)


def test_marker_message() -> None:
    """The line a user needs: which sample, the two counts, the two remedies."""
    row = {"id": "geo3k-1042", "question": "<image> Area?", "answer": "1", "images": [PICTURE, PICTURE]}
    with pytest.raises(BadRow) as caught:
        read(row)
    assert str(caught.value) == (
        "rows.jsonl:17: Sample 'geo3k-1042' has 2 images but its question has 1 '<image>' marker. "
        "Put one marker per image, or none to place them first."
    )
    assert caught.value.reason == "markers differ from images"


def test_a_message_is_one_line() -> None:
    """An id or a column with a line end broke a log in which each skipped row has one line."""
    with pytest.raises(BadRow) as caught:
        read({"id": "a\nb", "question": "<image>", "answer": "1", "images": [PICTURE, PICTURE]})
    assert str(caught.value).startswith("rows.jsonl:17: Sample 'a b' has 2 images")
    with pytest.raises(BadRow) as caught:
        read({"one\r\ntwo": 1})
    assert len(str(caught.value).splitlines()) == 1


def test_images_keep_their_order() -> None:
    """Two columns, or a list, in another order than the markers mix up the pictures."""
    blue_red = [(0, 0, 255), (255, 0, 0)]
    text = {"question": "a", "answer": "b"}
    listed = read({**text, "images": [OTHER, PICTURE]})
    columns = Columns(images=("image_2", "image_1"))
    two = read({**text, "image_1": PICTURE, "image_2": OTHER}, columns)
    for sample in (listed, two):
        assert [image.getpixel((0, 0)) for image in sample.images] == blue_red
    assert two.columns == {}
    assert len(read({**text, "image_1": None, "image_2": OTHER}, columns).images) == 1


def test_rows_without_images() -> None:
    """Text rows beside image rows are allowed, however the emptiness is written."""
    text = {"question": "a", "answer": "b"}
    for row in (text, {**text, "images": None}, {**text, "images": []}, {**text, "images": ""}):
        assert read(row).images == ()
    ignored = read({**text, "images": "no.png"}, Columns(images=None))
    assert ignored.images == ()
    assert ignored.columns == {"images": "no.png"}


def test_several_images_in_one_cell(tmp_path: Path) -> None:
    """A CSV cell can hold only text; a file name may begin with a bracket all the same."""
    for name in ("a.png", "b.png", "[x]"):
        PICTURE.save(tmp_path / name, "PNG")
    for cell, count in [('["a.png", "b.png"]', 2), ("a.png", 1), ("[x]", 1), ("[]", 0)]:
        row = {"question": "q", "answer": "a", "images": cell}
        assert len(read_row(row, "t.csv:2", Columns(), ImageLimits(), tmp_path).images) == count


def test_bad_images_name_the_row() -> None:
    """Which of ten thousand rows has the broken picture; and no image may be dropped from a list."""
    text = {"question": "a", "answer": "b"}
    refused({**text, "images": "no.png"}, "images", "missing image", "Image 'no.png' does not exist in")
    refused({**text, "images": [PICTURE, None]}, "images", "missing image", "entry is empty")
    refused({**text, "images": [PICTURE, b"abc"]}, "images", "not an image", "of 3 bytes is not an image")
    refused({**text, "images": [[PICTURE]]}, "images", "unsupported image", "of type list")
    refused({**text, "images": "../x.png"}, "images", "image outside root", "leaves the folder")


def test_limits_reach_the_loader() -> None:
    """Limits given by the user that are not handed on protect nobody."""
    with pytest.raises(BadRow, match=r"16 pixels|4 x 4 pixels"):
        read({"question": "a", "answer": "b", "images": PICTURE}, limits=ImageLimits(max_pixels=15))


def test_bad_row_survives_pickling() -> None:
    """An exception that cannot be unpickled kills a data worker's whole pool."""
    bad = BadRow("rows.jsonl:17", "answer", "empty answer", "Fill it.")
    copy = pickle.loads(pickle.dumps(bad))
    assert str(copy) == str(bad) == "rows.jsonl:17: empty answer in column 'answer'. Fill it."
    assert copy.reason == "empty answer"


def test_columns_must_differ() -> None:
    """The answer column named as question shows the answer in the prompt."""
    with pytest.raises(ValueError, match=r"names one column twice"):
        Columns(question="text", answer="text")
