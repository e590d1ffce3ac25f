"""Accuracy, format, length and the Look-Back reward: rollouts in, scores out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import jaxtyping
import pytest

from reflectvlm import rewards
from reflectvlm.rewards import (
    Accuracy,
    BackReward,
    Custom,
    LengthPenalty,
    SoftOverlong,
    TagFormat,
    answers,
    look_back_rubric,
    per_rollout,
)
from reflectvlm.tags import look_back, qwen_la
from reflectvlm.types import Prompt, Rollout, Sample, Text, Visual

GOOD = r"<think>a</think><back>b</back><think>c</think>\boxed{5}"
FACTS = [
    # (reply, gold, lenient published rule, strict)
    ("I give up.", "E", 1.0, 0.0),  # no box is the text "None", which holds an E
    ("I give up.", "N", 1.0, 0.0),
    ("I give up.", "A", 0.0, 0.0),
    (r"\boxed{None of the above}", "A", 1.0, 0.0),
    (r"\boxed{ABCD}", "C", 1.0, 0.0),
    (r"\boxed{Yes.}", "yes", 0.0, 1.0),
    (r"\boxed{four}", "4", 0.0, 0.0),
    (r"\boxed{4 cars}", "4", 1.0, 0.0),
    (r"\boxed{5} \boxed{6", "5", 0.0, 1.0),  # its last box is cut off, so it reads "None"
    (r"\boxed{0.5}", r"\frac{1}{2}", 1.0, 1.0),
]


@pytest.fixture
def untyped() -> Iterator[None]:
    """As a user runs it: tests check annotations at run time, which would hide the library's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def rollout(text: str, answer: str = "5", tokens: int = 1) -> Rollout:
    given = Text(ids=(0,) * tokens, trained=True, logprobs=(-0.1,) * tokens)
    sample = Sample(id="s", question="?", answer=answer)
    return Rollout(prompt=Prompt(sample=sample, spans=()), spans=(given,), text=text, stop="eos")


@pytest.mark.parametrize(("text", "gold", "lenient", "strict"), FACTS)
def test_strict_and_published_rule(text: str, gold: str, lenient: float, strict: float) -> None:
    """The published rule is kept with its oddities, and none of them leaks into the strict one."""
    assert Accuracy()([rollout(text, gold)]) == [strict]
    if all(find_spec(name) for name in ("mathruler", "pylatexenc")):
        assert Accuracy(rule="lookback")([rollout(text, gold)]) == [lenient]


def test_published_rule_without_mathruler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing optional package must be named before the run, not score everything 0."""
    monkeypatch.setattr(answers, "find_spec", lambda name: None if name == "mathruler" else object())
    with pytest.raises(
        ValueError, match=r"optional package.*mathruler.*pip install mathruler.*rule='strict'"
    ):
        Accuracy(rule="lookback")


def test_accuracy_reads_a_tag() -> None:
    """The answer of Qwen-LA stands in its conclusion; a box elsewhere is not the answer."""
    group = [
        rollout(text) for text in ("<CONCLUSION> 5 </CONCLUSION>", r"\boxed{5}", "<CONCLUSION>6</CONCLUSION>")
    ]
    assert Accuracy(answer_from="CONCLUSION")(group) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "numbr"}, "kind is 'numbr'.*Did you mean 'number'"),
        ({"rule": "lenient"}, r"rule is 'lenient', not one of \['strict', 'lookback'\]"),
        ({"timeout": 0.0}, "timeout is 0.0.*positive"),
        ({"answer_from": "<CONCLUSION>"}, "'<CONCLUSION>'.*without brackets"),
        ({"rule": "lookback", "kind": "text"}, "knows no kinds"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_accuracy_checks_its_fields(options: dict[str, object], message: str) -> None:
    """A misspelt option must not silently grade by another rule."""
    with pytest.raises(ValueError, match=message):
        Accuracy(**options)  # type: ignore[arg-type]


def test_empty_gold_answer_is_an_error() -> None:
    """Nothing equals an empty answer: 0 for all would look like a hard sample."""
    with pytest.raises(ValueError, match=r"Sample 's' has an empty gold answer"):
        Accuracy()([rollout(r"\boxed{5}", " ")])


def test_tag_format() -> None:
    """The format is about the layout only, right or wrong."""
    group = [rollout(GOOD), rollout(GOOD.replace("5", "6")), rollout(r"<think>a</think>\boxed{5}")]
    assert TagFormat(layout=look_back())(group) == [1.0, 1.0, 0.0]
    assert TagFormat(layout=qwen_la())(group) == [0.0, 0.0, 0.0]


def test_look_back_reward_and_rubric_agree() -> None:
    """R = 0.9 * accuracy + 0.1 * format: 1.0, 0.1 (wrong, good form), 0.9 (right, no back), 0."""
    group = [rollout(text) for text in (GOOD, GOOD.replace("5", "6"), r"\boxed{5}", "?")]
    expected = pytest.approx([1.0, 0.1, 0.9, 0.0])
    assert BackReward(layout=look_back())(group) == expected
    scored = look_back_rubric(look_back())(group)
    assert list(scored.rewards) == expected
    assert scored.parts == {"accuracy": (1.0, 0.0, 1.0, 0.0), "format": (1.0, 1.0, 0.0, 0.0)}
    with pytest.raises(ValueError, match=r"w=1.5.*\[0, 1\]"):
        look_back_rubric(look_back(), w=1.5)
    with pytest.raises(ValueError, match=r"w=-1.0"):
        BackReward(layout=look_back(), w=-1.0)


def test_look_back_rubric_with_further_rewards() -> None:
    """A recipe could not add a term to the paper's reward; R itself must stay as it is."""
    short = per_rollout(lambda _: 2.0)
    scored = look_back_rubric(look_back(), extra={"short": short}, extra_weights={"short": 0.1})(
        [rollout(GOOD)]
    )
    assert scored.rewards == pytest.approx((1.2,))  # 0.9 + 0.1 + 0.1 * 2
    assert list(scored.parts) == ["accuracy", "format", "short"]
    with pytest.raises(ValueError, match=r"extra reward called 'format'.*another name"):
        look_back_rubric(look_back(), extra={"format": short}, extra_weights={"format": 0.1})
    with pytest.raises(ValueError, match=r"rubric.weights lacks 'short'"):
        look_back_rubric(look_back(), extra={"short": short})


def test_an_accuracy_that_does_not_apply_leaves_the_format() -> None:
    """None from a TRL grader must not end the group with a TypeError: 0.1 * 1 remains."""
    silent = Custom(function=lambda texts: [None for _ in texts])
    reward = BackReward(layout=look_back(), accuracy=silent)
    rubric = look_back_rubric(look_back(), accuracy=silent)
    assert reward([rollout(GOOD)]) == list(rubric([rollout(GOOD)]).rewards) == [pytest.approx(0.1)]


def test_soft_overlong() -> None:
    """DAPO eq. 13 with limit 10 and buffer 4: free up to 6, (6 - 8)/4 = -0.5, -1 from 10 on."""
    reward = SoftOverlong(max_tokens=10, buffer=4)
    assert reward([rollout("", tokens=n) for n in (1, 6, 7, 8, 10, 30)]) == [
        0.0,
        0.0,
        -0.25,
        -0.5,
        -1.0,
        -1.0,
    ]
    with pytest.raises(ValueError, match="buffer=0 and max_tokens=10"):
        SoftOverlong(max_tokens=10, buffer=0)


def test_length_penalty() -> None:
    """Target 10, tolerance 2: |5 - 10| - 2 = 3 -> -0.3; |14 - 10| - 2 = 2 -> -0.2; never below -1."""
    reward = LengthPenalty(target=10, tolerance=2)
    assert reward([rollout("", tokens=n) for n in (5, 8, 12, 14, 99)]) == [-0.3, 0.0, 0.0, -0.2, -1.0]
    with pytest.raises(ValueError, match="target=0"):
        LengthPenalty(target=0)


def test_inserted_visual_tokens_have_no_length() -> None:
    """Looking at the image again must never be punished as length."""
    text = Text(ids=(1, 2), trained=True, logprobs=(-0.1, -0.1))
    base = rollout("")
    longer = Rollout(prompt=base.prompt, spans=(text, Visual(image=0), Text(ids=(7,))), text="", stop="eos")
    assert LengthPenalty(target=2)([longer]) == [0.0]


@pytest.mark.usefixtures("untyped")
def test_per_rollout_lifts_a_function() -> None:
    """The common case, a function of one answer, must need no loop over a group."""
    reward = per_rollout(lambda r: float(r.count("<back>")))
    assert reward([rollout(GOOD), rollout("")]) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"per_rollout needs a function.*got 3"):
        per_rollout(3)  # type: ignore[arg-type]


def test_package_is_light_and_complete() -> None:
    """Importing the rewards must not cost sympy, math-verify or transformers; nor a typo in a lazy name."""
    assert set(dir(rewards)) == {getattr(rewards, name).__name__ for name in rewards.__all__}
    with pytest.raises(AttributeError, match="no attribute 'Acuracy'"):
        rewards.Acuracy  # noqa: B018
    code = (
        "import sys; from reflectvlm.rewards import Accuracy, Custom, Rubric, TagFormat; Accuracy()\n"
        "assert not {'math_verify', 'sympy', 'transformers', 'mathruler'} & set(sys.modules)"
    ).replace("sympy", "latex2sympy2_extended")  # torch itself may import sympy
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
