"""The report in a real browser: it loads, filters, follows a token, compares, and goes by keyboard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browsing import browser, needs_browser
from reflectvlm.cli import main
from reflectvlm.report.heat import Heat
from reflectvlm.report.page import page as page_of
from reflectvlm.report.payload import payload
from reflectvlm.report.reading import read_run
from reporting import RIGHT, WRONG, curve, picture, row, run_folder

__all__ = ["browser"]
pytestmark = needs_browser


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a payload; fails on any error, message or request of the page."""
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": 1300, "height": 900}, offline=True)
    context.set_default_timeout(20_000)

    def open_(data: Any) -> Any:
        file = tmp_path / "report.html"
        file.write_text(data if isinstance(data, str) else page_of(data), encoding="utf-8")
        tab = context.new_page()
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}"))
        tab.on("request", lambda one: one.url.startswith(("file:", "data:")) or wrong.append(one.url))
        tab.goto(file.as_uri())
        tab.wait_for_selector("html[data-ready]")
        return tab

    yield open_
    context.close()
    assert wrong == []


def folder(path: Path, *, right: bool = True) -> Path:
    """A run with two held-out questions before and after, two of training; `right`: the first is learned."""
    digest = picture(path / "kept")
    block = {"after": 18, "image": 0, "keep": [1, 2], "before_sampled": False}
    last = RIGHT if right else WRONG
    rows = [
        row(0, "one", WRONG, right=False, images=[digest]),
        row(0, "two", RIGHT, images=[digest], blocks=[block]),
        row(10, "three", WRONG + " and much more", right=False, group=8),
        row(10, "four", "nothing", group=8, stop="length"),
        row(20, "one", last, right=right, images=[digest], blocks=[block] * right),
        row(20, "two", RIGHT, images=[digest], blocks=[block]),
    ]
    kept = path / "kept" / "sample_images"
    result = {"before": {"accuracy": 0.5}, "after": {"accuracy": 1.0}}
    run = run_folder(path / "run", rows, curve(["reward", "loss", "accuracy"]), summary=result)
    kept.rename(run / "sample_images")
    return run


def one_run(tmp_path: Path) -> dict[str, Any]:
    """The payload of such a run with attention for its first answer: token t looks at cell t % 4 alone."""
    import numpy as np

    from reflectvlm.types import Grid

    run = read_run(folder(tmp_path))
    tokens = len(run.answers[0].ids)
    weights = np.zeros((tokens, 4))
    weights[np.arange(tokens), np.arange(tokens) % 4] = 0.25
    return payload([run], [{0: Heat.of(weights, Grid(1, 2, 2))}])


def listed(tab: Any) -> list[str]:
    """Samples in the list, with their steps."""
    rows = tab.locator("#rows .row")
    return [
        " ".join(
            [
                rows.nth(i).locator(".q").inner_text().split()[-1],
                rows.nth(i).locator(".meta span").first.inner_text(),
            ]
        )
        for i in range(rows.count())
    ]


def answer_text(card: Any) -> str:
    """An answer's text without blocks and the mark of its end."""
    return "".join(card.locator(".text [data-token]:not(.stop)").all_text_contents())


def test_all_parts_are_there(shown: Any, tmp_path: Path) -> None:
    """Bug: a script error half way, and the rest of the page is missing."""
    tab = shown(one_run(tmp_path))
    assert tab.title() == "run · reflectvlm"
    assert tab.locator(".result tbody tr").inner_text().split() == [
        "accuracy",
        "50.0%",
        "100.0%",
        "+50.0",
        "pp",
    ]
    assert tab.locator(".panel").count() == 3
    assert tab.locator(".panel path.line").count() > 3
    assert tab.locator("#rows .row").count() == 6
    assert tab.locator("#rows img").count() == 4
    tab.get_by_text("Recipe and machine").click()
    assert "steps" in tab.locator(".settings").inner_text()


def test_clicks_filter_and_sort(shown: Any, tmp_path: Path) -> None:
    """Bug: a filter that shows what it should hide."""
    tab = shown(one_run(tmp_path))
    tab.get_by_role("button", name="Wrong").click()
    assert listed(tab) == ["one? step 0", "three? step 10"]
    tab.get_by_role("button", name="Wrong").click()
    tab.get_by_role("button", name="No <back>").click()
    assert listed(tab) == ["one? step 0", "three? step 10", "four? step 10"]
    tab.get_by_role("button", name="Cut off").click()
    assert listed(tab) == ["four? step 10"]
    tab.get_by_role("button", name="Clear").click()
    tab.get_by_label("Sort", exact=True).select_option("longest")
    assert listed(tab)[0].startswith(("one? step 20", "two?"))
    tab.get_by_label("Step", exact=True).select_option("10")
    assert listed(tab) == ["three? step 10", "four? step 10"]
    tab.get_by_role("button", name="Clear").click()
    tab.get_by_label("Rows", exact=True).select_option("held")
    assert len(listed(tab)) == 4
    tab.get_by_role("button", name="With attention").click()
    assert listed(tab) == ["one? step 0"]
    tab.get_by_role("button", name="Clear").click()
    tab.get_by_label("Search questions").fill("MUCH three")
    assert listed(tab) == ["three? step 10"]
    tab.get_by_label("Search questions").fill("nowhere")
    assert "No answer passes" in tab.locator("#rows").inner_text()
    assert "Choose an answer" in tab.locator("#pane").inner_text()


def test_a_click_on_a_curve_lists_its_step(shown: Any, tmp_path: Path) -> None:
    """Bug: curves and answers that know nothing of each other."""
    tab = shown(one_run(tmp_path))
    plot = tab.locator('[data-key="reward"] svg')
    plot.hover(position={"x": 150, "y": 50})
    assert "step 10" in tab.locator('[data-key="loss"] .values').inner_text()
    plot.click(position={"x": 150, "y": 50})
    assert {one.split("step ")[1] for one in listed(tab)} == {"10"}


READ = """(canvas) => {
    const blank = new OffscreenCanvas(canvas.width, canvas.height);
    const copy = blank.getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    return (x, y) => [...copy.getImageData(x * canvas.width, y * canvas.height, 1, 1).data];
}"""
QUARTERS = "[[.25, .25], [.75, .25], [.25, .75], [.75, .75]].map(([x, y]) => read(x, y))"
"""Colours in the middle of the four cells of a page."""


def quarters(tab: Any, canvas: str) -> list[list[int]]:
    found: list[list[int]] = tab.evaluate(
        f"(one) => {{ const read = ({READ})(document.querySelector(one)); return {QUARTERS}; }}", canvas
    )
    return found


def opaque(tab: Any) -> list[bool]:
    """Which cells the heat map covers."""
    return [color[3] > 0 for color in quarters(tab, "canvas.heat")]


def test_hovering_a_token_shows_its_numbers_and_its_heat_map(shown: Any, tmp_path: Path) -> None:
    """Bug: the heat map of another token, or one that stays when the pointer has left."""
    tab = shown(one_run(tmp_path))
    for token in (8, 9):
        tab.locator(f'#pane [data-token="{token}"]').hover()
        assert opaque(tab) == [cell == token % 4 for cell in range(4)]
        assert tab.locator("canvas.heat").get_attribute("data-token") == str(token)
    told = tab.locator("#tip").inner_text()
    # exp(-0.5) = 0.61
    assert "61 %" in told
    assert "\u22120.5" in told
    assert "attention on the image 25 %" in told
    assert "accuracy 0" in told
    assert "format 1" in told
    tab.locator("h1").hover()
    assert not tab.locator("#tip").is_visible()
    assert not any(opaque(tab))


def test_tags_blocks_and_kept_cells(shown: Any, tmp_path: Path) -> None:
    """Bug: an inserted block elsewhere than it stood, or one that shows cells that the model never saw."""
    tab = shown(one_run(tmp_path))
    tab.locator("#rows .row").nth(1).click()
    assert tab.locator("#pane .tag").all_inner_texts() == ["<think>", "</think>", "<back>", "</back>"]
    # <think> 7 + see 3 + </think> 8: token 18 is the blank behind the tag.
    before = tab.evaluate("() => document.querySelector('.block').previousSibling.textContent")
    assert before == "</think>"
    assert tab.locator("#pane .block").inner_text() == "image 0: 2 of 4 tokens"
    tab.wait_for_selector("canvas.cells[data-drawn]")
    shades = [color[0] for color in quarters(tab, "canvas.cells")]
    # The page is black in its upper left quarter and white elsewhere; cells 1 and 2 are kept as they are.
    assert shades[1] == shades[2] == 255
    assert 60 < shades[0] < 160
    assert 100 < shades[3] < 200


def test_the_keyboard_reaches_everything(shown: Any, tmp_path: Path) -> None:
    """Bug: answers and tokens that only a mouse can point at."""
    tab = shown(one_run(tmp_path))
    tab.keyboard.press("/")
    tab.keyboard.type("three")
    assert listed(tab) == ["three? step 10"]
    tab.get_by_role("button", name="Clear").click()
    tab.locator("#rows").focus()
    tab.keyboard.press("Home")
    tab.keyboard.press("ArrowDown")
    selected = tab.locator('#rows [aria-selected="true"]')
    assert selected.get_attribute("aria-posinset") == "2"
    assert tab.locator("#rows").get_attribute("aria-activedescendant") == selected.get_attribute("id")
    tab.keyboard.press("End")
    assert selected.get_attribute("aria-posinset") == "6"
    tab.keyboard.press("Home")
    tab.locator("#pane .body").focus()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert tab.locator("canvas.heat").get_attribute("data-token") == "2"
    assert tab.locator("#tip").is_visible()
    tab.keyboard.press("Escape")
    assert not tab.locator("#tip").is_visible()
    tab.locator('[data-key="reward"] svg').focus()
    tab.keyboard.press("ArrowRight")
    assert "step 2" in tab.locator('[data-key="reward"] .values').inner_text()


def test_two_runs_beside_each_other(shown: Any, tmp_path: Path) -> None:
    """Bug: answers to different questions, or of different steps, beside each other."""
    for name in ("a", "b"):
        folder(tmp_path / name, right=name == "b").rename(tmp_path / f"run-{name}")
    assert (
        main(
            ["report", str(tmp_path / "run-a"), f"against={tmp_path / 'run-b'}", f"out={tmp_path / 'x.html'}"]
        )
        == 0
    )
    tab = shown((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert tab.locator("h1").inner_text() == "run-a against run-b"
    assert tab.locator('[data-key="reward"] path.line.run-A').count() >= 1
    assert tab.locator('[data-key="reward"] path.line.run-B').count() >= 1
    tab.get_by_role("button", name="Runs disagree").click()
    assert listed(tab) == ["one? step 20"]
    cards = tab.locator("#pane .answer")
    assert [cards.nth(i).locator(".badge").inner_text() for i in range(2)] == ["wrong", "right"]
    assert [answer_text(cards.nth(i)) for i in range(2)] == [WRONG, RIGHT]
    tab.get_by_role("button", name="B", exact=True).click()
    tab.get_by_role("button", name="Wrong").click()
    assert listed(tab) == []
    assert "No setting differs" in tab.locator("#settings").inner_text()


def test_a_row_says_what_it_is_about_in_each_run(shown: Any, tmp_path: Path) -> None:
    """Bug: "valid layout 0.0%" with no word on whose layout, and a rate where none is asked for."""
    grpo = {"rubric": {"layout": {"_target_": "reflectvlm.tags.grpo"}}}
    zero = {"accuracy": 0.5, "layout_rate": 0.0}
    one = run_folder(tmp_path / "one", [], recipe=grpo, summary={"before": zero, "after": zero})
    none = {"accuracy": 0.5}
    two = run_folder(tmp_path / "two", [], summary={"before": none, "after": none})
    tab = shown(payload([read_run(one), read_run(two)]))
    row = tab.locator(".result tbody tr").filter(has_text="valid layout")
    assert row.locator("td").all_inner_texts() == ["0.0%", "0.0%", "+0.0 pp", "–", "–", ""]
    over = row.locator("td").nth(0).get_attribute("title")
    assert over == tab.locator("#result .note").first.inner_text().removeprefix("valid layout, A: ")
    assert "<think>…</think> \\boxed{…}, which its reward asks for" in over
    assert (
        tab.locator("#result .note").nth(1).inner_text().startswith("valid layout, B: its reward asks for no")
    )


def test_hostile_texts_stay_texts(shown: Any, tmp_path: Path) -> None:
    """Bug: an answer that runs a script, loads a picture or breaks the page for whoever reads it."""
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)><back onclick='alert(3)'>"
    evil += "\u2028\u202e\x00😀<svg/onload=alert(4)>"
    block = {"after": 3, "image": 0, "keep": [0], "before_sampled": False}
    more = {
        "question": evil,
        "answer": evil,
        "stop": evil,
        "parts": {evil: 1.0},
        "blocks": [block, {"after": 99999, "image": 7}],
    }
    run = run_folder(
        tmp_path / "run",
        [row(0, evil, evil, **more)],
        [{"step": 1, evil: 1.0}],
        tag=evil,
        recipe={evil: evil},
    )
    tab = shown(payload([read_run(run)]))
    body = tab.locator("#pane .body")
    body.focus()
    for _ in range(5):
        tab.keyboard.press("ArrowRight")
    text = answer_text(tab.locator("#pane"))
    assert text == evil
    assert tab.locator("#pane script, #pane img, svg[onload], [onerror]").count() == 0
    assert tab.locator("script").count() == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(browser: Any, tmp_path: Path, scheme: str) -> None:
    """Bug: grey on grey. WCAG AA asks for a contrast of 4.5."""
    context = browser.new_context(color_scheme=scheme)
    tab = context.new_page()
    file = tmp_path / "r.html"
    file.write_text(page_of(one_run(tmp_path)), encoding="utf-8")
    tab.goto(file.as_uri())
    style = "(name) => getComputedStyle(document.documentElement).getPropertyValue(name)"
    colors = {
        name: tab.evaluate(style, f"--{name}").strip()
        for name in ("bg", "card", "ink", "faint", "a", "b", "good", "bad")
    }
    dark = [luminance(colors["card"]) < 0.1, luminance(colors["bg"]) < 0.1]
    assert dark == [scheme == "dark"] * 2
    for name in ("ink", "faint", "a", "b", "good", "bad"):
        for ground in ("bg", "card"):
            one, other = sorted((luminance(colors[name]), luminance(colors[ground])))
            assert (other + 0.05) / (one + 0.05) >= 4.5, (name, ground)
    context.close()


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2.1) of `#rrggbb` or `#rgb`."""
    digits = color.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * one for one in digits)
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_thousands_of_answers_open_at_once(shown: Any, tmp_path: Path) -> None:
    """Bug: a list that makes all of its rows, and a page of 5,000 rollouts that takes a minute."""
    text = "<think>" + "so the digit may be a four or a nine " * 12 + "</think> <back>four</back> \\boxed{4}"
    rows = [row(n // 50, f"s-{n}", text, right=n % 3 > 0) for n in range(5000)]
    data = payload([read_run(run_folder(tmp_path / "run", rows, curve(["loss", "reward"], 2000)))])
    started = time.perf_counter()
    tab = shown(data)
    assert time.perf_counter() - started < 15  # 3 s are promised on a machine that has nothing else to do
    assert tab.locator("#rows .row").count() < 40
    tab.get_by_role("button", name="Wrong").click()
    assert tab.locator(".count").inner_text() == "1,667 of 5,000"
    tab.locator("#rows").focus()
    tab.keyboard.press("End")
    assert tab.locator('#rows [aria-selected="true"] .q').inner_text() == "What is in s-4998?"
