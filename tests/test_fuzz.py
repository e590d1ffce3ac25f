"""Millions of hostile texts and rows: no exception but the documented one, no long time, and what is found
is really there.

Every example is a few bytes of hypothesis, read as a program that puts tokens together: tags, braces, digits,
halves of surrogates. A few hundred run in the normal suite; `make torture` runs REFLECTVLM_FUZZ_EXAMPLES of
them (a million) over all targets, in batches of 5,000 with seeds of their own. Left out: grading of
mathematics, which runs in a process that can be killed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import string
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fuzzing import LAYOUTS, Count, Dice, Target, fuzz
from reflectvlm.data.images import ImageLimits
from reflectvlm.data.records import open_csv, parse_json
from reflectvlm.data.rows import BadRow, Columns, read_row
from reflectvlm.rewards.answers import (
    extract_boxed,
    extract_letter,
    extract_number,
    extract_tag,
    grade_choice,
    grade_number,
    grade_text,
    kind_of,
    normalise,
)
from reflectvlm.rewards.reflection import closed_blocks
from reflectvlm.tags import find_boxes, layout_tags, parse, tag_names
from reflectvlm.types import Sample

SEED = 20261122
EXAMPLES = int(os.environ.get("REFLECTVLM_FUZZ_EXAMPLES", "1000000"))
BATCH = 5000
SHARDS = 2


# -- tags -------------------------------------------------------------------------------------------

SPICE = (
    "\\boxed{",
    "}",
    "{",
    "\\",
    "\\}",
    "\\boxed",
    " ",
    "\n",
    "7",
    "x",
    "<",
    ">",
    "</",
    "\ud800",
    "\0",
    "́",
)
TAG_TOKENS = {layout.name: (*layout_tags(layout) * 2, *SPICE) for layout in LAYOUTS}


def try_tags(program: bytes) -> None:
    dice = Dice(program)
    layout = dice.one(LAYOUTS)
    text = dice.text(TAG_TOKENS[layout.name])
    found = parse(layout, text)
    assert found.valid == (not found.problem)
    assert found == parse(layout, text)
    end = 0
    for block in found.blocks:
        assert text[block.start : block.end] == f"<{block.tag}>{block.content}</{block.tag}>"
        assert block.start >= end
        end = block.end
    assert (found.answer is not None) == bool(found.valid and (layout.boxed or layout.answer_tag))
    assert parse(layout, f" \n{text}\t").valid == found.valid
    if found.valid and not layout.free_text:
        assert not parse(layout, f"x{text}").valid
    for box in find_boxes(text):
        assert text[box.start :].startswith("\\boxed")
        assert text[box.inner - 1] == "{"
        assert text[box.end - 1] == "}"
    tag = dice.one(tag_names(layout))
    for block in closed_blocks(text, tag):
        assert text[block.start : block.end] == f"<{tag}>{block.content}</{tag}>"
        assert f"<{tag}>" not in block.content


# -- answers ----------------------------------------------------------------------------------------

ANSWER_TOKENS = (
    *("1", "23", "0", ".", ",", "-", "+", "/", "e", "E9", "%", "°", "$", "\\frac", "\\tfrac", "\\,", "{,}"),
    *("A", "b", "(", ")", "or ", "and ", "the answer is ", "option ", ":", "*", "\u212a", "\u017f", "I "),
    *(
        "\\boxed{",
        "\\boxed {",
        "{",
        "}",
        "\\",
        "\\(",
        "\\)",
        "\\text{",
        "\\mathrm {",
        "<answer>",
        "</answer>",
    ),
    *(
        " ",
        "\n",
        "\u00a0",
        "\u2212",
        "\u0661",
        "²",
        "½",
        "é",
        "e\u0301",
        "\u0315\u0300",
        "ß",
        "İ",
        "\ud800",
        "\0",
    ),
    *("'", '"', ".!", "sqrt", "π", "=", "^\\circ", "\\degree", "\\%", "word", "x", "[", "]", "|"),
)


def try_answers(program: bytes) -> None:
    dice = Dice(program)
    cut = dice.below(64)
    gold, answer = dice.text(ANSWER_TOKENS, most=cut), dice.text(ANSWER_TOKENS)
    for text in (gold, answer):
        boxed = extract_boxed(text)
        assert boxed is None or (boxed in text and boxed == boxed.strip())
        if boxed is not None and "\\" not in boxed:
            assert extract_boxed(f"\\boxed{{{boxed}}}") == boxed
        inside = extract_tag(text, "answer")
        assert inside is None or inside in text
        letter = extract_letter(text)
        assert letter is None or letter in string.ascii_uppercase
        number = extract_number(text)
        if number is not None and len(str(number)) <= 300:
            assert extract_number(str(number)) == number
        assert normalise(text) == normalise(f" {text}\n")
        assert kind_of(text) in ("choice", "number", "math", "text")
        assert grade_number(text, text) == (number is not None)
        assert grade_choice(text, text) == (letter is not None)
        assert grade_text(text, text) == bool(text.strip())
    for grade in (grade_number, grade_choice):
        assert grade(gold, answer) == grade(answer, gold)
    if gold.strip() and answer.strip():
        assert grade_text(gold, answer) == grade_text(answer, gold)


# -- rows -------------------------------------------------------------------------------------------


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    return file.getvalue()


PNG = _png()
BASE64 = base64.b64encode(PNG).decode()
WORDS = ("", " ", "What?", "7", "<image>", "<|im_end|>", "</think>", "\n", "\0", "\ud800", "é", "x" * 300)
IMAGES = (
    *(
        "a.png",
        "gone.png",
        "../a.png",
        "/etc/passwd",
        "",
        ".",
        "\0",
        "\ud800.png",
        "x" * 5000,
        "~",
        "a.png/b",
    ),
    *(
        "data:image/png;base64," + BASE64,
        "data:image/png;base64," + BASE64[:40],
        "data:,x",
        "data:",
        "DATA:;base64,é",
    ),
    *(
        "http://127.0.0.1/a.png",
        "s3://b/a.png",
        "http://[::1/a",
        "https://\ud800",
        "file:///etc/passwd",
        "://",
    ),
    *('["a.png"]', '["a.png", null]', "[1]", "[", "[]", "[" * 3000 + "]" * 3000, '["\\ud800"]', "[a.png]"),
    *(PNG, PNG[:30], PNG[:-8], b"", b"<html>", bytearray(PNG), memoryview(PNG), PNG + b"\0"),
)
NUMBERS = (0, -1, 7, 10**18, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False, 2**63)
OTHERS = (
    None,
    Decimal("1.5"),
    Decimal("NaN"),
    Decimal("sNaN"),
    Decimal("1e9999"),
    1j,
    object,
    b"x",
    (),
    {1: 2},
)
KEYS = ("question", "answer", "images", "id", "image", "", "é", "\ud800", "bytes", "path")


def value_of(dice: Dice, depth: int = 0) -> Any:
    kind = dice.below(9)
    if kind < 2:
        return "".join(dice.one(WORDS) for _ in range(dice.below(4)))
    if kind < 4:
        return dice.one(IMAGES)
    if kind == 4:
        return dice.one(NUMBERS)
    if kind == 5:
        return dice.one(OTHERS)
    if depth > 3:
        return None
    if kind < 8:
        values = [value_of(dice, depth + 1) for _ in range(dice.below(4))]
        return values if kind == 6 else tuple(values)
    return {dice.one(KEYS): value_of(dice, depth + 1) for _ in range(dice.below(4))}


COLUMNS = (
    Columns(),
    Columns(images=None),
    Columns(answer=None),
    Columns(images=("image", "images"), question="answer", answer="question"),
)


def try_rows(program: bytes, root: Path) -> None:
    dice = Dice(program)
    columns = dice.one(COLUMNS)
    row = {"question": "How many <image>?"[: 9 + dice.below(9)], "answer": dice.one(("7", 7, 7.5))}
    for _ in range(dice.below(6)):
        row[dice.one(KEYS[:6])] = value_of(dice)
    _read(row, columns, root)


def _read(row: Any, columns: Columns, root: Path) -> None:
    try:
        sample = read_row(row, "rows.jsonl:3", columns, ImageLimits(urls=False, max_pixels=10_000), root)
    except BadRow as bad:
        _check_bad(bad)
    else:
        assert isinstance(sample, Sample)
        assert sample.question == row[columns.question]
        for text in (sample.id, sample.question, sample.answer):
            text.encode()
        assert all(image.mode == "RGB" for image in sample.images)


def _check_bad(bad: BadRow, position: str = "rows.jsonl:3") -> None:
    assert bad.position == position
    assert bad.reason
    assert len(str(bad).splitlines()) == 1
    assert str(pickle.loads(pickle.dumps(bad))) == str(bad)


# -- records ----------------------------------------------------------------------------------------

JSON_TOKENS = (
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b'"a"', b'"question":', b'"answer":', b'"images":', b'"id":'),
    *(
        b'"What?"',
        b'"a.png"',
        b"7",
        b"-",
        b".5",
        b"e400",
        b"1" * 400,
        b"9" * 5000,
        b"NaN",
        b"Infinity",
        b"null",
    ),
    *(b"true", b"\\", b"\\u00e9", b'"\\ud800"', b'"\\u0000"', b"\xff", b"\xc3", b"\xc3\xa9", b"\xef\xbb\xbf"),
    *(
        b"\n",
        b"\r\n",
        b" ",
        b"\x00",
        b"\x1f",
        b"[" * 2000,
        b'{"a":' * 600,
        b'{"question":"x","answer":7}',
        b",,",
    ),
)
CSV_TOKENS = (
    *(b'"', b'""', b",", b";", b"\t", b"a", b"7", b"\n", b"\r", b"\r\n", b" ", b"\x00", b"\xff", b"\xc3\xa9"),
    *(
        b"\xef\xbb\xbf",
        b"x" * 200,
        b'"a,b"',
        b'"a\nb"',
        b"a.png",
        b"'",
        b"\\",
        b"1,2,3",
        b"\x85",
        b"\xe2\x80\xa8",
    ),
)


def try_records(program: bytes, root: Path) -> None:
    dice = Dice(program)
    kind = dice.below(4)
    if kind == 0:
        _read_csv(dice, root)
        return
    data = dice.text(JSON_TOKENS, most=40)
    data = data if kind == 1 else b'{"question":' + data + b"}\n"
    try:
        row = parse_json(data, "rows.jsonl:3")
    except BadRow as bad:
        _check_bad(bad)
    else:
        assert row == json.loads(data)
        _read(row, dice.one(COLUMNS), root)


def _read_csv(dice: Dice, root: Path) -> None:
    """A file as a whole may be refused with its name; each of its rows alone, with its line."""
    path, delimiter, columns = root / "rows.csv", dice.one((",", "\t", ";")), dice.one(COLUMNS)
    header = dice.one((b"question,answer,images\n", b"question\n", b"\xef\xbb\xbfquestion;answer\r\n", b""))
    path.write_bytes(header + dice.text(CSV_TOKENS, most=40))
    refused = ""
    try:
        records: Any = open_csv(path, delimiter)
    except ValueError as error:
        refused, records = str(error), ()
    assert not refused or "rows.csv" in refused
    for index in range(len(records)):
        try:
            row = records[index]
        except BadRow as bad:
            _check_bad(bad, records.position(index))
        else:
            _read(row, columns, root)


# -- how many ---------------------------------------------------------------------------------------

TARGETS: dict[str, Target] = {
    "tags": lambda program, _: try_tags(program),
    "answers": lambda program, _: try_answers(program),
    "rows": try_rows,
    "records": try_records,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one image."""
    (tmp_path / "a.png").write_bytes(PNG)
    return tmp_path


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_hundred_examples(name: str, root: Path) -> None:
    """Bug: some text or row that stops a run with a stranger's exception, or is silently misread."""
    count = Count()
    fuzz(TARGETS[name], root, SEED, 400, count)
    assert count.examples >= 400


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("name", TARGETS)
def test_a_million_examples(
    name: str, shard: int, root: Path, record_property: Callable[[str, object], None]
) -> None:
    """Bug: as above, and rarer."""
    wanted, count = -(-EXAMPLES // (len(TARGETS) * SHARDS)), Count()
    first = batch = SEED + 1 + shard * 10**6
    while count.examples < wanted:
        before = count.examples
        fuzz(TARGETS[name], root, batch, min(BATCH, wanted - before), count)
        assert count.examples > before
        batch += 1
    record_property("number", count.examples)
    record_property("seed", f"{first} to {batch - 1}")
    record_property("slowest example, ms", round(1000 * count.slowest, 1))
    assert count.examples >= wanted
