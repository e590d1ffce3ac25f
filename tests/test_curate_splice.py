r"""Splices: what stands before the second look is the model's own, letter by letter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflectvlm.curate.splice import (
    Draft,
    before_conclusion,
    cut,
    draft,
    layout_of,
    sentence_ends,
    with_look,
    with_reflection,
    without_look,
)
from reflectvlm.tags import parse

WORDS = st.text(st.sampled_from("ab 1.?!\n,é数"), min_size=1, max_size=60)


@given(
    WORDS,
    WORDS,
    st.sampled_from(("{} \\boxed{{{}}}", "<think>{}</think> \\boxed{{{}}}", "{} $\\boxed{{{}}}$.")),
)
def test_the_reasoning_is_a_piece_of_the_answer_letter_by_letter(
    reasoning: str, answer: str, form: str
) -> None:
    """Bug: a splice tidies white space or quotes, and the trace trains on words the model never said."""
    text = form.format(reasoning, answer)
    found = draft(text)
    if isinstance(found, str):
        assert not reasoning.strip() or not answer.strip()
        return
    assert found.reasoning in text
    assert found.reasoning == reasoning.strip()
    assert found.answer == answer.strip()


@given(WORDS, st.floats(0, 1))
def test_a_cut_keeps_every_letter_and_leaves_something_to_say(reasoning: str, at: float) -> None:
    """Bug: a cut in the middle of a word, or behind the last sentence, so that nothing follows the look."""
    reasoning = reasoning.strip()
    place = cut(reasoning, at)
    if place is None:
        return
    assert reasoning[place:].strip()
    assert reasoning[:place].strip() or reasoning[0] in "。！？"
    kept = reasoning[:place]
    made = with_look(kept, "look", reasoning[place:].strip(), "7")
    assert made.text.startswith(f"<think>{kept}</think> <back>")
    assert made.kept == kept


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("Left 3. Right 4.", ("Left 3.",)),
        ("It is 3.5 cm. So 7.", ("It is 3.5 cm.",)),
        ("See Fig. 2 for it. Then add.", ("See Fig. 2 for it.",)),
        ("1. Read. 2. Add.", ("1. Read.",)),  # "2." follows a sentence on its line and ends none of its own
        ("one line\nanother", ("one line",)),
        ("左边是3。右边是4。", ("左边是3。",)),
        ('He said "so." Then.', ('He said "so."',)),
        ("only one", ()),
    ],
)
def test_sentences_end_where_a_reader_says(text: str, ends: tuple[str, ...]) -> None:
    """Bug: a decimal point, "Fig." or the number of a list splits a sentence in two."""
    found = tuple(text[:end] for end in sentence_ends(text))
    assert found[: len(ends)] == ends
    assert all(text[: text.find(bad) + len(bad)] not in found for bad in ("3.", "Fig.") if f"{bad}5" in text)


def test_a_cut_is_at_the_sentence_nearest_to_the_wanted_place() -> None:
    """Bug: `at` has no effect. The ends of the three sentences are at 2, 5 and (the text's) 8 of 8."""
    text = "A. B. C."
    assert [cut(text, at) for at in (0.0, 0.25, 0.5, 1.0)] == [2, 2, 5, 5]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no box at all", "not exactly one box"),
        ("\\boxed{1} or \\boxed{2}", "not exactly one box"),
        ("\\boxed{7}", "no reasoning"),
        ("So it is \\boxed{ }", "empty box"),
        ("Look <back>again</back> 7. \\boxed{7}", "tags in the answer"),
        ("<think>a \\boxed{7}</think> so", "box inside of the thought"),
        ("<think>a</think> <back>b</back> \\boxed{7}", "tags in the answer"),
    ],
)
def test_an_answer_that_has_no_place_for_a_look_says_why(text: str, why: str) -> None:
    """Bug: a trace with two boxes or nested blocks gets as far as the filters, which cannot tell why."""
    assert draft(text) == why


def test_what_a_box_is_set_in_is_not_reasoning() -> None:
    """Bug: a dollar sign or an opening \\[ is left hanging at the end of the thought."""
    assert draft("3 + 4 = 7. $\\boxed{7}$.") == Draft(reasoning="3 + 4 = 7.", answer="7")
    assert draft("3 + 4 = 7.\n\\[ \\boxed{7} \\]") == Draft(reasoning="3 + 4 = 7.", answer="7")


def test_splices_are_in_their_layouts() -> None:
    """Bug: a splice that the strict parser, the format reward and the filters call broken."""
    assert parse(layout_of("semantic_back"), with_look("a", "b", "c", "7").text).answer == "7"
    assert parse(layout_of("solution_back"), with_look("a", "b", "c", "7").text).valid
    assert without_look("a", "7").text == "<think>a</think> \\boxed{7}"


def test_a_reflection_stands_once_between_reasoning_and_conclusion() -> None:
    """Bug: the old conclusion survives beside the corrected one, or white space moves what was kept."""
    first = "<SUMMARY>s</SUMMARY> <CAPTION>c</CAPTION>\n<REASONING>r</REASONING><CONCLUSION>6</CONCLUSION>"
    kept = before_conclusion(first)
    assert kept == "<SUMMARY>s</SUMMARY> <CAPTION>c</CAPTION>\n<REASONING>r</REASONING>"
    made = with_reflection(kept, "It is 7.", "7")
    parsed = parse(layout_of("qwen_la"), made.text)
    assert (parsed.answer, [block.tag for block in parsed.blocks][3:]) == ("7", ["REFLECTION", "CONCLUSION"])
    assert made.text.startswith(made.kept)
    assert before_conclusion(made.text) is None, "it has a reflection already"
    assert before_conclusion("<SUMMARY>s</SUMMARY>") is None
