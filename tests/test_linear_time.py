"""Every reader of texts and rows takes linear time, by a clock that tells quadratic from linear."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fuzzing import LAYOUTS
from reflectvlm.data.images import ImageLimits
from reflectvlm.data.records import parse_csv, parse_json
from reflectvlm.data.rows import BadRow, Columns, read_row
from reflectvlm.rewards.answers import (
    extract_boxed,
    extract_letter,
    extract_number,
    extract_tag,
    grade_text,
    kind_of,
    normalise,
)
from reflectvlm.rewards.reflection import closed_blocks
from reflectvlm.tags import find_boxes, parse

UNITS = (
    *("<think>", "</think>", "<think></think>", "<back><think>", "<", "</", "<REFLECTION></REFLECTION>"),
    *(
        "\\boxed{",
        "}",
        "{",
        "{}",
        "\\",
        "\\boxed{}",
        "\\text{",
        "\\text {",
        "\\text{a}",
        "$",
        "\\(",
        "(a)",
        "A or ",
    ),
    *(
        "1",
        "1,000,",
        ".",
        "1e9",
        "\\frac{1}{2}",
        " ",
        "\n",
        "a ",
        "*",
        "\u0315\u0300",
        "e\u0301",
        "ſ",
        "İ",
        ".!",
    ),
    *(
        "<answer>",
        "</answer>",
        "<answer></answer>",
        "[",
        '["',
        '"',
        ",",
        '{"a":',
        "\\u00e9",
        "data:",
        "<image>",
    ),
)
TIMED: dict[str, Callable[[str], Any]] = {
    **{f"parse {one.name}": lambda text, one=one: parse(one, text) for one in LAYOUTS},  # type: ignore[misc]
    "find_boxes": find_boxes,
    "closed_blocks": lambda text: closed_blocks(text, "think"),
    "extract_boxed": extract_boxed,
    "extract_tag": lambda text: extract_tag(text, "answer"),
    "extract_letter": extract_letter,
    "extract_number": extract_number,
    "normalise": normalise,
    "grade_text": lambda text: grade_text(text, text + "x"),
    "kind_of": getattr(kind_of, "__wrapped__", kind_of),
}


def _json_row(text: str) -> Any:
    return _or_bad(lambda: parse_json(text.encode(), "rows.jsonl:3"))


def _csv_row(text: str) -> Any:
    text = text.replace("\n", " ")  # one record
    return _or_bad(lambda: parse_csv(text.encode(), "rows.jsonl:3", ("question", "answer"), ","))


def _row(text: str) -> Any:
    row = {"question": text, "answer": text, "id": text, "images": text}
    return _or_bad(lambda: read_row(row, "rows.jsonl:3", Columns(), ImageLimits(urls=False), Path("/")))


def _or_bad(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except BadRow as bad:
        return str(bad)


TIMED |= {
    "parse_json": _json_row,
    "parse_csv": _csv_row,
    "read_row": _row,
    # The second unit of each pair is what hides the trouble behind the first.
    "parse_json, many keys": lambda text: _json_row(
        "{" + ",".join(f'"{i}":1' for i in range(len(text))) + ',"0":1}'
    ),
    "parse_json, same last": lambda text: _json_row(
        "{" + ",".join(f'"{i}":1' for i in range(len(text))) + f',"{len(text) - 1}":1}}'
    ),
}


def _seconds(call: Callable[[str], Any], texts: tuple[str, ...], times: int = 1) -> list[float]:
    """The least time of each text. They take turns, so what else slows the machine slows them alike. The
    garbage collector waits, because it walks the whole process."""
    best = [9e9] * len(texts)
    gc.disable()
    try:
        for _ in range(times):
            for place, text in enumerate(texts):
                started = time.thread_time()
                call(text)
                best[place] = min(best[place], time.thread_time() - started)
    finally:
        gc.enable()
    return best


def _not_linear(call: Callable[[str], Any], unit: str, before: str, after: str) -> str | None:
    """What 128 kB took in units of what 32 kB took, if that is not linear. Four times as much text takes 4
    times as long if time is linear and 16 times if it is quadratic; below 20 ms nobody minds. Both sizes are
    beyond a core's own cache: from one within it to one that is not, linear work looks worse than it is."""
    small, large = (before + unit * (size // len(unit)) + after for size in (32_000, 128_000))
    if _seconds(call, (small,))[0] < 0.02:
        return None
    for times in (3, 6):  # a second, longer look before anyone is accused
        took, more = _seconds(call, (small, large), times)
        if more < 8 * took:
            return None
    return f"{more / took:.1f} times for {unit!r} behind {before!r}"


@pytest.mark.parametrize("name", TIMED)
def test_time_is_linear(name: str) -> None:
    """Bug: an answer of 100 kB that takes minutes, and with it the whole step."""
    call = TIMED[name]
    units = ("x",) if "keys" in name or "same" in name else UNITS
    for unit in units:
        for before, after in (
            ("", ""),
            ("<think>", "</think>"),
            ("\\boxed{", "}"),
            ("<answer>", "</answer>x"),
        ):
            assert _not_linear(call, unit, before, after) is None


def test_the_clock_tells_quadratic_from_linear() -> None:
    """Bug: a bound so wide, or a clock so coarse, that a quadratic reader passes."""

    def linear(every: int, text: str) -> int:
        return sum(len(text[:2_000].split("x")) for _ in range(0, len(text), every))

    def quadratic(every: int, text: str) -> int:
        return sum(len(text.split("x")) for _ in range(0, len(text), every))

    def slow_enough(way: Callable[[int, str], int], every: int) -> Callable[[str], int]:
        """What takes this machine long enough to be looked at."""
        while _seconds(call := functools.partial(way, every), ("x" * 32_000,))[0] < 0.03:
            every //= 2
        return call

    assert _not_linear(slow_enough(linear, 32), "x", "", "") is None
    told = _not_linear(slow_enough(quadratic, 1_024), "x", "", "")
    assert told is not None
    assert told.endswith(" times for 'x' behind ''")
