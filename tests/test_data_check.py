"""`reflectvlm data check`: every defect of a file of rows, by row and field, in flat memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bad_rows import encoded, huge_png, text_bomb, written
from reflectvlm.data import check_command, records
from reflectvlm.data.check import Checked, FileCheck
from reflectvlm.data.findings import Finding, Tally
from reflectvlm.data.ids import Ids
from reflectvlm.data.images import ImageLimits
from reflectvlm.data.rows import Columns
from reflectvlm.data.sources import dataset, pick
from reflectvlm.recipe_check import RecipeError


def good(number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "question": f"q{number}", "answer": "1", "images": "good.png", **more}


def found(path: Path, weight: str = "problem", **settings: Any) -> dict[tuple[str, str], list[str]]:
    """Places by (field, reason)."""
    tally = Tally(show=100)
    FileCheck(**settings)(pick(path), tally)
    kinds = tally.kinds("problem" if weight == "problem" else "warning")
    return {(field, reason): [one.position for one in first] for field, reason, _, first in kinds}


# -- E1 and E2: images ------------------------------------------------------------------------------

IMAGES: dict[str, tuple[bytes | None, str]] = {
    "empty.png": (b"", "empty image"),
    "cut.png": (encoded()[:3000], "broken image"),
    "cut.jpg": (encoded(kind="JPEG")[:1500], "broken image"),
    "text.png": (b"just some text\n", "not an image"),
    "page.png": (b"<!DOCTYPE html><html>404</html>", "not an image"),
    "huge.png": (huge_png(50_000), "image too large"),
    "large.png": (huge_png(12_000), "image too large"),
    "bomb.png": (text_bomb(), "broken image"),
    "thin.png": (encoded(Image.new("RGB", (1, 3000))), "image too narrow"),
    "gone.png": (None, "missing image"),
    "../secret.png": (None, "image outside root"),
    "/etc/hostname": (None, "image outside root"),
    "data:image/png;base64,%%%%": (None, "broken image"),
    "s3://bucket/x.png": (None, "unsupported image"),
}
BY_NAME = ("empty image", "missing image", "image outside root", "unsupported image")
"""What can be told without opening a file."""


def test_e1_e2_every_broken_image_is_named(tmp_path: Path) -> None:
    """Bug: a check that stops at a row's first defect, or that takes a header for a picture."""
    (tmp_path / "good.png").write_bytes(encoded())
    (tmp_path / "folder").mkdir()
    rows = [good(0)]
    expected: dict[str, list[str]] = {}
    for name, (data, reason) in IMAGES.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        rows.append(good(len(rows), images=["good.png", name]))
        expected.setdefault(reason, []).append(f"rows.jsonl:{len(rows)}")
    for value, reason in (
        ("folder", "unreadable image"),
        (17, "unsupported image"),
        ([["x"]], "unsupported image"),
    ):
        rows.append(good(len(rows), images=value))
        expected.setdefault(reason, []).append(f"rows.jsonl:{len(rows)}")
    path = written(tmp_path / "rows.jsonl", *rows)
    decoded = found(path, images=True)
    assert decoded == {("images", reason): places for reason, places in expected.items()}
    named = found(path)
    for reason in (*BY_NAME, "unreadable image"):
        assert named[("images", reason)] == expected[reason]
    assert named[("images", "broken image")] == ["rows.jsonl:14"]  # base64, which stands in the row itself


def test_e1_addresses_are_not_opened_without_images(tmp_path: Path) -> None:
    """Bug: a check without images asks a server for each row; or passes what the run will refuse."""
    path = written(tmp_path / "rows.jsonl", good(1, images="http://127.0.0.1:1/x.png"))
    assert found(path) == {}
    places = {("images", "unreachable image"): ["rows.jsonl:1"], ("", "no row is left"): ["rows.jsonl"]}
    assert found(path, limits=ImageLimits(urls=False)) == places
    assert found(path, images=True, limits=ImageLimits(timeout=5)) == places


def test_e1_a_path_out_of_the_folder_is_told_where_it_leads_to_a_file(tmp_path: Path) -> None:
    """Bug: a path is looked up before it is seen that it leaves the folder; then a file there is well."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "secret.png").write_bytes(encoded())
    values = ["../secret.png", str(tmp_path / "secret.png"), "x/../../secret.png", {"path": "../secret.png"}]
    path = written(tmp_path / "rows/rows.jsonl", *(good(i, images=value) for i, value in enumerate(values)))
    places = [f"rows.jsonl:{number}" for number in range(1, 5)]
    for images in (False, True):
        assert found(path, images=images)["images", "image outside root"] == places


def odd_images(folder: Path) -> dict[str, str]:
    """Files that can be used and may not look as they were meant, and what is said of them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    keyed = Image.new("P", (20, 20), 0)
    keyed.putpalette([9, 9, 9])
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    files = {
        "really.jpg": (encoded(), "another format than named"),
        "two.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "several frames"),
        "dot.png": (encoded(Image.new("RGB", (1, 1))), "tiny image"),
        "deep.png": (encoded(Image.new("I;16", (20, 20))), "converted image"),
        "print.jpg": (encoded(Image.new("CMYK", (20, 20)), "JPEG"), "converted image"),
        "clear.png": (encoded(Image.new("LA", (20, 20))), "converted image"),
        "keyed.png": (encoded(keyed, transparency=0), "converted image"),
        "turned.png": (encoded(exif=exif), "turned image"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: reason for name, (_, reason) in files.items()}


def test_e2_odd_images_are_warnings(tmp_path: Path) -> None:
    """Bug: an animation, a deep or a turned picture trains as something else without a word."""
    reasons = odd_images(tmp_path)
    path = written(tmp_path / "rows.jsonl", *(good(i, images=name) for i, name in enumerate(reasons)))
    assert found(path, images=True) == {}
    expected: dict[tuple[str, str], list[str]] = {}
    for number, reason in enumerate(reasons.values(), start=1):
        expected.setdefault(("images", reason), []).append(f"rows.jsonl:{number}")
    assert found(path, "warning", images=True) == expected


# -- E3: files --------------------------------------------------------------------------------------

LINES: dict[str | bytes, str] = {
    b'{"question": "\xff", "answer": "a"}\n': "invalid UTF-8",
    '{"question": "q", "answer": NaN}\n': "broken JSON",
    '{"question": "q", "answer": "a", "answer": "b"}\n': "broken JSON",
    '["q", "a"]\n': "row is no object",
    "[" * 100_000 + "\n": "broken JSON",
    "\x00\x00\n": "broken JSON",
}


def test_e3_broken_lines(tmp_path: Path) -> None:
    """Bug: one broken line ends the check, or its number is not an editor's."""
    lines = [json.dumps(good(0, images=None)) + "\r\n", "\n", *LINES]
    path = written(tmp_path / "rows.jsonl", b"\xef\xbb\xbf", *lines, '{"question": "cut off')
    expected: dict[tuple[str, str], list[str]] = {}
    for number, reason in enumerate(LINES.values(), start=3):
        expected.setdefault(("", reason), []).append(f"rows.jsonl:{number}")
    expected["", "broken JSON"].append("rows.jsonl:9")
    assert found(path, columns=Columns(images=None)) == expected
    assert set(found(path, "warning", columns=Columns(images=None))) == {
        ("", "byte order mark"), ("", "lines end as on Windows"), ("", "blank lines"),
        ("", "no end of the last line"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_e3_an_empty_file(name: str, tmp_path: Path) -> None:
    """Bug: a check of nothing finds nothing wrong."""
    path = written(tmp_path / name, gzip.compress(b"\n") if name.endswith("gz") else b"\n")
    assert found(path) == {("", "no row is left"): [name]}


def test_e3_packed_files(tmp_path: Path) -> None:
    """Bug: rows of a packed file are named otherwise; one that was cut off passes."""
    packed = gzip.compress(b"".join(json.dumps(good(i, answer=None)).encode() + b"\n" for i in range(2)))
    path = written(tmp_path / "rows.jsonl.gz", packed)
    (tmp_path / "good.png").write_bytes(encoded())
    assert found(path)["answer", "missing answer"] == ["rows.jsonl.gz:1", "rows.jsonl.gz:2"]
    path.write_bytes(packed[:-9])
    assert ("", "file cannot be read on") in found(path)


def test_e3_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a line longer than a buffer is cut into two that are no rows; one beyond the limit ends all."""
    long = good(2, images=None, note="x" * 3_000_000)
    path = written(tmp_path / "rows.jsonl", good(1, images=None), long, good(3, images=None))
    assert found(path, columns=Columns(images=None)) == {}
    monkeypatch.setattr(records, "LONGEST", 2_000_000)
    monkeypatch.setattr("reflectvlm.data.streaming.LONGEST", 2_000_000)
    assert found(path, columns=Columns(images=None)) == {("", "row too large"): ["rows.jsonl:2"]}


def test_e3_mixed_and_unknown_columns(tmp_path: Path) -> None:
    """Bug: a column that changes its kind half-way is found by a reward, after hours."""
    rows = [good(i, images=None, level=i) for i in range(5)]
    rows[3]["level"] = "three"
    rows[4]["extra"] = True
    del rows[1]["level"]
    path = written(tmp_path / "rows.jsonl", *rows)
    assert found(path, "warning", columns=Columns(images=None)) == {
        ("level", "mixed kinds in a column"): ["rows.jsonl:4"],
        ("level", "column missing in some rows"): ["rows.jsonl:2"],
        ("extra", "column in few rows"): ["rows.jsonl:5"],
    }


def test_e3_tables_as_text(tmp_path: Path) -> None:
    """Bug: cells and quotes are checked by other rules than those by which they are read."""
    path = written(tmp_path / "t.csv", 'question,answer\nq,1\nq,\nq\n"q\nr",2\n', b"\xff,3\n", "q,4\n")
    assert found(path, columns=Columns(images=None)) == {
        ("answer", "empty answer"): ["t.csv:3"],
        ("", "wrong number of cells"): ["t.csv:4"],
        ("", "invalid UTF-8"): ["t.csv:7"],
    }
    path = written(tmp_path / "t.csv", 'question,answer\nq,1\n"q,2\nq,3\n')
    assert ("", "file cannot be read on") in found(path, columns=Columns(images=None))


# -- E4: the parts of a row -------------------------------------------------------------------------

CHANGES: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"answer": ...}, [("answer", "missing answer")]),
    ({"answer": None}, [("answer", "missing answer")]),
    ({"answer": " \n"}, [("answer", "empty answer")]),
    ({"answer": ["a"]}, [("answer", "answer is no text")]),
    ({"answer": True}, [("answer", "answer is no text")]),
    ({"question": ...}, [("question", "missing question")]),
    ({"question": ""}, [("question", "empty question")]),
    ({"question": 12}, [("question", "question is no text")]),
    ({"id": ["x"]}, [("id", "id is no text")]),
    ({"id": "r0"}, [("id", "duplicate id")]),
    ({"note": "\ud83d"}, [("note", "text is no Unicode")]),
    ({"question": "<image><image>"}, [("question", "markers differ from images")]),
    ({"question": "<image>", "images": []}, [("question", "markers differ from images")]),
    ({"question": "<image>", "images": ["good.png"] * 2}, [("question", "markers differ from images")]),
    (
        {"question": None, "answer": "", "images": "gone.png", "id": 1.5},
        [
            ("question", "missing question"),
            ("answer", "empty answer"),
            ("images", "missing image"),
            ("id", "id is no text"),
        ],
    ),
]


def test_e4_all_defects_of_each_row(tmp_path: Path) -> None:
    """Bug: of a row with four defects one is told, and three more checks have to be made."""
    (tmp_path / "good.png").write_bytes(encoded())
    rows, expected = [good(0)], dict[tuple[str, str], list[str]]()
    for change, kinds in CHANGES:
        row = {key: value for key, value in (good(len(rows)) | change).items() if value is not ...}
        rows.append(row)
        for kind in kinds:
            expected.setdefault(kind, []).append(f"rows.jsonl:{len(rows)}")
    path = written(tmp_path / "rows.jsonl", *rows)
    assert found(path) == expected
    # The one good row is the one that a data set keeps, and each defect is among those that it tells.
    kept = dataset(path, max_bad=1.0).report
    assert (kept.kept, {*kept.reasons} <= {reason for _, reason in expected}) == (1, True)


def test_e4_rows_with_and_without_images(tmp_path: Path) -> None:
    """Bug: a few rows lost their images and nobody sees it."""
    (tmp_path / "good.png").write_bytes(encoded())
    path = written(tmp_path / "rows.jsonl", good(1), good(2, images=[]), good(3))
    warnings = found(path, "warning")
    assert warnings["images", "rows with and without images"] == ["rows.jsonl:2"]


def test_e4_a_misspelt_image_column(tmp_path: Path) -> None:
    """Bug: a file whose images stand under another name is checked as one of text."""
    rows = [{"id": str(i), "question": "q", "answer": "1", "image": "good.png"} for i in range(2)]
    assert found(written(tmp_path / "rows.jsonl", *rows)) == {("images", "no such column"): ["rows.jsonl"]}


def test_e4_repeated_ids_of_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: ids are compared within a part of the file only."""
    monkeypatch.setattr("reflectvlm.data.ids.PART", 7)
    monkeypatch.setattr("reflectvlm.data.ids._BUFFER", 100)
    ids, first = Ids(), dict[str, str]()
    expected = set()
    for number in range(1, 200):
        name, place = f"id-{number * number % 83}", f"a.jsonl:{number}"
        ids.add(name, place)
        if first.setdefault(name, place) != place:
            expected.add((place, first[name]))
    assert set(ids.repeated()) == expected
    assert len(expected) > 100
    ids.close()
    rows = [good(1, images=None), good(2, images=None), {**good(3, images=None), "id": "rows.jsonl:4"}]
    rows.append({"question": "q", "answer": "1"})
    path = written(tmp_path / "rows.jsonl", *rows)
    assert found(path, columns=Columns(images=None)) == {("id", "duplicate id"): ["rows.jsonl:4"]}


# -- E5 to E7 ---------------------------------------------------------------------------------------


def test_e5_prompts_over_the_limit(tmp_path: Path) -> None:
    """Bug: tokens are guessed from characters, or visual tokens are not counted."""
    (tmp_path / "good.png").write_bytes(encoded(Image.new("RGB", (64, 64))))
    (tmp_path / "wide.png").write_bytes(encoded(Image.new("RGB", (512, 512))))
    rows = [good(0), good(1, question="why " * 200), good(2, images="wide.png")]
    path = written(tmp_path / "rows.jsonl", *rows)
    words = [str(path), "images=true", "model=tiny", "max_tokens=110", "--json"]
    assert check_command.run(words) == 1
    from reflectvlm.data.prompt_length import PromptLength
    from reflectvlm.data.prompt_maker import PromptMaker

    length = PromptLength(maker=PromptMaker.load("tiny"), limit=110)
    places = {("question", "prompt too long"): ["rows.jsonl:2", "rows.jsonl:3"]}
    assert found(path, images=True, length=length) == places
    assert "Its images alone are too long" in str(length("q", [(512, 512)]))


def test_length_is_that_of_the_policy(tiny_policy: Any) -> None:
    """Bug: the instruction, the template or the resizing is left out of the count."""
    from fixtures import make_sample
    from reflectvlm.data.prompt_length import PromptLength
    from reflectvlm.data.prompt_maker import PromptMaker
    from reflectvlm.types import Instruction

    said = Instruction(text="Think first.")
    length = PromptLength(maker=PromptMaker.of(tiny_policy, said), limit=10)
    for shapes in ((), ((64, 64),), ((200, 90), (33, 70))):
        sample = make_sample(0, "How many <image_pad|>?", shapes)
        prompt = tiny_policy.prompt(sample, said)
        sizes = [image.size for image in sample.images]
        visual = sum(grid.tokens for grid in prompt.grids)
        assert length.tokens(sample.question, sizes) == (tiny_policy.prompt_length(prompt), visual)


def test_e6_special_tokens_are_told(tmp_path: Path) -> None:
    """Bug: nobody learns that questions spell special tokens, which stay text."""
    spelled = ("<|im_end|>", "<|image_pad|>", "</think>", "<back>", "<REFLECTION>", "\ue0000\ue001")
    rows = [good(i, images=None, question=f"a {text} b") for i, text in enumerate(spelled)]
    rows.append(good(9, images=None, trace="it is <|image_pad|>", question="a < b <image>"[:5]))
    path = written(tmp_path / "rows.jsonl", *rows)
    warnings = found(path, "warning", columns=Columns(images=None))
    places = [f"rows.jsonl:{number}" for number in range(1, 7)]
    assert warnings["question", "special token in a question"] == places
    assert warnings["trace", "pixel token in a text"] == ["rows.jsonl:7"]
    assert found(path, columns=Columns(images=None)) == {}


def test_e7_few_rows(tmp_path: Path) -> None:
    """Bug: a set smaller than a step, or one of which nothing is left, is found when training starts."""
    path = written(tmp_path / "rows.jsonl", *(good(i, images=None) for i in range(3)))
    columns = Columns(images=None)
    assert found(path, "warning", columns=columns, batch=4) == {
        ("", "fewer rows than a step takes"): ["rows.jsonl"]
    }
    assert found(path, "warning", columns=columns, batch=3) == {}
    assert found(path, columns=columns) == found(path, columns=columns) == {}


# -- the command ------------------------------------------------------------------------------------


def test_exit_codes_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a job goes on after a check that found something."""
    (tmp_path / "good.png").write_bytes(encoded())
    path = written(tmp_path / "rows.jsonl", good(1), good(2, answer=""), good(3, question="<back>"))
    assert check_command.run([str(path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["bad_rows"], told["problems"], told["warnings"]) == (3, 1, 1, 1)
    assert told["kinds"][0] == {
        "weight": "problem",
        "field": "answer",
        "reason": "empty answer",
        "count": 1,
        "first": [
            {
                "position": "rows.jsonl:2",
                "detail": "empty answer in column 'answer'. Fill it, or remove the row.",
            }
        ],
    }
    path = written(tmp_path / "rows.jsonl", good(1), good(3, question="<back>"))
    assert check_command.run([str(path)]) == 0
    said = capsys.readouterr().out
    assert "rows.jsonl: 2 rows, 0 cannot be used; 0 problems, 1 warnings" in said
    assert "  rows.jsonl:2: question: special token in a question. It spells '<back>'" in said
    assert check_command.run([str(path), "strict=true"]) == 1


def test_all_findings_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: of 30 rows with a defect five are named, and the others nowhere."""
    path = written(tmp_path / "rows.jsonl", *(good(i, images=None, answer="") for i in range(30)))
    out = tmp_path / "found.jsonl"
    assert check_command.run([str(path), "columns.images=null", f"out={out}", "show=2"]) == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["position"] for line in lines[:30]] == [f"rows.jsonl:{i}" for i in range(1, 31)]
    assert "… and 28 more" in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r"found.jsonl cannot be made \(File exists\)\. Name a new file"):
        check_command.run([str(path), f"out={out}"])


def test_rows_of_messages(tmp_path: Path) -> None:
    """Bug: rows of messages are checked for a question that stands nowhere."""
    (tmp_path / "good.png").write_bytes(encoded())
    (tmp_path / "cut.png").write_bytes(encoded()[:3000])

    def talk(image: str, text: Any) -> dict[str, Any]:
        asked = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "7"}]}

    rows = [talk("good.png", "q"), talk("cut.png", "q"), talk("good.png", 5), {"messages": []}]
    path = written(tmp_path / "rows.jsonl", *rows)
    assert found(path, columns=Columns(messages="messages")) == {
        ("messages", "broken image"): ["rows.jsonl:2"],
        ("messages", "broken messages"): ["rows.jsonl:3"],
        ("messages", "missing messages"): ["rows.jsonl:4"],
    }


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], r"data check takes one file or folder of rows, got 0"),
        (["a.jsonl", "b.jsonl"], r"got 2"),
        (["a.jsonl", "imags=true"], r"data check has no key 'imags'. Did you mean images"),
        (["a.jsonl", "--jsn"], r"data check has no flag '--jsn'. It knows --json"),
        (["a.jsonl", "max_tokens=5"], r"max_tokens counts tokens, which needs model=M and max_tokens=N"),
        (["a.jsonl", "model=tiny", "max_tokens=5"], r"add images=true"),
        (["a.jsonl", "batch=0"], r"batch is 0. It must be 1 or more"),
        (["./gone.jsonl"], r"'gone.jsonl' is not a file"),
    ],
)
def test_wrong_words(words: list[str], match: str) -> None:
    """Bug: a misspelt word is passed over, and the check is another than was asked for."""
    with pytest.raises(ValueError, match=match):
        check_command.run(words)


def test_a_tally_does_not_grow() -> None:
    """Bug: a file whose every row has columns of its own fills memory with kinds of findings."""
    tally = Tally(show=2)
    for number in range(2000):
        tally.add(Finding(f"a:{number}", f"column-{number}", "mixed", "", "warning"))
    assert len(tally.counts) == Tally.MOST + 1
    assert tally.total("warning") == 2000
    assert all(len(first) <= 2 for _, _, _, first in tally.kinds("warning"))


CHILD = """
import sys
from pathlib import Path
from reflectvlm.data.check import FileCheck
from reflectvlm.data.findings import Tally
from reflectvlm.data.rows import Columns
from reflectvlm.data.sources import pick
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) // 1024
check = FileCheck(columns=Columns(images=None))
check(pick(sys.argv[1]), Tally())
before = peak()
checked = check(pick(sys.argv[2]), Tally())
print(checked.rows, peak() - before)
"""


def test_memory_is_flat(tmp_path: Path) -> None:
    """Bug: the check keeps a place or an id of every row. 60,000 rows of 1 kB are 60 MB."""
    small = written(tmp_path / "small.jsonl", *(good(i, note="x" * 1000) for i in range(50)))
    large = tmp_path / "large.jsonl"
    with large.open("w") as file:
        file.writelines(json.dumps(good(i, note="x" * 1000)) + "\n" for i in range(60_000))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(small), str(large)], capture_output=True, text=True, check=True
    )
    rows, megabytes = map(int, done.stdout.split())
    assert rows == 60_000
    assert megabytes < 12  # ids of all rows to compare: 60,000 x 24 bytes, sorted


def test_checked_is_told() -> None:
    """Bug: a field of the result vanishes that scripts read."""
    assert {*Checked.__dataclass_fields__} == {"rows", "bad", "without_images", "seconds", "seen", "columns"}
