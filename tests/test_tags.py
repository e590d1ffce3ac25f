"""The strict layout parser: texts in, validity, reason and offsets out."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflectvlm.tags import Block, Layout, find_boxes, grpo, look_back, parse, qwen_la, tag_names

GOOD = r"<think>a</think> <back>b</back>" + "\n" + r"<think>c</think> \boxed{5}"
R = "<REFLECTION>x</REFLECTION>"
QWEN = "<SUMMARY>a</SUMMARY><CAPTION>b</CAPTION><REASONING>c</REASONING><CONCLUSION> 5 </CONCLUSION>"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD, ""),
        (GOOD + " \n", ""),
        (r"<think>a</think> <back>b</back> <think>c</think> \boxed{\frac{1}{2}}", ""),
        (r"<think>a < b and <b></think><back>b</back><think>c</think>\boxed{5}", ""),
        ("", "expected <think>, found no further block"),
        (r"\boxed{5}", "expected <think>, found no further block"),
        (r"<think>a</think> \boxed{5}", "expected <back>, found no further block"),
        (r"<think>a</think><think>c</think> \boxed{5}", "expected <back>, found <think>"),
        (r"<back>b</back><think>c</think> \boxed{5}", "expected <think>, found <back>"),
        (
            r"<think>a</think><back>b</back><back>b</back><think>c</think>\boxed{5}",
            "expected <think>, found <back>",
        ),
        (GOOD.replace(r"\boxed", r"<think>d</think>\boxed"), "expected the end, found <think>"),
        (r"<think>a<back>b</back></think><think>c</think>\boxed{5}", "<back> inside <think>: .*nested"),
        (r"<think>a<back></think>b</back><think>c</think>\boxed{5}", "<back> inside <think>: .*nested"),
        (r"<think>a</back>", "</back> inside <think>: .*overlap"),
        ("</think>" + GOOD, "</think> without <think>"),
        (GOOD + "<think>", "<think> is never closed"),
        (r"<think>a</think><back> </back><think>c</think>\boxed{5}", "<back> is empty"),
        (r"<think></think><back>b</back><think>c</think>\boxed{5}", "<think> is empty"),
        ("So " + GOOD, "text outside of the blocks at character 0"),
        (GOOD.replace("<back>", "well <back>"), "text outside of the blocks at character 16"),
        (GOOD.replace(r"\boxed", r"The answer is \boxed"), "text outside of the blocks"),
        (GOOD + ".", "text after"),
        (GOOD + r" \boxed{6}", "2 boxes"),
        (GOOD.replace("a<", r"\boxed{6}<"), "2 boxes"),
        (GOOD.replace("a<", r"\boxed{6<"), "2 boxes"),
        (GOOD.replace("{5}", "{}"), ".*is empty"),
        (GOOD.replace("{5}", "{5"), ".*never closed"),
        (GOOD.replace(r"\boxed{5}", "5"), r"no .boxed"),
        (r"\boxed{5}<think>a</think><back>b</back><think>c</think>", ".*before the end of the last block"),
        (r"<think>a</think><back>b</back><think>c \boxed{5}</think>", ".*before the end of the last block"),
        ("<Think>a</Think>" + GOOD, "text outside"),
    ],
)
def test_look_back_layout(text: str, problem: str) -> None:
    """A pattern such as `<think>.*</think>.*boxed` also pays for answers without any `<back>`."""
    parsed = parse(look_back(), text)
    assert parsed.valid == (problem == "")
    assert re.match(problem or "$", parsed.problem), parsed.problem
    assert (parsed.answer is None) == bool(problem)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (QWEN, True),
        (QWEN.replace("<CONCLUSION>", f"<REFLECTION></REFLECTION>{R} <CONCLUSION>"), True),
        (QWEN + R, True),
        (R + QWEN, False),
        (QWEN.replace("c</", f"{R}</"), False),
        (QWEN.replace("<CAPTION>b</CAPTION>", ""), False),
        (QWEN + QWEN, False),
        (QWEN.replace("CAPTION", "c").replace("REASONING", "CAPTION").replace("<c>", "<REASONING>"), False),
        (QWEN.replace("CAPTION", "c").replace("REASONING", "CAPTION").replace("c>", "REASONING>"), False),
        (QWEN.replace(" 5 ", " "), False),
        (QWEN + "bye", False),
        (QWEN + "<REFLECTION>", False),
    ],
)  # fmt: skip
def test_qwen_la_layout(text: str, valid: bool) -> None:
    """An empty reflection is legal, a repeated or missing block or one out of order is not."""
    parsed = parse(qwen_la(), text)
    assert parsed.valid == valid, parsed.problem
    assert parsed.answer == ("5" if valid else None)


def test_grpo_layout_has_no_back() -> None:
    """The baseline must not ask for `<back>`, and `<back>` is no tag to it."""
    assert parse(grpo(), r"<think>a <back>b</back></think> \boxed{5}").answer == "5"
    assert not parse(grpo(), r"\boxed{5}").valid
    assert tag_names(grpo()) == ("think",)
    assert tag_names(look_back("solution")) == ("think", "back")
    assert tag_names(qwen_la())[-1] == "REFLECTION"


def test_offsets_cut_out_the_blocks() -> None:
    """Offsets that are off by one shade the wrong tokens in every picture."""
    parsed = parse(look_back(), GOOD)
    assert [GOOD[b.start : b.end] for b in parsed.blocks] == [
        f"<{b.tag}>{b.content}</{b.tag}>" for b in parsed.blocks
    ]
    assert [b.tag for b in parsed.blocks] == ["think", "back", "think"]
    assert parsed.answer == "5"


def test_free_text_allows_words_before_the_box_only() -> None:
    """`free_text` is for models that write 'The answer is' - not for anything after the box."""
    layout = Layout(name="free", blocks=(Block("think"),), boxed=True, free_text=True)
    assert parse(layout, r"Well. <think>a</think> The answer is \boxed{5}").valid
    assert not parse(layout, r"<think>a</think> \boxed{5} indeed").valid


def test_optional_blocks_are_read_in_every_way() -> None:
    """A greedy reader takes the only <think> for the optional first one and then misses the last."""
    layout = Layout(name="opt", blocks=(Block("think", min=0), Block("back", min=0, max=2), Block("think")))
    block = "<{0}>x</{0}>".format
    sequences = ("t", "tt", "bt", "bbt", "tbbt", "bbbt", "tb", "ttt", "")
    texts = {s: "".join(block({"t": "think", "b": "back"}[tag]) for tag in s) for s in sequences}
    assert [s for s in sequences if parse(layout, texts[s]).valid] == ["t", "tt", "bt", "bbt", "tbbt"]


def test_floating_limits() -> None:
    """A wished number of reflections must count, not merely be allowed."""
    layout = Layout(name="f", blocks=(Block("A"),), floating=(Block("R", min=1, max=2),))
    r = "<R>x</R>"
    assert [parse(layout, "<A>a</A>" + r * n).valid for n in range(4)] == [False, True, True, False]


@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", "<back>", "</back>", "\\boxed{", "}", "x", " "]), max_size=14
    )
)
def test_valid_means_exactly_the_skeleton(pieces: list[str]) -> None:
    """Whatever is called valid must be rebuilt by think, back, think, box from its own blocks."""
    text = "".join(pieces)
    parsed = parse(look_back(), text)
    if parsed.valid:
        a, b, c = (block.content for block in parsed.blocks)
        rebuilt = f"<think>{a}</think><back>{b}</back><think>{c}</think>\\boxed{{{parsed.answer}}}"
        assert "".join(text.split()) == "".join(rebuilt.split())


@given(st.lists(st.text(alphabet="ab1+ ", min_size=1).filter(str.strip), min_size=4, max_size=4))
def test_every_filled_skeleton_is_valid(parts: list[str]) -> None:
    """The other direction: a parser that rejects everything passes all negative tests."""
    a, b, c, answer = parts
    parsed = parse(look_back(), f"<think>{a}</think> <back>{b}</back> <think>{c}</think> \\boxed{{{answer}}}")
    assert parsed.answer == answer.strip()


@pytest.mark.parametrize(
    "unit", ["<", "(", "{", "}", "\\boxed{", "<think>", "</back>", "<think></think>", "\\", " ", "\\boxed "]
)
def test_hostile_text_takes_linear_time(unit: str) -> None:
    """100 kB of brackets once took a backtracking pattern minutes, and a step of training with it."""
    start = time.thread_time()
    for layout in (look_back(), qwen_la()):
        assert not parse(layout, unit * (100_000 // len(unit))).valid
    assert time.thread_time() - start < 5


def test_nested_and_escaped_boxes() -> None:
    """Braces escaped in LaTeX sets must not close the box."""
    text = r"\boxed{\{1, 2\}} { \boxed{3} \boxed{4"
    assert [box.content(text) for box in find_boxes(text)] == [r"\{1, 2\}", "3"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: look_back("semntic"), "no variant 'semntic'.*Did you mean 'semantic'"),
        (lambda: Block("<back>"), "'<back>' is not a tag name.*without the angle brackets"),
        (lambda: Block("back", min=2), "min=2 and max=1"),
        (
            lambda: Layout(name="x", blocks=(Block("a"),), floating=(Block("a"),)),
            "both in blocks and in floating",
        ),
        (lambda: Layout(name="x", blocks=(Block("a"),), boxed=True, answer_tag="a"), "one place"),
        (lambda: Layout(name="x", blocks=(Block("a"),), answer_tag="b"), r"'b', which must stand.*\['a'\]"),
        (lambda: Layout(name="x", blocks=(Block("a"), Block("a", allow_empty=True))), "same allow_empty"),
    ],
)
def test_errors_name_the_remedy(make, message: str) -> None:  # type: ignore[no-untyped-def]
    """A typo in a layout must be told at construction, not by a reward that is always 0."""
    with pytest.raises(ValueError, match=message):
        make()
