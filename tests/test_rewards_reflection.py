"""BRPO's rewards: the balance by hand, what counts as a reflection, and the rubric of three parts."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflectvlm.rewards import ReflectionBalance, Rubric, brpo_rubric, per_rollout
from reflectvlm.rewards.reflection import closed_blocks, tokens_inside
from reflectvlm.tags import Block, Layout, look_back, qwen_la
from reflectvlm.types import Prompt, Rollout, Sample, Text, Visual

TOKEN = re.compile(r"</?[A-Z]+>|.", re.DOTALL)
"""The tests' tokenizer: a tag in capitals is one token, as a special one is; else a character is one."""


def rollout(text: str, offsets: Sequence[int] | None = None, answer: str = "7") -> Rollout:
    begins = tuple(match.start() for match in TOKEN.finditer(text)) if offsets is None else tuple(offsets)
    prompt = Prompt(sample=Sample(id="s", question="", answer=answer), spans=())
    ids = tuple(range(len(begins)))
    return Rollout(
        prompt=prompt,
        spans=(Text(ids=ids, trained=True),) if ids else (),
        text=text,
        stop="eos",
        offsets=begins,
    )


def reflections(*tokens: int) -> str:
    return "".join(f"<REFLECTION>{'x' * n}</REFLECTION>" for n in tokens)


def balance(text: str, **settings: Any) -> float:
    (value,) = ReflectionBalance(**settings)([rollout(text)])
    return value


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((100,), 1.0),
        ((60, 140), 1.0),  # 200 / 2 = 100: the mean counts, not each one
        ((150,), 0.5),  # 1 - 50 / 100
        ((50,), 0.5),
        ((0,), 0.0),  # 1 - 100 / 100
        ((100, 0), 0.5),  # an empty one counts in N: 100 / 2 = 50
        ((100, 0, 0, 0), 0.25),  # 100 / 4 = 25: 1 - 75 / 100
        ((350,), -1.5),  # 1 - 250 / 100: no lowest value of its own
        ((), 0.0),
    ],
)
def test_the_papers_formula(tokens: tuple[int, ...], expected: float) -> None:
    """Bug: tags counted, empty reflections left out of N, L_total held against lambda without N."""
    assert balance(f"<REASONING>abc</REASONING>{reflections(*tokens)}<CONCLUSION>7</CONCLUSION>") == expected


def test_its_parameters() -> None:
    """Bug: a parameter that is shown in the recipe and does nothing."""
    assert balance(reflections(30), target_tokens=20) == 0.5  # 1 - 10 / 20
    assert balance("<back>abc</back>", tag="back", target_tokens=3) == 1.0
    assert balance("no reflection", none=-0.5) == -0.5
    assert balance("no reflection", none=-0.5, clip=(0, 1)) == -0.5
    assert balance(reflections(350), clip=(-1, 1)) == -1.0
    assert balance(reflections(100), clip=(-1, 0.5)) == 0.5
    assert balance(reflections(150), clip=[-1, 1]) == 0.5


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        ("a<REFLECTION>b</REFLECTION>c<REFLECTION></REFLECTION>", ["b", ""]),
        ("<REFLECTION> \n</REFLECTION>", [" \n"]),
        # Broken elsewhere: counted all the same.
        ("</SUMMARY><CAPTION><REFLECTION>b</REFLECTION>", ["b"]),
        # Unclosed, and a stray closing tag: none.
        ("<REFLECTION>b", []),
        ("b</REFLECTION>", []),
        ("</REFLECTION><REFLECTION>", []),
        ("<REFLECTION>b</REFLECTION><REFLECTION>c", ["b"]),
        ("<REFLECTION>b</REFLECTION>c</REFLECTION>", ["b"]),
        # Nested: the innermost alone; its neighbours in the outer one too.
        ("<REFLECTION>a<REFLECTION>b</REFLECTION>c</REFLECTION>", ["b"]),
        ("<REFLECTION>a<REFLECTION>b</REFLECTION>c<REFLECTION>d</REFLECTION></REFLECTION>", ["b", "d"]),
        # Overlap with another tag: that tag is text.
        ("<REFLECTION>a<CAPTION>b</REFLECTION>c</CAPTION>", ["a<CAPTION>b"]),
        # Another spelling is another tag.
        ("<reflection>a</reflection><REFLECTIONS>b</REFLECTIONS>< REFLECTION>c</REFLECTION>", []),
    ],
)
def test_what_counts_as_a_reflection(text: str, contents: list[str]) -> None:
    """Bug: N grows with opening tags that nothing closes, which would pay for writing them at will."""
    found = closed_blocks(text, "REFLECTION")
    assert [block.content for block in found] == contents
    for block in found:
        assert text[block.start : block.end] == f"<REFLECTION>{block.content}</REFLECTION>"


@given(st.lists(st.sampled_from(["<R>", "</R>", "<B>", "</B>", "x", "yy"]), max_size=20).map("".join))
def test_blocks_are_apart_and_hold_no_tag_of_their_own(text: str) -> None:
    """Bug: a token counted in two reflections."""
    found = closed_blocks(text, "R")
    assert all(one.end <= other.start for one, other in itertools.pairwise(found))
    assert all("R>" not in block.content for block in found)
    assert len(found) == len(re.findall(r"<R>(?:(?!<R>).)*?</R>", text))
    owner = rollout(text)
    for block in found:
        assert tokens_inside(owner, block) == len(TOKEN.findall(block.content))


def test_tokens_count_and_not_characters() -> None:
    """Bug: a length in characters. "<back>", "look", " at", " it.</", "back>": three tokens begin inside."""
    text = "<back>look at it.</back>"
    (value,) = ReflectionBalance(tag="back", target_tokens=3)([rollout(text, offsets=(0, 6, 10, 13, 19))])
    assert value == 1.0


def test_an_inserted_image_does_not_count() -> None:
    """Bug: a look at the image that is paid for as words."""
    text = "<REFLECTION>abcd</REFLECTION>"
    spans = (Visual(image=0), Text(ids=(1,) * 6, trained=True), Visual(image=0, keep=(1, 2)))
    prompt = Prompt(sample=Sample(id="s", question="", answer=""), spans=())
    looked = Rollout(prompt=prompt, spans=spans, text=text, stop="eos", offsets=rollout(text).offsets)
    assert ReflectionBalance(target_tokens=4)([looked]) == [1.0]


def test_a_rollout_that_cannot_say_where_its_tokens_begin() -> None:
    """Bug: 0 tokens in every reflection, silently."""
    with pytest.raises(ValueError, match="'s' does not say where its tokens begin"):
        ReflectionBalance()([rollout(reflections(3), offsets=())])


def test_many_reflections_take_no_time() -> None:
    """Bug: a scan from the start for each opening tag."""
    started = time.thread_time()
    assert closed_blocks("<REFLECTION>" * 100_000 + "x", "REFLECTION") == ()
    assert len(closed_blocks(reflections(0) * 50_000, "REFLECTION")) == 50_000
    assert time.thread_time() - started < 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_tokens": 0}, "target_tokens is 0. It must be a number of tokens above 0"),
        ({"target_tokens": float("nan")}, "target_tokens is nan"),
        ({"tag": "<REFLECTION>"}, "tag is '<REFLECTION>'. Write the block's name without brackets"),
        ({"tag": ""}, "tag is ''"),
        ({"none": float("inf")}, "none is inf"),
        ({"clip": (1, -1)}, r"clip is \[1, -1\]. Give the lowest and the highest"),
        ({"clip": (1,)}, r"clip is \[1\]"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReflectionBalance(**settings)


# -- the rubric -------------------------------------------------------------------------------------


def answer(reflection: str, conclusion: str = "7") -> str:
    return (
        "<SUMMARY>s</SUMMARY><CAPTION>c</CAPTION><REASONING>r</REASONING>"
        f"{reflection}<CONCLUSION>{conclusion}</CONCLUSION>"
    )


def test_brpo_adds_its_three_rewards() -> None:
    """Bug: the answer looked for in a box, or a weight on the wrong part."""
    texts = [answer(reflections(150)), answer("", "8"), answer(reflections(100)) + "text behind"]
    group = [rollout(text) for text in texts]
    scored = brpo_rubric()(group)
    assert scored.parts == {"accuracy": (1, 0, 1), "format": (1, 1, 0), "balance": (0.5, 0, 1)}
    assert scored.rewards == (2.5, 1.0, 2.0)
    assert scored.scored == (True, True, True)
    weighed = brpo_rubric(accuracy_weight=4, format_weight=2, balance_weight=10, target_tokens=150)(group)
    # Of 150 tokens wished for, 150 earn 1 and 100 earn 1 - 50 / 150.
    assert weighed.rewards == pytest.approx((16, 2, 4 + 10 * 2 / 3))
    limited = brpo_rubric(none=-1, clip=(-1, 0.25))(group)
    assert limited.parts["balance"] == (0.25, -1, 0.25)


def test_brpo_on_another_layout() -> None:
    """Bug: the paper's tag looked for in a layout that has none, so that the balance is always `none`."""
    boxed = Layout(name="boxed", blocks=(Block("T"),), floating=(Block("R", min=0, max=None),), boxed=True)
    (value,) = brpo_rubric(boxed, tag="R", target_tokens=2)([rollout("<T>x</T><R>ab</R> \\boxed{7}")]).rewards
    assert value == 3.0
    with pytest.raises(ValueError, match="balances <REFLECTION>, which layout 'look_back_semantic' does not"):
        brpo_rubric(look_back())


def test_brpo_takes_other_rewards() -> None:
    """Bug: an own accuracy or a further reward that is dropped, or one that hides a part."""
    length = per_rollout(lambda one: float(len(one.text)))
    rubric = brpo_rubric(
        qwen_la(),
        accuracy=per_rollout(lambda _: 0.25),
        extra={"length": length},
        extra_weights={"length": 0.0},
    )
    assert isinstance(rubric, Rubric)
    text = answer(reflections(100))
    scored = rubric([rollout(text)])
    assert scored.rewards == (2.25,)
    assert scored.parts["length"] == (len(text),)
    with pytest.raises(ValueError, match="extra reward called 'balance', which is a part of its own"):
        brpo_rubric(extra={"balance": length}, extra_weights={"balance": 1.0})
