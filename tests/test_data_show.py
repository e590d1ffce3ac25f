"""`reflectvlm data show`: rows in the terminal and as a page."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from bad_rows import encoded, written
from reflectvlm.data import show_command
from reflectvlm.data.pixels_shown import HALF, half_blocks
from reflectvlm.data.rows import Columns
from reflectvlm.data.show_command import Chosen, print_rows, rows
from reflectvlm.data.sources import pick
from reflectvlm.recipe_check import RecipeError

HOSTILE = "<script>alert(1)</script> \x1b[2J <think>no</think>"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "good.png").write_bytes(encoded())
    common = {"answer": "1", "images": "good.png"}
    return written(
        tmp_path / "rows.jsonl",
        {"id": "a", "question": "first", **common, "level": 3, "trace": HOSTILE},
        {"id": "b", "question": "second", **common, "answer": ""},
        {"id": "c", "question": "third", **common},
    )


def test_half_blocks_are_the_pixels() -> None:
    """Bug: rows and columns are exchanged, or the last line of an odd height is lost."""
    image = Image.new("RGB", (3, 3), (0, 0, 0))
    image.putpixel((2, 0), (255, 0, 0))
    image.putpixel((1, 1), (0, 255, 0))
    image.putpixel((0, 2), (0, 0, 255))
    shown = half_blocks(image, 40)
    assert shown.plain == f"{HALF * 3}\n" * 2
    colours = [
        (tuple(span.style.color.triplet), tuple(span.style.bgcolor.triplet))  # type: ignore[union-attr]
        for span in shown.spans
    ]
    black = (0, 0, 0)
    assert colours[2] == ((255, 0, 0), black)
    assert colours[1] == (black, (0, 255, 0))
    assert colours[3][0] == (0, 0, 255)
    assert half_blocks(Image.new("RGB", (640, 480)), 40).plain.count("\n") == 15


def printed(path: Path, **settings: Any) -> str:
    out = Console(file=io.StringIO(), force_terminal=True, width=100, **settings)
    shown = rows(pick(path), Columns(), Chosen.read("1-2"), None)
    assert print_rows(shown, 20, out) == 2
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_the_terminal(path: Path) -> None:
    """Bug: pictures as noise where there are no true colours; a row's control characters drive the screen."""
    text = printed(path, color_system="truecolor")
    assert HALF in text
    assert "\x1b[2J" not in text
    assert "\\x1b[2J" in text
    assert "empty answer in column 'answer'" in text
    plain = printed(path, color_system="256")
    assert HALF not in plain
    assert "[image 1: 60 x 40]" in plain


def test_without_a_terminal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: colours in a pipe."""
    assert show_command.run([str(path), "rows=1,3"]) == 0
    said = capsys.readouterr().out
    assert "1  rows.jsonl:1  id a" in said
    assert "3  rows.jsonl:3  id c" in said
    assert "second" not in said
    assert "\x1b" not in said


def test_the_page_stands_alone(path: Path, tmp_path: Path) -> None:
    """Bug: a row's script runs in the page, or the page needs files that stay behind."""
    out = tmp_path / "page.html"
    assert show_command.run([str(path), f"out={out}"]) == 0
    page = out.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<article>") == 3
    assert page.count("src='data:image/png;base64,") == 2
    assert "empty answer in column &#x27;answer&#x27;" in page
    assert not re.search(r"""(?:src|href)=['"](?!data:)""", page)
    with pytest.raises(RecipeError, match=r"page.html cannot be made \(File exists\)"):
        show_command.run([str(path), f"out={out}"])


@pytest.mark.parametrize("text", ["0", "3-2", "x", "1-", ""])
def test_rows_that_are_none(text: str, path: Path) -> None:
    """Bug: `rows=0` shows the last row, `3-2` nothing, without a word."""
    with pytest.raises(RecipeError, match=r"rows is|rows is empty"):
        show_command.run([str(path), f"rows={text}"])


def test_rows_beyond_the_file(path: Path) -> None:
    """Bug: nothing is shown, and the exit code says that all is well."""
    with pytest.raises(RecipeError, match="has fewer rows than rows=9 asks for"):
        show_command.run([str(path), "rows=9"])
