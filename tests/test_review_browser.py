"""The page of `data review` in a real browser: keys, fixes, reloads, restarts, rows that want to be markup.

REFLECTVLM_PICTURES=docs/images pytest tests/test_review_browser.py -k pictures   makes those of the docs
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browsing import browser, needs_browser
from reflectvlm.curate.review.server import ReviewServer
from reviewing import EVIL, desk, lines, opened, row, rows_file, serving, trace

__all__ = ["browser"]
pytestmark = needs_browser


@pytest.fixture
def tab(browser: Any) -> Iterator[Callable[[ReviewServer], Any]]:
    """Opens a server's page; fails on any error, message or foreign request of it."""
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": 1300, "height": 860})
    context.set_default_timeout(20_000)

    def open_(server: ReviewServer, *expected: str) -> Any:
        one = context.new_page()
        refused = ("status of 422", "status of 503", *expected)  # 503: the server went first
        one.on("console", lambda m: any(word in m.text for word in refused) or wrong.append(m.text))
        one.on("pageerror", lambda error: wrong.append(str(error)))
        one.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}"))
        here = (server.address, "data:")
        one.on("request", lambda asked: asked.url.startswith(here) or wrong.append(asked.url))
        one.goto(server.address)
        one.wait_for_selector("html[data-ready]")
        return one

    yield open_
    context.close()
    assert wrong == []


def at(page: Any, number: int) -> None:
    """Waits for a row."""
    page.locator("h1", has_text=re.compile(rf"^Row {number} of")).wait_for()


def said(page: Any, text: str) -> None:
    page.locator("#said", has_text=text).wait_for()


def test_keys_decide_and_walk(tab: Any, tmp_path: Path) -> None:
    """Bug: a key that does nothing, or the decision lands on the row beside it."""
    one = desk(rows_file(tmp_path, [row(i) for i in range(5)]))
    with serving(one) as server:
        page = tab(server)
        for key, number in [
            ("a", 2),
            ("j", 3),
            ("d", 4),
            ("k", 3),
            ("ArrowLeft", 2),
            ("ArrowRight", 3),
            ("j", 4),
        ]:
            page.keyboard.press(key)
            at(page, number)
        assert one.state()["status"] == "a.d.."
        assert page.locator("#counts").inner_text() == "2 of 5 decided (40 %)"
        page.keyboard.press("u")
        at(page, 3)
        assert one.state()["status"] == "a...."
        page.keyboard.press("a")
        at(page, 4)
        page.keyboard.press("a")
        at(page, 5)
        page.keyboard.press("d")
        at(page, 2)  # the one that was passed by
        page.keyboard.press("a")
        said(page, "All rows are decided")
        assert one.state()["status"] == "aaaad"
    assert [line["row"] for line in lines(one.decisions.path)] == ["r0", "r2", "r2", "r2", "r3", "r4", "r1"]


def test_a_held_key_decides_once(tab: Any, tmp_path: Path) -> None:
    """Bug: a finger that rests on a accepts a hundred rows that nobody has seen."""
    one = desk(rows_file(tmp_path, [row(i) for i in range(6)]))
    with serving(one) as server:
        page = tab(server)
        page.evaluate(
            """() => { for (let i = 0; i < 20; i++) document.dispatchEvent(
                 new KeyboardEvent("keydown", { key: "a", bubbles: true, repeat: i > 0 })); }"""
        )
        at(page, 2)
        held = """() => document.dispatchEvent(
            new KeyboardEvent("keydown", { key: "a", bubbles: true, repeat: true }))"""
        for _ in range(3):
            page.evaluate(held)
        page.locator("#checks .good").first.wait_for()
        page.keyboard.press("j")
        at(page, 3)
        assert one.state()["status"] == "a....."


def test_a_fix_is_checked_while_it_is_typed_and_saved(tab: Any, tmp_path: Path) -> None:
    """Bug: a fix that breaks the layout, and nobody hears of it before training."""
    one = desk(rows_file(tmp_path, [row(0, trace=trace("4")), row(1)]))
    with serving(one) as server:
        page = tab(server)
        page.locator("#checks .bad", has_text="Answer 4 is not the gold answer").wait_for()
        page.keyboard.press("f")
        area = page.locator("#edit-trace")
        area.fill("<think>a</think><back>b</back><think>c \\boxed{3}")
        page.locator("#edit-checks .bad", has_text="<think> is never closed").wait_for()
        page.keyboard.press("Control+Enter")
        said(page, "Save again")
        assert one.state()["status"] == ".."
        area.fill("<think>a</think><back>b</back><think>c</think> \\boxed{3}")
        page.locator("#edit-checks .good", has_text="Answer 3 is right").wait_for()
        page.locator("#edit-checks:not(:has(.bad))").wait_for()
        page.keyboard.press("Control+Enter")
        at(page, 2)
        page.keyboard.press("k")
        at(page, 1)
        assert page.locator(".badge.fix").inner_text().startswith("Fixed by ada")
        page.locator("#checks .good", has_text="Answer 3 is right").wait_for()
        page.keyboard.press("a")
        said(page, "Press a again to accept it as it was before")
        assert one.state()["status"] == "f."
    one.finish()
    assert lines(one.out)[0]["trace"].endswith("<think>c</think> \\boxed{3}")


def test_a_row_with_a_fault_needs_the_key_twice(tab: Any, tmp_path: Path) -> None:
    """Bug: a in a hurry keeps a broken trace; or people cannot overrule a grader that is wrong."""
    one = desk(rows_file(tmp_path, [row(0, trace=trace("4")), row(1)]))
    with serving(one) as server:
        page = tab(server)
        page.keyboard.press("a")
        said(page, "Press a again")
        assert one.state()["status"] == ".."
        page.keyboard.press("a")
        at(page, 2)
        assert one.state()["status"] == "a."
        page.keyboard.press("a")
        said(page, "All rows are decided")


def test_a_reload_and_a_restart_go_on_where_people_were(tab: Any, tmp_path: Path) -> None:
    """Bug: F5 or a restart in the middle, and decisions, place or half a fix are gone."""
    path = rows_file(tmp_path, [row(i) for i in range(5)])
    with serving(desk(path)) as server:
        page = tab(server)
        page.keyboard.press("a")
        at(page, 2)
        page.keyboard.press("j")
        at(page, 3)
        page.reload()
        at(page, 3)
        assert page.locator("#counts").inner_text().startswith("1 of 5")
        page.keyboard.press("d")
        at(page, 4)
        page.keyboard.press("f")
        page.locator("#edit-trace").fill("half a sent")
        page.locator("#edit-checks .bad").first.wait_for()
        page.locator("#edit-checks .bad", has_text="expected <think>").wait_for()
    page.close()
    with serving(desk(path)) as server:  # as after a kill: nothing was closed
        page = tab(server)
        at(page, 4)
        assert page.locator("#counts").inner_text().startswith("2 of 5")
        assert page.locator("#where").inner_text().endswith("unsaved edit: press f")
        page.keyboard.press("f")
        assert page.locator("#edit-trace").input_value() == "half a sent"
        page.get_by_role("button", name="Discard the edit").click()
        page.locator("#checks .good").first.wait_for()
        page.keyboard.press("u")
        at(page, 3)


def test_escape_keeps_what_was_typed(tab: Any, tmp_path: Path) -> None:
    """Bug: Esc by habit, and ten minutes of typing are gone."""
    with serving(desk(rows_file(tmp_path, [row(0), row(1)]))) as server:
        page = tab(server)
        page.keyboard.press("f")
        page.locator("#edit-answer").fill("12")
        page.keyboard.press("Escape")
        page.get_by_text("unsaved edit").wait_for()
        page.keyboard.press("f")
        assert page.locator("#edit-answer").input_value() == "12"


def test_texts_of_rows_stay_texts(tab: Any, tmp_path: Path) -> None:
    """Bug: a row from the web runs as script with the token at hand (the fixture fails on any dialog)."""
    vote = {EVIL: {"verdict": EVIL, "why": EVIL}, "b": True}
    evil = row(
        0,
        review=EVIL,
        id=EVIL,
        question=EVIL,
        answer=EVIL,
        trace=EVIL,
        votes=vote,
        images=[EVIL],
        **{EVIL: EVIL},
    )
    one = desk(rows_file(tmp_path, [evil, row(1)]))
    one.rows.unread.append(one.rows.unread[0] if one.rows.unread else _skipped())
    with serving(one) as server:
        page = tab(server)
        page.locator(".broken").wait_for()
        page.keyboard.press("f")
        page.locator("#edit-trace").fill(EVIL + "!")
        page.locator("#edit-checks .bad").first.wait_for()
        page.keyboard.press("Control+Enter")
        said(page, "Save again")
        page.keyboard.press("Control+Enter")
        at(page, 2)
        page.keyboard.press("k")
        at(page, 1)
        page.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
        shown = page.locator("#page").inner_text()
        assert shown.count(EVIL) >= 7
        assert page.evaluate("document.scripts.length") == 1
        assert page.locator("#card img, #card script").count() == 0


def _skipped() -> Any:
    from reflectvlm.data.filtered import Skipped

    return Skipped(EVIL, EVIL, EVIL)


def test_another_page_of_the_browser_cannot_write(browser: Any, tmp_path: Path) -> None:
    """Bug: the address leaks, and any page that is open drops rows."""
    one = desk(rows_file(tmp_path, [row(0)]))
    with serving(one) as server:
        other = browser.new_page()
        other.goto("data:text/html,<p>another page")
        tried = """async ([url, of]) => {
            const body = JSON.stringify({ place: 0, do: "drop", of }), said = [];
            const json = { headers: { "Content-Type": "application/json" } };
            for (const options of [{}, { mode: "no-cors" }, json]) {
                try {
                    said.push((await fetch(url, { method: "POST", body, ...options })).type);
                } catch { said.push("refused"); }
            }
            return said;
        }"""
        said_ = other.evaluate(tried, [f"{server.address}decide", one.rows.digests[0]])
        other.close()
        assert said_[0] == said_[2] == "refused"
        assert one.state()["status"] == "."


def test_search_filters_and_numbers(tab: Any, tmp_path: Path) -> None:
    """Bug: a search that shows another row than it found, or a letter in its field that drops a row."""
    votes = {"a": True, "b": False}
    rows = [row(i, **({"votes": votes} if i == 4 else {})) for i in range(8)]
    rows[6]["trace"] = trace(back="A zebra.")
    one = desk(rows_file(tmp_path, rows))
    with serving(one) as server:
        page = tab(server)
        page.keyboard.press("/")
        page.keyboard.type("zebra add")
        page.keyboard.press("Enter")
        said(page, "No row has these words")
        page.keyboard.press("/")
        page.keyboard.type("zebra")
        page.keyboard.press("Enter")
        at(page, 7)
        assert one.state()["status"] == "." * 8
        page.locator("#words").fill("")
        page.locator("#words").press("Enter")
        page.get_by_role("button", name="Judges disagree").click()
        at(page, 5)
        page.keyboard.press("d")
        said(page, "All rows here are decided")
        page.get_by_role("button", name="All 8").click()
        page.keyboard.press("g")
        page.keyboard.type("2")
        page.keyboard.press("Enter")
        at(page, 2)
        assert one.state()["status"] == "....d..."


def test_images_can_be_enlarged_by_keys(tab: Any, tmp_path: Path) -> None:
    """Bug: small print in an image that nobody can read, or keys in the enlargement that decide."""
    one = desk(rows_file(tmp_path, [row(0, images=["page.png", "page.png"]), row(1)]))
    with serving(one) as server:
        page = tab(server)
        page.keyboard.press("z")
        page.locator("#zoom-told", has_text="Image 1 of 2 · 64 × 48").wait_for()
        width = page.locator("#zoomed img").bounding_box()["width"]
        page.keyboard.press("+")
        page.keyboard.press("+")
        assert page.locator("#zoomed img").bounding_box()["width"] > 2 * width
        page.keyboard.press("a")
        page.keyboard.press("n")
        page.locator("#zoom-told", has_text="Image 2 of 2").wait_for()
        page.keyboard.press("Escape")
        page.locator("#zoom").wait_for(state="hidden")
        at(page, 1)
        assert one.state()["status"] == ".."


def test_finish_writes_and_says_so(tab: Any, tmp_path: Path) -> None:
    """Bug: a set that is not written, and a page that says it is."""
    one = desk(rows_file(tmp_path, [row(0), row(1)]))
    with serving(one) as server:
        page = tab(server, "409")
        page.keyboard.press("a")
        at(page, 2)
        page.get_by_role("button", name="Finish").click()
        page.get_by_text("1 row nobody has decided about is left out.").wait_for()
        one.out.write_text('{"mine": 1}\n')
        page.get_by_role("button", name="Write and go on").click()
        page.get_by_text("is no reviewed set").wait_for()
        page.get_by_role("button", name="Back").click()
        one.out.unlink()
        page.get_by_role("button", name="Finish").click()
        page.get_by_role("button", name="Write and end").click()
        page.get_by_text("1 accepted, 0 fixed; 0 dropped, 1 undecided left out").wait_for()
        assert server.finished.wait(10)
    assert [line["id"] for line in lines(one.out)] == ["r0"]


def test_a_server_that_is_gone_is_said(tab: Any, tmp_path: Path) -> None:
    """Bug: keys that seem to work while nothing is saved any more."""
    path = rows_file(tmp_path, [row(0), row(1)])
    with serving(desk(path)) as server:
        page = tab(server, "ERR_")
    page.keyboard.press("a")
    said(page, "The review has ended")
    at(page, 1)
    assert len(opened(path)) == 2


def test_it_can_be_used_without_letters_and_by_screen_readers(tab: Any, tmp_path: Path) -> None:
    """Bug: controls without names, or letters that speech input types into decisions."""
    one = desk(rows_file(tmp_path, [row(0), row(1)]))
    with serving(one) as server:
        page = tab(server)
        unnamed = page.locator("button, input, img, dialog[open]").evaluate_all(
            """all => all.filter((one) => one.checkVisibility() && !(one.textContent.trim() || one.ariaLabel
                || one.alt || one.title || one.labels?.length)).map((one) => one.outerHTML)"""
        )
        assert unnamed == []
        assert page.locator("[role=status]").count() >= 1
        page.keyboard.press("?")
        page.get_by_label("single letters as keys").uncheck()
        page.keyboard.press("Escape")
        page.locator("#help").wait_for(state="hidden")
        page.keyboard.press("a")
        page.keyboard.press("ArrowRight")
        at(page, 2)
        assert one.state()["status"] == ".."
        page.get_by_role("button", name="Drop d").click()
        at(page, 1)
        assert one.state()["status"] == ".d"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, tmp_path: Path, scheme: str) -> None:
    """Bug: grey on grey in one of the two schemes (4.5 to 1 is what accessibility asks of small text)."""
    votes = {"a": True, "b": False}
    with serving(desk(rows_file(tmp_path, [row(0, votes=votes, trace=trace("4"))]))) as server:
        page = browser.new_page(color_scheme=scheme)
        page.goto(server.address)
        page.locator("#checks .bad").wait_for()
        found = page.locator(
            "button:enabled, h1, h2, .faint, .badge, .check, .tag, .region, .asked, .gold"
        ).evaluate_all(CONTRAST)
        page.close()
        assert len(found) > 25
        assert [one for one in found if one[1] < 4.5] == []


CONTRAST = """all => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = () => {
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paint = (color) => { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); };
  return all.filter((one) => one.checkVisibility() && one.textContent.trim()).map((one) => {
    const grounds = [];
    for (let up = one; up; up = up.parentElement) grounds.unshift(getComputedStyle(up).backgroundColor);
    paint("white");
    grounds.forEach(paint);
    const ground = light();
    paint(getComputedStyle(one).color);
    const two = [ground, light()].sort((a, b) => a - b);
    return [one.className + " " + one.textContent.slice(0, 30), (two[1] + 0.05) / (two[0] + 0.05)];
  });
}"""


def test_the_pictures_of_the_docs(browser: Any, tmp_path: Path) -> None:
    """Bug: pictures in the docs that nobody can make again."""
    from reflectvlm.data.digit_traces import DigitTraces
    from reflectvlm.data.digits import Digits

    rows, whys = (
        [],
        ("looks again and finds what it had misread", "reads a 5 in the upper right and stays with it"),
    )
    for sample in DigitTraces(data=Digits(size=24), style="semantic", wrong_first=1.0):
        name, votes = f"{sample.id}.png", {"judge-7b": {"verdict": "right", "why": whys[0]}}
        if len(rows) % 4 == 0:
            votes["judge-32b"] = {"verdict": "wrong", "why": whys[1]}
        votes["rule"] = {"verdict": "right"}
        sample.images[0].save(tmp_path / name)
        part = {"question": sample.question, "answer": sample.answer, "trace": sample.columns["trace"]}
        rows.append({"id": sample.id, **part, "images": [name], "votes": votes, "method": "semantic_back"})
    rows[17]["trace"] = rows[17]["trace"].replace("</back>", "", 1)
    one = desk(rows_file(tmp_path, rows, "cold_start.jsonl"))
    for place in range(16):
        one.decide(place, "drop" if place % 7 == 4 else "accept", one.rows.digests[place])
    with serving(one) as server:
        for scheme, name in (("light", "data_review"), ("dark", "data_review_fix")):
            page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 640})
            page.goto(server.address)
            page.locator("#checks .good").first.wait_for()
            if scheme == "dark":
                page.keyboard.press("j")
                at(page, 18)
                page.keyboard.press("f")
                page.locator("#edit-checks .bad").first.wait_for()
            page.locator("#pictures img").evaluate("(one) => one.decode()")
            data = page.screenshot()
            page.close()
            assert len(data) < 300_000
            if folder := os.environ.get("REFLECTVLM_PICTURES"):
                (Path(folder) / f"{name}.png").write_bytes(data)
