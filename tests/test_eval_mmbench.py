"""MMBench: what is read without a language model, what is asked of one, and what "circular" means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from eval_files import BLUE, RED, b64, colour_of, item, parquet, record, replies, tsv, values
from reflectvlm.eval.tasks.mmbench import MMBench, inferred
from reflectvlm.eval.types import Item, MissingData, Task

OPTIONS = {"A": "a dog", "B": "a cat", "C": "two birds", "D": "nothing"}

READINGS = [
    ("B", "B"), ("(B)", "B"), ("B. a cat", "B"), ("The answer is B.", "B"), ("**B**", "B"), ("a cat", "B"),
    ("a CAT", "B"), ("b", None), ("A or B", None), ("B and B", "B"), ("Z", "Z"), ("", None),
    ("a cat and a dog", None),  # two options' texts
    ("A cat, so B", "B"),  # A and B are letters: then the text
    ("A tomcat, so B", None),
    ("A cat", "A"),
    ("It is a cat", "B"),
    ("Answer:\nB", "B"), ("[C]", "C"), ("C/D", None), ("Birds!", None),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "letter"), READINGS)
def test_what_is_read_without_a_language_model(reply: str, letter: str | None) -> None:
    """Bug: a small "b", a letter in a word, or the first of two letters is taken for the answer."""
    assert inferred(reply, OPTIONS) == letter


def test_the_guards_since_2025() -> None:
    """Bug: a letter at the beginning of a long reply, or an option's text in one, counts as the answer."""
    early = "B is what I see at first in this picture"
    assert (inferred(early, OPTIONS), inferred(early, OPTIONS, guarded=False)) == (None, "B")
    # The options have 5 + 5 + 9 + 7 = 26 characters: a reply of 53 is too long.
    exact, long = "a cat" + "." * 47, "a cat" + "." * 48
    assert (inferred(exact, OPTIONS), inferred(long, OPTIONS)) == ("B", None)
    assert inferred(long, OPTIONS, guarded=False) == "B"
    four = "B is it then"  # among the last four words
    assert (inferred(four, OPTIONS), inferred("B " + "is it then now", OPTIONS)) == ("B", None)


def rotations(question: int = 7, **changed: object) -> list[Item]:
    letters = "ABCD"
    columns = {
        "question": question,
        "stem": "What?",
        "letters": tuple(letters),
        "category": "x",
        "l2-category": "y",
    }
    return [
        item(
            letter,
            id=str(question + 10**6 * turn),
            choices=tuple(OPTIONS.values()),
            columns={**columns, **changed},
        )
        for turn, letter in enumerate(letters)
    ]


def test_circular_wants_all_rotations() -> None:
    """Bug: the mean over rows is called circular."""
    items = [*rotations(7), *rotations(8, category="z")]
    task = MMBench()
    marks = task.marks(replies(items, "A", "B", "C", "D", "A", "B", "C", "A"))
    found = task.summary(items, marks)
    assert (found.headline, found.values["circular"], found.values["vanilla"]) == ("circular", 0.5, 7 / 8)
    assert found.values["circular/category/x"] == 1.0
    assert found.values["circular/category/z"] == 0.0
    assert found.values["circular/l2-category/y"] == 0.5
    assert MMBench(headline="vanilla").summary(items, marks).headline == "vanilla"


def test_without_a_language_model_the_rest_is_not_scored() -> None:
    """Bug: a row that only a language model could read is 0, or its question though all else is right."""
    items = [*rotations(7), *rotations(8)]
    task = MMBench()
    marks = task.marks(replies(items, "A", "B", "C", "no idea", "A", "A", "no idea", "D"))
    assert values(marks) == [1, 1, 1, None, 1, 0, None, 1]
    assert "without a language model" in marks[3].note
    found = task.summary(items, marks)
    # Question 7 is open. Question 8 is wrong whatever its open rotation is.
    assert (found.values["circular"], found.unscored) == (0.0, 2)
    assert found.values["vanilla"] == 5 / 6


class Model:
    """Answers every prompt the same."""

    def __init__(self, said: str | None) -> None:
        self.said, self.prompts = said, []

    def __call__(self, prompts: Sequence[str], /) -> list[str | None]:
        self.prompts += prompts
        return [self.said] * len(prompts)


@pytest.mark.parametrize(
    ("said", "value", "note"),
    [
        ("B", 1.0, "read by a language model"),
        ("C", 0.0, "read by a language model"),
        ("Z", 0.0, "read by a language model"),
        ("hm", None, "the language model named no option"),
        (None, None, "the language model gave no reply"),
    ],
)
def test_a_language_model_reads_the_rest(said: str | None, value: float | None, note: str) -> None:
    """Bug: what it does not know is drawn at random, as in VLMEvalKit, or counts as wrong."""
    one = rotations()[1]
    model = Model(said)
    (mark, known) = MMBench().marks(replies([one, one], "the tomcat", "B"), model)
    assert (mark.value, mark.note) == (value, note)
    assert known.value == 1.0
    (prompt,) = model.prompts  # it is asked about the first alone
    for part in ("What?", "B. a cat", "the tomcat"):
        assert part in prompt


def test_an_empty_reply_is_wrong() -> None:
    """Bug: a row whose image is missing leaves the denominator, or a language model guesses for it."""
    model = Model("B")
    (mark,) = MMBench().marks(replies(rotations()[1:2], " "), model)
    assert (mark.value, mark.note, model.prompts) == (0.0, "the reply is empty", [])
    (without,) = MMBench().marks(replies(rotations()[1:2], ""))
    assert without.value == 0.0


def row(index: int, answer: str, **changed: object) -> dict[str, object]:
    return {
        "index": index,
        "question": "What is it?",
        "hint": "Look left.",
        "A": "red",
        "B": "blue",
        "C": "",
        "D": "",
        "answer": answer,
        "category": "colour",
        "image": b64("blue"),
        "source": "x",
        "l2-category": "perception",
        "comment": "",
        "split": "dev",
        **changed,
    }


def test_the_table_and_the_hub(tmp_path: Path) -> None:
    """Bug: a rotation that only names its image has none; empty options are asked; "nan" is a hint."""
    rows = [
        row(1000007, "A", image="7", A="blue", B="red", hint=""),
        row(7, "B"),
        row(8, "A", image=b64("red")),
    ]
    tsv(tmp_path / "a/MMBench/MMBench_DEV_EN.tsv", rows)
    turned, main, other = MMBench().load(tmp_path / "a")
    assert (turned.id, turned.columns["question"], turned.question) == (
        "1000007",
        7,
        "What is it?\nA. blue\nB. red",
    )
    assert main.question == "Hint: Look left.\nWhat is it?\nA. red\nB. blue"
    assert (main.choices, main.columns["letters"]) == (("red", "blue"), ("A", "B"))
    assert (colour_of(turned), colour_of(main), colour_of(other)) == (BLUE, BLUE, RED)
    hub = [row(7, "B", image=record("blue"), C="nan", D="nan")]
    parquet(tmp_path / "b/MMBench/data/dev-00000-of-00001.parquet", hub)
    parquet(tmp_path / "c/MMBench/cn/data/dev-00000-of-00001.parquet", [row(9, "B", image=record())])
    (same,) = MMBench().load(tmp_path / "b")
    assert (same.question, same.answer, same.columns["l2-category"]) == (main.question, "B", "perception")
    assert colour_of(same) == BLUE
    (chinese,) = MMBench(language="cn").load(tmp_path / "c")
    assert (chinese.id, MMBench(language="cn", split="test").name) == ("9", "mmbench_test_cn")


def test_rows_without_answers_are_not_scored(tmp_path: Path) -> None:
    """Bug: the test split, whose answers are not public, scores 0."""
    parquet(tmp_path / "MMBench/data/test-00000-of-00001.parquet", [row(7, "nan", image=record())])
    (only,) = MMBench(split="test").load(tmp_path)
    (mark,) = MMBench(split="test").marks(replies([only], "A"))
    assert (mark.value, mark.note) == (None, "the answers of this split are not public")


def test_missing_and_several(tmp_path: Path) -> None:
    """Bug: one of two releases is evaluated without a word."""
    with pytest.raises(MissingData, match=r"MMBench/MMBench_DEV_EN\.tsv"):
        MMBench().load(tmp_path)
    for name in ("MMBench_DEV_EN.tsv", "MMBench_DEV_EN_V11.tsv"):
        tsv(tmp_path / "MMBench" / name, [row(7, "B")])
    with pytest.raises(
        ValueError, match=r"holds MMBench_DEV_EN.tsv, MMBench_DEV_EN_V11.tsv. Leave there the one"
    ):
        MMBench().load(tmp_path)
    with pytest.raises(ValueError, match=r"MMBench.headline is 'x'. It must be one of circular, vanilla"):
        MMBench(headline="x")  # type: ignore[arg-type]
    assert isinstance(MMBench(), Task)
