"""MMMU and MMMU-Pro: how an answer is found in a reply, oddities included, and how images are placed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_files import BLUE, RED, colour_of, item, parquet, record, replies, saved, values
from reflectvlm.eval.tasks.mmmu import MMMU, mmmu_item, with_images
from reflectvlm.eval.tasks.mmmu_answers import (
    choice,
    choice_pro,
    equals_open,
    normal_forms,
    numbers_in,
    open_answers,
)
from reflectvlm.eval.tasks.mmmu_pro import MMMUPro
from reflectvlm.eval.types import Mark, MissingData, Task

OPTIONS = ("red apple", "green pear", "blue plum", "white grape")

CHOICES = [
    ("B", "B"), ("B.", "B"), ("(B)", "B"), ("the answer is B", "B"), ("B is right", "B"),
    ("(A) or (C)", "C"),  # the last one
    ("(A) not B", "A"),  # brackets first, then single letters
    ("A then B then A", "A"),
    ("A cat and then D", "D"),
    ("I see one very blue plum in it", "C"),  # more than five words: the option's text
    ("first a BLUE plum, and then a green pear", "B"),
    ("'B'", "B"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "letter"), CHOICES)
def test_a_choice(reply: str, letter: str) -> None:
    """Bug: the first mention counts, or a letter in a word."""
    assert choice(reply, OPTIONS, "x") == (letter, False)


GUESSED = [
    "", "blue plum", "it is a blue plum", "Banana", "Answer: B)", r"\boxed{B}",
    "B\n\n(see above, nothing else)",
]  # fmt: skip


@pytest.mark.parametrize("reply", GUESSED)
def test_a_guess_is_the_rows_own(reply: str) -> None:
    """Bug: one unseeded or shared generator, so that a score changes with the order of the rows."""
    letter, guessed = choice(reply, OPTIONS, "validation_Art_1")
    assert guessed
    assert choice(reply, OPTIONS, "validation_Art_1") == (letter, True)
    drawn = {choice(reply, OPTIONS, f"validation_Art_{n}")[0] for n in range(40)}
    assert drawn == {"A", "B", "C", "D"}


def test_marks_do_not_depend_on_their_company() -> None:
    """Bug: resumed or reordered predictions are scored otherwise."""
    items = [item("A", id=f"r{n}", choices=OPTIONS) for n in range(12)]
    marks = MMMU().marks(replies(items, *["no idea"] * 12))
    back = MMMU().marks(replies(items[::-1], *["no idea"] * 12))
    assert marks == back[::-1]
    assert {mark.value for mark in marks} == {0.0, 1.0}
    assert "a guess" in marks[0].note


PRO = [
    ("So.\nAnswer: C", "C"), ("Answer: A\nNo. Answer: B", "B"),
    ("Answer: (D)", "D"),
    ("Answer: B or C (B)", "B"),  # two letters behind "Answer:": then brackets
    ("I think it is blue", "I"),  # "I " names option I: no space is asked for in front
    ("B. because", "B"), ("it is B. or so", "B"),
    ("(A) or (C)", "C"),
    ("xB yC (", "B"),  # found as "B " and "C ", but looked for as " B ": -1 and -1, the first wins
    ("either B or else C then", "C"),
    ("we see one very blue plum in it", "C"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "letter"), PRO)
def test_a_choice_of_mmmu_pro(reply: str, letter: str) -> None:
    """Bug: MMMU's rule is used, which has no "Answer:" and no "B."."""
    options = (*OPTIONS, *"efghij") if letter == "I" else OPTIONS
    assert choice_pro(reply, options, "x") == (letter, False)


def test_mmmu_pro_guesses_too() -> None:
    """Bug: a reply without an option is None, and the row leaves the mean."""
    letter, guessed = choice_pro("nothing", OPTIONS, "x")
    assert guessed
    assert letter in "ABCD"


OPEN = [
    ("The answer is 24/7", ["24/7"], True),
    ("so the result is 3.428", ["3.43"], True),  # numbers rounded to two places
    ("It is 3.43 exactly", ["3.4286"], True),  # and so is the gold answer
    ("x = 5", ["5"], True),  # "=" announces in the last line
    ("it is done\nx = 5\nall of it", ["5"], False),  # and only there
    ("1,234 in all", ["1234"], True),
    ("It is 1.5e3", ["1500"], True),
    ("The final answer is Paris.", ["paris"], True),
    ("Paris. The answer is Rome", ["Paris"], False),  # the shortest end alone
    ("I think it might be Paris", ["Paris"], True),  # nothing announces: the whole reply
    ("the answer is a", ["a"], True),
    ("it is a dog", ["a"], True),
    ("thus -0.5", ["-0.50"], True),
    ("", ["Paris"], False),
    ("is :", ["x"], False),  # a trivial end is none
    ("The answer is 12 m", ["12"], True),
    ("The answer is 5", ["4", "5"], True),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "golds", "right"), OPEN)
def test_an_open_answer(reply: str, golds: list[str], right: bool) -> None:
    """Bug: the whole reply is searched, so that every number on the way to the answer is right."""
    assert equals_open(golds, open_answers(reply)) is right


def test_sentences_are_lines_in_effect() -> None:
    """Bug: the published split at ". A" is repaired; it is tried after lower-casing and never splits."""
    assert open_answers("It is red. So it is five") == ["five"]
    assert open_answers("It is red\nSo it is five") == ["red", "five"]


NUMBERS = [
    ("1,234.5 and 12", ["1,234", "234.5", "12"]), ("-3 to .5", ["-3", ".5"]), ("2e10", ["2e10", "10"]),
    ("1.5e3x", ["1.5e3", "1"]),
    ("12,5", ["5"]), ("a1b", []), ("5-3", ["5", "-3"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "found"), NUMBERS)
def test_numbers(text: str, found: list[str]) -> None:
    """Bug: the patterns that were made linear find other numbers than the published ones."""
    assert sorted(set(numbers_in(text))) == sorted(set(found)) == sorted(set(published(text)))


def published(text: str) -> list[str]:
    """The three kinds of number as the rule describes them, in plain patterns that may backtrack."""
    import re

    return [
        *re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", text),
        *re.findall(r"-?\d+(?:\.\d+)?[eE][+-]?\d+", text),
        *re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", text),
    ]


@given(st.text(alphabet="0123456789.,eE+- xb", max_size=24))
def test_numbers_as_published(text: str) -> None:
    """Bug: as above, for texts nobody thought of."""
    assert numbers_in(text) == published(text)


@pytest.mark.parametrize(
    "text", ["1" * 100_000 + "x", "1," * 50_000, "(" * 100_000, "is " * 30_000, "1.1" * 30_000]
)
def test_long_replies_take_linear_time(text: str) -> None:
    """Bug: 100 kB of digits hold up a score for minutes."""
    start = time.thread_time()
    open_answers(text)
    choice(text, OPTIONS, "x")
    choice_pro(text, OPTIONS, "x")
    assert time.thread_time() - start < 5


def test_normal_forms() -> None:
    """Bug: python's float reads more than numbers: it raises nothing worse than a ValueError."""
    assert normal_forms(" 1,000.456 ") == [1000.46]
    assert normal_forms("A") == [" a", "a "]
    assert normal_forms("9" * 400) == [float("inf")]


def row(name: str = "validation_Art_Theory_7", **changed: object) -> dict[str, object]:
    images = {f"image_{n}": None for n in range(1, 8)}
    return {
        "id": name, "question": "Which is in <image 1>?", "options": "['red', \"blue's\"]", "explanation": "",
        **images, "image_1": record("red"), "img_type": "[]", "answer": "B", "topic_difficulty": "Easy",
        "question_type": "multiple-choice", "subfield": "x", **changed,
    }  # fmt: skip


def test_rows_by_subject(tmp_path: Path) -> None:
    """Bug: options are a text of a list, which splitting at commas breaks; subjects come from the id."""
    parquet(tmp_path / "MMMU/Art_Theory/validation-00000-of-00001.parquet", [row()])
    parquet(tmp_path / "MMMU/Art_Theory/test-00000-of-00001.parquet", [row("test_Art_Theory_1", answer="?")])
    given_open = row("validation_Math_3", options="[]", question_type="open", answer="['24/7', '3.429']")
    parquet(tmp_path / "MMMU/Math/validation-00000-of-00001.parquet", [given_open])
    art, maths = MMMU().load(tmp_path)
    assert (art.id, art.answer, art.choices) == ("validation_Art_Theory_7", "B", ("red", "blue's"))
    assert art.question == "Which is in <image>?\n(A) red\n(B) blue's"
    assert (art.columns["subject"], art.columns["domain"]) == ("Art_Theory", "Art and Design")
    assert maths.columns["golds"] == ("24/7", "3.429")
    assert colour_of(art) == RED
    task = MMMU()
    marks = task.marks(replies([art, maths], "(B)", "so it is 3.43"))
    found = task.summary([art, maths], marks)
    assert found.values["accuracy"] == 1.0
    assert found.values["accuracy/subject/Math"] == found.values["accuracy/domain/Science"] == 1.0
    assert found.values["accuracy/question_type/open"] == 1.0


def test_images_stand_where_they_are_first_named() -> None:
    """Bug: images in the order of their columns, which is not that of the markers; one shown twice."""
    made = row(question="Is <image 2> like <image 1>?", options="['<image 2>', '<image 3>']")
    made |= {"image_2": record("blue"), "image_3": record("green"), "image_4": record("black")}
    one = mmmu_item(made)
    assert one.question == "Is <image> like <image>?\n(A) image 2\n(B) <image>"
    assert [colour_of(one, n)[:1] for n in range(3)] == [(0,), (255,), (0,)]
    assert colour_of(one, 0) == BLUE
    assert one.question.count("<image>") == len(one.images) == 3
    assert with_images("no marker", made) == ("no marker", [1, 2, 3, 4])


def test_options_are_never_run() -> None:
    """Bug: `eval` of a column."""
    with pytest.raises(ValueError, match=r"The options of x are no list. Fetch the data again"):
        mmmu_item(row("x", options="__import__('os').getcwd()"))
    with pytest.raises(ValueError, match=r"The options of x are no list"):
        mmmu_item(row("x", options="(" * 100_000))


def test_splits_and_missing_data(tmp_path: Path) -> None:
    """Bug: dev rows are read as validation; nobody says what to fetch."""
    with pytest.raises(MissingData, match=r"(?s)MMMU/MMMU: MMMU/Accounting/validation-.*lmms-lab/MMMU"):
        MMMU().load(tmp_path)
    saved(tmp_path / "MMMU", "dev", [row("dev_Art_1")])
    (only,) = MMMU(split="dev").load(tmp_path)
    assert (only.id, MMMU(split="dev").name, MMMU().name) == ("dev_Art_1", "mmmu_dev", "mmmu")
    with pytest.raises(ValueError, match=r"MMMU.split is 'test'.*answers of the test split are not public"):
        MMMU(split="test")  # type: ignore[arg-type]
    assert isinstance(MMMU(), Task)
    assert isinstance(MMMUPro(), Task)


def pro(root: Path) -> None:
    plain = {key: value for key, value in row().items() if key not in ("question_type", "subfield")}
    ten = {
        **plain,
        "id": "test_History_1",
        "subject": "History",
        "options": str([f"o{n}" for n in range(10)]),
    }
    parquet(root / "standard (10 options)/test-00000-of-00002.parquet", [{**ten, "answer": "J"}])
    parquet(root / "standard (10 options)/test-00001-of-00002.parquet", [{**ten, "id": "test_History_2"}])
    parquet(
        root / "standard (4 options)/test-00000-of-00001.parquet",
        [{**plain, "id": "test_History_1", "subject": "History"}],
    )
    seen = {
        "id": "test_History_1",
        "image": record("blue"),
        "options": "['x', 'y']",
        "answer": "A",
        "subject": "History",
    }
    parquet(root / "vision/test-00000-of-00001.parquet", [seen])


def test_mmmu_pro_is_the_mean_of_two_settings(tmp_path: Path) -> None:
    """Bug: the mean over rows of three settings, or four options take part."""
    pro(tmp_path / "MMMU_Pro")
    task = MMMUPro()
    items = task.load(tmp_path)
    assert [one.id for one in items] == [
        "standard10/test_History_1",
        "standard10/test_History_2",
        "vision/test_History_1",
    ]
    assert len(items[0].choices) == 10
    assert colour_of(items[2]) == BLUE
    marks = task.marks(replies(items, "Answer: J", "Answer: A", "Answer: A"))
    assert values(marks) == [1, 0, 1]
    found = task.summary(items, marks)
    assert found.values["accuracy"] == 0.75  # (1/2 + 1) / 2, and over rows 2/3
    assert found.values["accuracy/standard10"] == 0.5
    assert found.values["accuracy/subject/History"] == 2 / 3
    half = task.summary(items, [*marks[:2], Mark(value=None)])
    assert (half.values["accuracy"], half.unscored) == (None, 1)
    (four,) = MMMUPro(setting="standard4").load(tmp_path)
    assert four.choices == ("red", "blue's")
    assert {MMMUPro(setting=s).name for s in ("overall", "vision")} == {"mmmu_pro", "mmmu_pro_vision"}


def test_mmmu_pro_says_which_setting_is_missing(tmp_path: Path) -> None:
    """Bug: the overall figure is that of one setting, because the other's folder is not there."""
    pro(tmp_path / "MMMU_Pro")
    (tmp_path / "MMMU_Pro/vision/test-00000-of-00001.parquet").unlink()
    with pytest.raises(MissingData, match=r"MMMU-Pro \(vision\).*\n.*MMMU_Pro/vision/test-"):
        MMMUPro().load(tmp_path)
    with pytest.raises(ValueError, match=r"MMMUPro.setting is 'x'. It must be one of overall, standard10"):
        MMMUPro(setting="x")  # type: ignore[arg-type]
