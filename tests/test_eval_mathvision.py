r"""MATH-Vision: the answer in a reply, its cleaning, its comparison without `eval`, figures."""

from __future__ import annotations

import ast
import inspect
import signal
import time
from pathlib import Path

import pytest

from eval_files_maths import MATHVISION, mathvision_files, mathvision_hub, mathvision_table, replies
from reflectvlm.data.fetch import BadImage
from reflectvlm.data.images import load_image
from reflectvlm.eval.tasks import mathvision_answers
from reflectvlm.eval.tasks.mathvision import MathVision, _item
from reflectvlm.eval.tasks.mathvision_answers import answer_of, equality
from reflectvlm.eval.types import Mark, MissingData, Task
from reflectvlm.rewards import grading
from reflectvlm.rewards.maths import Equal

NUMBER, LETTER, OPTION = (_item(row, Path()) for row in MATHVISION)  # gold 6; D; B = \frac{1}{2}

ANSWERS = [
    # (reply, its answer, cleaned, in lower case)
    ("The ant stops at B.", "b"),  # ends with " B."
    ("It must be (C).", "c"),
    ("A\nbecause of the picture", "a"),
    ("(E)\nsince", "e"),
    ("(D) D\nsince", "d"),
    ("So the number of bricks is 12.", "12"),  # a number behind the last "is "
    ("This is it: x is -3.5", "-3.5"),
    ("The answer is (B), which is clear. Or not.", "b,whichisclear"),  # to the end of its sentence
    ("the final answer is 7 apples\nDone.", "7apples"),
    ("I think the answer should be:  5 km. Yes.", "5"),  # units and colons go
    ("The answer is 4. The correct answer is 9. It is.", "4"),  # cut before the later phrase is looked for
    ("the answer is 4, no: The correct answer is 9. It is.", "9"),  # each phrase in turn
    (r"We get \boxed{12}", "12"),
    (r"\boxed{1} and then \boxed{2}.", "2"),
    (r"the answer is 5 and \boxed{7}", "7"),  # with a box, phrases are not looked at
    (r"\boxed{}", r"\boxed"),  # an empty pair of braces is dropped before
    (r"\boxed{\frac{1}{2}} and } more", r"\frac{1}{2}}and"),  # from the first brace to the last one
    (r"\boxed{\text{B}}", "b"),
    (r"\boxed{(A)}", "a"),
    (r"x = 3 = \boxed{y = 4}", "4"),
    (r"\boxed{3 \approx 3.1}", "3.1"),
    (r"\boxed{30^{\circ}}", "30"),
    (r"\boxed{30^\circ}", "30"),
    (r"\boxed{5\,\mbox{cm}}", "5{cm}"),
    (r"\boxed{4m^3}", "4"),
    (r"\boxed{\left(1, 2\right)}", "(1,2)"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{\$5}", "5"),
    (r"\boxed{.5}", r"\frac{1}{2}"),  # 0.5 becomes a fraction
    (r"\boxed{1/2}", r"\frac{1}{2}"),
    (r"\boxed{01/2}", "01/2"),
    (r"\boxed{a/b}", "a/b"),
    (r"\boxed{\dfrac12}", r"\frac12"),  # braces are only put in beside a root
    (r"\boxed{\tfrac12\sqrt3}", r"\frac{1}{2}\sqrt{3}"),
    (r"\boxed{\sqrt3+\frac1{2}}", r"\sqrt{3}+\frac{1}{2}"),
    (r"\boxed{\sqrt3+\frac1}", r"\sqrt{3}+\frac1"),  # too little behind the fraction: left as it is
    ("∞", r"\infty"),
    ("+∞", r"\infty"),
    ("", ""),
    ("6", "6"),
    ("12 units", "12"),
]


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_the_answer_of_a_reply(text: str, answer: str) -> None:
    """Bug: one step of the official extraction is missing, or comes at another place."""
    assert answer_of(text) == answer


EQUAL = [
    # gold, answer, and whether they are equal
    ("6", "6", True),
    ("6", " 6 ", True),
    ("A", "a", True),  # in lower case
    ("6", "", False),
    ("", "6", False),  # an option that is not there equals nothing
    ("6", "6.004", True),  # two decimals
    ("6", "6.006", False),
    ("6", "7", False),
    (r"\frac{1}{2}", "0.5", True),
    ("3.14", r"\pi", True),
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("14", "2+3*4", True),
    ("(6,7)", "(2*3,5+2)", True),
    ("(1,2)", "(1,3)", False),
    ("(3,4)", "(3.0,4)", False),  # tuples are compared as texts: 3 and 3.0
    ("[0,3]", "[0,1+2]", True),
    ("[0,3]", "(0,3)", False),
    (r"(2,\infty)", r"(2.0,\infty)", False),
    (r"(1,\infty)", r"(3-2,\infty)", True),  # infinity is kept as it is
    ("(a,2)", "(a,1+1)", True),
    ("x+1", "1+x", False),  # letters have no value
    ("6", "six", False),
]


@pytest.mark.parametrize(("gold", "answer", "equal"), EQUAL)
def test_equality(gold: str, answer: str, equal: bool) -> None:
    """Bug: numbers, fractions or tuples are compared otherwise than officially."""
    found = equality(gold, answer)
    if isinstance(found, Equal):
        assert found.function == "mathvision_equal"
        found = grading.mathvision_equal(found.gold, found.answer, 5)
    assert found is equal


def test_a_tuple_with_a_part_that_has_no_value_stays_as_it_is() -> None:
    """Bug: two parts without a value are taken for the same one."""
    assert grading.mathvision_equal("(1,x)", "(1,y)", 5) is False
    assert grading.mathvision_equal("(1,x)", "(2-1,x)", 5) is False  # the official script gives up on x, too


def test_plain_answers_need_no_worker() -> None:
    """Bug: every reply costs a process some milliseconds, hostile ones seconds."""
    tower = "9**9**9**9"
    hopeless = [tower, "9^{9^{9}}", "9^{99999}", "99999!", "(" * 30 + "5" + ")" * 30, "1+" * 200 + "1", "x+1"]
    for answer in ("7", "6.0", "a", "thereare6bricks", *hopeless):
        assert isinstance(equality("6", answer), bool)
    assert equality("b", r"\frac{1}{2}") is False  # a letter has no value
    assert isinstance(equality("6", r"\frac{12}{2}"), Equal)


def test_a_formula_that_takes_too_long_is_wrong() -> None:
    """Bug: the time-out of the library ends the worker, or counts as right."""
    started = time.monotonic()
    assert grading.mathvision_equal("5", "9^{9^{9^9}}", 1) is False
    assert grading.mathvision_equal("5", "(" * 60 + "5" + ")" * 60, 1) is False
    assert grading.mathvision_equal("5", "\\frac{" * 40, 1) is False
    assert time.monotonic() - started < 30


def test_a_time_out_that_a_finaliser_swallows_comes_again() -> None:
    """Bug: the alarm rings inside a callback of the garbage collector, Python drops it, and nothing ends."""
    swallowed: list[BaseException] = []

    def compare() -> bool:
        try:
            time.sleep(9)
        except BaseException as dropped:  # noqa: BLE001 - what Python does in a finaliser
            swallowed.append(dropped)
        time.sleep(9)
        return True

    with pytest.raises(grading._Late):
        grading._in_time(compare, 0.1)
    assert len(swallowed) == 1
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_marks_by_answer_and_by_the_text_of_the_option() -> None:
    """Bug: only the letter counts, or the text of an option that is not gold does."""
    rows = [NUMBER, NUMBER, LETTER, LETTER, OPTION, OPTION, OPTION, OPTION]
    texts = [
        "It is 6.",
        "7",
        "(D)\nyes",
        "E",
        r"\boxed{B}",
        r"\boxed{0.5}",
        r"\boxed{\frac{2}{4}}",
        r"\boxed{6}",
    ]
    marks = MathVision().marks(replies(rows, *texts))
    assert [mark.value for mark in marks] == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    assert [mark.answer for mark in marks][:2] == ["6", "7"]


def test_a_killed_comparison_is_wrong_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: one hostile reply ends the scoring of all."""
    from reflectvlm.eval.tasks import settling
    from reflectvlm.rewards.isolation import RewardError

    monkeypatch.setattr(settling, "settle", lambda asked, _: [RewardError("timeout", "slow") for _ in asked])
    (mark,) = MathVision().marks(replies([NUMBER], r"\boxed{\frac{12}{2}}"))
    assert mark == Mark(value=0.0, answer=r"\frac{12}{2}", note="the comparison was given up (timeout)")
    monkeypatch.setattr(settling, "settle", lambda asked, _: [RewardError("load", "no sympy") for _ in asked])
    with pytest.raises(RewardError, match="no sympy"):
        MathVision().marks(replies([NUMBER], r"\boxed{\frac{12}{2}}"))


def test_figures_by_subject_and_level() -> None:
    """Bug: levels of one table are 3 and of the other 3.0."""
    marks = [Mark(value=value) for value in (1.0, 0.0, 1.0)]
    assert MathVision().summary([NUMBER, LETTER, OPTION], marks).values == {
        "accuracy": pytest.approx(2 / 3),
        "accuracy/subject/counting": 1.0,
        "accuracy/subject/logic": 0.5,
        "accuracy/level/1": 1.0,
        "accuracy/level/3": 0.0,
        "accuracy/subject and level/counting 1": 1.0,
        "accuracy/subject and level/logic 3": 0.0,
        "accuracy/subject and level/logic 1": 1.0,
    }


def test_the_official_files(tmp_path: Path) -> None:
    """Bug: options that stand in the picture are listed, or images are looked for beside the rows."""
    mathvision_files(tmp_path / "mathvision")
    one, two, three = items = MathVision().load(tmp_path)
    assert [row.id for row in items] == ["4", "6", "91"]
    assert (one.question, one.answer) == ("How many?\n<image1>", "6")
    assert (two.question, two.answer) == ("Which picture?\n<image1>", "D")
    assert three.question == "How long? <image1>\nChoices:\n(A) 6\n(B) \\frac{1}{2}"
    assert load_image(one.images[0], one.root).size == (4, 3)
    with pytest.raises(BadImage, match=r"6\.jpg"):
        load_image(two.images[0], two.root)
    marks = MathVision().marks(replies(items, "6", "", "B."))
    assert [mark.value for mark in marks] == [1.0, 0.0, 1.0]  # the missing image counts
    assert MathVision().summary(items, marks).values["accuracy"] == pytest.approx(2 / 3)


def test_the_hubs_table(tmp_path: Path) -> None:
    """Bug: the hub's levels, which are texts, or its images are not read."""
    mathvision_hub(tmp_path / "mathvision")
    mathvision_hub(tmp_path / "mathvision", "testmini")
    one, *_ = MathVision().load(tmp_path)
    assert one.columns["level"] == "1"
    assert load_image(one.images[0], one.root).getpixel((0, 0)) == (7, 7, 7)
    assert len(MathVision(split="testmini").load(tmp_path)) == 3
    assert MathVision(split="testmini").name == "mathvision_testmini"


def test_look_backs_table(tmp_path: Path) -> None:
    """Bug: it is asked the official question, or the images inside of the table are not found."""
    (tmp_path / "mathvision").mkdir()
    mathvision_table(tmp_path / "mathvision")
    one, two = MathVision(asked="lookback").load(tmp_path)
    assert (one.id, one.question, one.answer, one.images) == ("4", "How many?", "6", ("images/4.jpg",))
    assert (two.question, two.answer, two.columns["level"]) == ("Which?\nA. one", "D", "3")
    assert load_image(two.images[0], two.root).getpixel((0, 0)) == (5, 5, 5)


def test_the_tables_options_count(tmp_path: Path) -> None:
    """Bug: the column `choices` is not read, and the text of the gold option is wrong."""
    (tmp_path / "mathvision").mkdir()
    mathvision_table(tmp_path / "mathvision")
    task = MathVision(asked="lookback")
    one, two = task.load(tmp_path)
    assert (one.choices, two.choices) == ((), ("1", "2", "3", "40"))
    marks = task.marks(replies([two, two, two], r"\boxed{40}", r"\boxed{D}", r"\boxed{3}"))
    assert [mark.value for mark in marks] == [1.0, 1.0, 0.0]


def test_missing_data_says_what_to_fetch(tmp_path: Path) -> None:
    """Bug: a user without the data reads a traceback."""
    with pytest.raises(MissingData, match=r"MathLLMs/MathVision(.*\n)*.*mathvision/data/test\.jsonl"):
        MathVision().load(tmp_path)
    with pytest.raises(MissingData, match=r"MathVision\.tsv"):
        MathVision(asked="lookback").load(tmp_path)
    with pytest.raises(ValueError, match="Its table is the test set"):
        MathVision(asked="lookback", split="testmini")
    task: Task = MathVision()
    assert task.name == "mathvision"


def test_nothing_evaluates_a_reply() -> None:
    """Bug: `eval`, as in the official script, runs what a model writes."""
    for module in (mathvision_answers, grading):
        names = {
            node.id for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Name)
        }
        assert not names & {"eval", "exec", "compile", "parse_expr", "sympify"}
    assert equality("6", "__import__('os').getcwd()") is False


def test_ten_thousand_replies_are_marked_in_time() -> None:
    """Bug: hostile replies cost seconds each. 10,000 differ from each other, so no memory helps."""
    texts = [f"step {n}: the answer is {n % 12}" for n in range(9_000)]
    texts += [rf"\boxed{{\frac{{{n}}}{{2}}}}" for n in range(100)]
    texts += [f"9**9**9**{n}" for n in range(300)] + [rf"\boxed{{9^{{9^{{{n}}}}}}}" for n in range(300)]
    texts += [("(" * 100_000 + str(n)) for n in range(20)] + [r"\boxed{" * 14_000 + str(n) for n in range(20)]
    texts += ["the answer is " * 7_000 + str(n) for n in range(20)]
    rows = [NUMBER] * len(texts)
    started = time.monotonic()
    marks = MathVision().marks(replies(rows, *texts))
    assert time.monotonic() - started < 120
    # n % 12 is 6; \frac{12}{2}; and 7,000 times "the answer is ", then 6
    assert sum(mark.value == 1.0 for mark in marks) == 9_000 // 12 + 2
