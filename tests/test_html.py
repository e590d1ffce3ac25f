"""HTML views: nothing a model writes becomes markup, and insertions stand where they belong."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reflectvlm.html import KEPT, block_label, group_html, pieces, rollout_html
from reflectvlm.types import Grid, Patches, Prompt, Rollout, Sample, ScoredGroup, Text, Visual

EVIL = "<script>alert(1)</script><img src=x onerror='a()'>&lt;"


def rollout(
    text: str,
    *spans: Text | Visual,
    question: str = "q",
    size: tuple[int, int] = (300, 100),
    color: str = "black",
) -> Rollout:
    sample = Sample(id="s<1>", question=question, answer="<b>1</b>", images=(Image.new("RGB", size, color),))
    patches = Patches(pixels=torch.zeros(64, 3), grid=Grid(1, 4, 4))
    return Rollout(
        prompt=Prompt(sample=sample, spans=(), patches=(patches,)), spans=spans, text=text, stop="eos"
    )


def words(*ids: int) -> Text:
    return Text(ids=ids, trained=True, logprobs=(0.0,) * len(ids))


class Reader(HTMLParser):
    """Collects element names and text; complains about elements that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.names: set[str] = set()
        self.open: list[str] = []
        self.shown = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self.names.add(tag)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown += data


@given(
    st.text()
    | st.lists(st.sampled_from(["<back>", "</back>", "<script>", "'", '"', "&", "<!--"])).map("".join)
)
def test_no_text_becomes_markup(text: str) -> None:
    """Prevents a sampled or given `<script>` from running in the notebook of whoever looks at it."""
    page = rollout_html(rollout(text + EVIL, words(1), question=text + EVIL))
    reader = Reader(page)
    assert reader.names <= {"div", "span", "b", "img"}
    assert page.count("<img") == 1
    shown = "".join((text + EVIL).replace("\r\n", "\n").replace("\r", "\n").split("\x00"))
    assert shown.count("script") <= reader.shown.count("script")


def test_group_escapes_ids_answers_and_reward_names() -> None:
    """Prevents markup from a data set's row or a reward's name."""
    one = rollout(EVIL, words(1))
    group = ScoredGroup(rollouts=(one,), rewards=(0.5,), parts={"<i>": (math.nan,)}, scored=(True,))
    page = group_html(group)
    assert Reader(page).names <= {"div", "span", "b", "img"}
    assert "<b>1</b>" not in page
    assert "&lt;i&gt; –" in page
    assert "s&lt;1&gt;" in page


def order(page: str) -> str:
    """What a reader sees, styles and elements taken away."""
    return Reader(page).shown


def test_chip_stands_before_a_special_trigger() -> None:
    """Prevents an insertion from being shown behind the tag that it was put in front of."""
    show = Visual(image=0, before_sampled=True)
    found = rollout("a<REFLECTION>b<REFLECTION>c", words(1), show, words(77, 2), show, words(77, 3))
    assert "a⟦image 0: all 16 tokens⟧<REFLECTION>b⟦image 0: all 16 tokens⟧<REFLECTION>c" in order(
        rollout_html(found)
    )


def test_chip_stands_after_a_plain_text_trigger() -> None:
    """Prevents COPY after `<back>` from looking as if it came before; ROUTE counts its kept tokens."""
    found = rollout("a<back>b</back>", words(1, 2), Visual(image=0, keep=(1, 5, 9)), words(3))
    assert "a<back>⟦image 0: 3 of 16 tokens⟧b</back>" in order(rollout_html(found))


@pytest.mark.parametrize("text", ["no tag", "<back>a<back>", "<think>a</think><answer>b</answer>"])
def test_chips_are_listed_where_the_place_is_unknown(text: str) -> None:
    """Prevents a guess: no tag, another count, or several tags that could be meant."""
    page = order(rollout_html(rollout(text, words(1, 2), Visual(image=0), words(3))))
    assert text in page
    assert "Inserted⟦image 0: all 16 tokens⟧ after 2 tokens" in page


def test_the_usual_trigger_wins_and_a_given_one_decides() -> None:
    """Prevents the list view in the common case of `<think>` and `<back>` once each."""
    found = rollout("<think>a<back>b", words(1), Visual(image=0), words(3))
    assert "<think>a<back>⟦" in order(rollout_html(found))
    assert "<think>⟦" in order(rollout_html(found, trigger="<think>"))
    assert "Inserted⟦" in order(rollout_html(found, trigger="<none>"))


def with_offsets(found: Rollout, *offsets: int) -> Rollout:
    return dataclasses.replace(found, offsets=offsets)


def test_a_rollout_with_offsets_knows_the_places() -> None:
    """Prevents a guess, and the list, where it is known at which character each token begins: two tags
    that could be meant, a trigger that is no tag, blocks of both kinds, one at the very end."""
    found = rollout("<think>so</think>see", words(1, 2), Visual(image=0), words(3, 4), Visual(image=0))
    page = order(rollout_html(with_offsets(found, 0, 7, 9, 17)))
    assert "<think>so⟦image 0: all 16 tokens⟧</think>see⟦image 0: all 16 tokens⟧" in page
    assert "Inserted" not in page


def test_a_block_inside_of_a_tag_is_shown_there() -> None:
    """Prevents a block that vanishes, or text that is shown twice, where a token holds the end of one tag
    and the beginning of the next: `><`."""
    found = rollout("<think>a</think><back>b", words(1, 2), Visual(image=0, before_sampled=True), words(3))
    page = order(rollout_html(with_offsets(found, 0, 9, 15)))
    assert "<think>a</think⟦image 0: all 16 tokens⟧><back>b" in page


@given(st.text(alphabet="<>/back ", max_size=30), st.data())
def test_blocks_anywhere_leave_the_text_as_it_is(text: str, data: st.DataObject) -> None:
    """Prevents characters lost or doubled around blocks, wherever tokens begin."""
    offsets = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=6)))
    spans = [span for i in range(len(offsets)) for span in (words(i), Visual(image=0))]
    page = order(rollout_html(with_offsets(rollout(text, *spans), *offsets)))
    label = "⟦image 0: all 16 tokens⟧"
    assert page.count(label) == len(offsets)
    assert page.replace(label, "").endswith(f"{text}stop: eos · {len(offsets)} sampled tokens")


def test_what_a_block_holds() -> None:
    """Prevents ROUTE from looking like COPY on the terminal and in notebooks."""
    grids = (Grid(1, 4, 4), Grid(1, 2, 3))
    assert block_label(Visual(image=1, keep=(0, 5)), grids) == "image 1: 2 of 6 tokens"
    assert block_label(Visual(image=0), grids) == "image 0: all 16 tokens"


def test_the_chosen_cells_are_the_ones_in_colour() -> None:
    """Prevents rows and columns from being exchanged in the picture of what ROUTE chose. The page is red,
    300 x 100 with 2 rows of 4 cells; cells 3 and 4 are the right end of the first, the left of the second."""
    found = rollout("a", words(1), Visual(image=0, keep=(3, 4)), words(2), color="red")
    patches = Patches(pixels=torch.zeros(32, 3), grid=Grid(1, 2, 4))
    found = dataclasses.replace(found, prompt=dataclasses.replace(found.prompt, patches=(patches,)))
    _, data = re.findall(r"base64,([^']+)'", rollout_html(with_offsets(found, 0, 1)))
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (KEPT, KEPT // 3)
    red = [
        [shown.getpixel((6 + 12 * column, 4 + 8 * row)) == (255, 0, 0) for column in range(4)]
        for row in range(2)
    ]
    assert red == [[False, False, False, True], [True, False, False, False]]


def test_a_sample_without_gold_answer_shows_none() -> None:
    """Prevents an empty "Answer" over what the model answered."""
    found = rollout("x", words(1))
    bare = dataclasses.replace(found.prompt.sample, answer="")
    prompt = dataclasses.replace(found.prompt, sample=bare)
    assert "Answer" in order(rollout_html(found))
    assert "Answer" not in order(rollout_html(dataclasses.replace(found, prompt=prompt)))


def test_thumbnails_are_small() -> None:
    """Prevents notebooks of hundreds of megabytes: a picture is at most 96 pixels wide and high."""
    page = rollout_html(rollout("x", size=(2000, 1000)))
    (data,) = re.findall(r"base64,([^']+)'", page)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (96, 48)


def test_group_shows_the_question_once_and_unscored_ones() -> None:
    """Prevents the image from being repeated for each answer, and a failed reward shown as 0."""
    both = (rollout("one", words(1)), rollout("two", words(1)))
    group = ScoredGroup(
        rollouts=both, rewards=(0.25, 0.0), parts={"a": (1.0, math.nan)}, scored=(True, False)
    )
    page = group._repr_html_()
    assert page.count("<img") == 1
    shown = order(page)
    assert "#0 · reward 0.25 a 1one" in shown
    assert "#1 · not scored a –two" in shown
    assert "stop: eos · 1 sampled tokens" in shown
    assert "empty group" in group_html(ScoredGroup(rollouts=(), rewards=(), parts={}, scored=()))


@given(st.text(alphabet="<>/back _1"))
def test_pieces_are_the_text(text: str) -> None:
    """Prevents characters lost between tags."""
    assert "".join(piece.text for piece in pieces(text)) == text


def test_pieces_know_tags() -> None:
    """Prevents a comparison like `3<x and y>2` from being coloured as a tag."""
    assert [p.tag for p in pieces("<think>a</think> 3<x and y>2 <REFLECTION>")] == [
        "think",
        None,
        "think",
        None,
        "REFLECTION",
    ]
