"""We-Math: the letter behind the last `Answer`, the four kinds of problems, the score."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from eval_files_maths import (
    picture,
    replies,
    stored,
    wemath_files,
    wemath_row,
    wemath_rows,
    write_json,
    write_parquet,
)
from reflectvlm.data.fetch import BadImage
from reflectvlm.data.images import load_image
from reflectvlm.eval.tasks.wemath import WeMath, _choices
from reflectvlm.eval.types import Item, Mark, MissingData, Task


def items(problems: list[tuple[str, int]], tmp_path: Path) -> list[Item]:
    wemath_files(tmp_path / "wemath", wemath_rows(problems))
    return WeMath().load(tmp_path)


LETTERS = [
    # (reply, letter that is read)
    ("<Thought process>: <<x>> <Answer>: <<A>>", "A"),
    ("Answer: A.", "A"),
    ("Answer: B. Answer: A", "A"),  # behind the last one
    ("Answer\n:A) 12", "A"),
    ("A", "A"),  # without the word the whole reply counts
    ("Area is 3", "A"),  # its first character, whatever it begins
    ("Answer: The letter A", ""),
    ("answer: A", ""),  # the word has a capital; the reply begins with a small letter
    (r"Answer: \boxed{A}", ""),
    ("Answer: a", ""),
    ("Answer: I", ""),  # letters go to H
    ("Answer", ""),
    ("", ""),
]


@pytest.mark.parametrize(("text", "letter"), LETTERS)
def test_the_letter_of_a_reply(text: str, letter: str, tmp_path: Path) -> None:
    """Bug: another text than the one behind the last `Answer` is read."""
    row = items([("p", 2)], tmp_path)[0]  # its gold answer is A
    (mark,) = WeMath().marks(replies([row], text))
    assert (mark.value, mark.answer) == (float(letter == "A"), letter)


def test_the_four_kinds_and_the_score(tmp_path: Path) -> None:
    """Bug: strict and loose are exchanged, or a kind is counted twice.

    Steps, whole ->  strict  loose
      1 1    1       CM      CM
      1 0    1       RM      CM
      0 0    1       RM      RM
      1 1    0       IG      IG
      1 0    0       IK      IK
      1 1 1  1       CM      CM
      1 0 1  1       RM      CM
      0 0 0  0       IK      IK
    """
    table = {
        "a": (1, 1, 1),
        "b": (1, 0, 1),
        "c": (0, 0, 1),
        "d": (1, 1, 0),
        "e": (1, 0, 0),
        "f": (1, 1, 1, 1),
        "g": (1, 0, 1, 1),
        "h": (0, 0, 0, 0),
    }
    rows = items([(name, len(parts) - 1) for name, parts in table.items()], tmp_path)
    marks = [Mark(value=float(part)) for parts in table.values() for part in parts]
    summary = WeMath().summary(rows, marks)
    assert summary.headline == "score_strict"
    values = dict(summary.values)
    assert values.pop("accuracy/domain/Calculation") == values["S1"]  # one domain of one concept
    assert values == {
        # 8 problems: CM 2, RM 3, IG 1, IK 2 -> (8 - 0.5 - 3 - 2) / 8
        "score_strict": 2.5 / 8,
        "IK": 2 / 8,
        "IG": 1 / 8,
        "CM_strict": 2 / 8,
        "RM_strict": 3 / 5,
        # CM 4, RM 1 -> (8 - 0.5 - 1 - 2) / 8
        "score_loose": 4.5 / 8,
        "CM_loose": 4 / 8,
        "RM_loose": 1 / 5,
        "problems": 8.0,
        "accuracy": pytest.approx(16 / 27),  # 5 x 3 + 3 x 4 rows, 16 ones in the table
        "S1": pytest.approx(11 / 19),  # steps: 2+1+0+2+1 of 10, 3+2+0 of 9
        "S2": 3 / 5,
        "S3": pytest.approx(2 / 3),
    }


def test_all_wrong_or_all_right(tmp_path: Path) -> None:
    """Bug: a rate over nothing ends the summary, as in the official script."""
    rows = items([("a", 2), ("b", 3)], tmp_path)
    wrong = WeMath().summary(rows, [Mark(value=0.0)] * 7).values
    assert (wrong["score_strict"], wrong["IK"], wrong["RM_strict"]) == (0.0, 1.0, None)
    right = WeMath().summary(rows, [Mark(value=1.0)] * 7).values
    assert (right["score_strict"], right["score_loose"], right["RM_loose"]) == (1.0, 1.0, 0.0)


def test_incomplete_problems_are_left_out(tmp_path: Path) -> None:
    """Bug: the first 100 rows of a trial run hold steps only, and every problem is rote memorisation."""
    rows = items([("a", 2), ("b", 2)], tmp_path)
    marks = [Mark(value=1.0)] * 5 + [Mark(value=None)]
    summary = WeMath().summary(rows, marks)
    assert (summary.values["problems"], summary.values["score_strict"], summary.unscored) == (1.0, 1.0, 1)
    short = WeMath().summary(rows[:2], marks[:2]).values
    assert (short["problems"], short["score_strict"], short["S1"]) == (0.0, None, 1.0)


def test_domains_are_means_over_concepts(tmp_path: Path) -> None:
    """Bug: a concept with many steps counts more than one with few."""
    rows = wemath_rows([("a", 3)])
    rows[2]["knowledge concept"] = "Area of Squares"
    wemath_files(tmp_path / "wemath", rows)
    nodes = [
        {"root2": "Calculation", "full node": "P_Calculation_Area of Circles"},
        {"root2": "Calculation", "full node": "P_Calculation_Area of Squares"},
    ]
    write_json(tmp_path / "wemath/knowledge_structure_nodes.json", nodes)
    loaded = WeMath().load(tmp_path)
    marks = [Mark(value=value) for value in (1.0, 0.0, 1.0, 0.0)]
    # circles: steps 1 and 2, a half; squares: step 3, one; the whole is no step
    assert WeMath().summary(loaded, marks).values["accuracy/domain/Calculation"] == 0.75


def test_the_files_and_what_is_asked(tmp_path: Path) -> None:
    """Bug: Look-Back's sentence is missing or is asked officially, or an image is looked for elsewhere."""
    wemath_files(tmp_path / "wemath", wemath_rows([("p", 2)]), nodes=False)
    picture(tmp_path / "wemath/2steps/image/p-2steps_1.png")
    one, two, _ = rows = WeMath().load(tmp_path)
    assert [row.id for row in rows] == ["p@2steps_1", "p@2steps_2", "p@2steps_multi"]
    options = "A. 3, 4;B. 400; C. 5;    D. No correct answer"
    assert one.question == f"What of p 2steps_1?\n\nOptions: {options}"
    assert (one.answer, one.choices) == ("A", ("3, 4", "400", "5", "No correct answer"))
    assert load_image(one.images[0], one.root).size == (4, 3)
    with pytest.raises(BadImage, match="does not exist"):
        load_image(two.images[0], two.root)
    marks = WeMath().marks(replies(rows, "Answer: A", "", "Answer: A"))
    summary = WeMath().summary(rows, marks)
    assert (summary.values["S1"], summary.values["RM_strict"]) == (0.5, 1.0)  # the missing image counts
    asked = WeMath(asked="lookback").load(tmp_path)[0].question
    assert asked == f"{one.question}\nYour final answer must be one of A, B, C, or D."


def test_look_backs_folder_and_the_hubs_table(tmp_path: Path) -> None:
    """Bug: images below `images`, or inside of the table, are not found."""
    wemath_files(tmp_path / "a/wemath", wemath_rows([("p", 2)]))
    picture(tmp_path / "a/wemath/images/2steps/image/p-2steps_1.png", 20)
    one = WeMath(asked="lookback").load(tmp_path / "a")[0]
    assert load_image(one.images[0], one.root).getpixel((0, 0)) == (20, 20, 20)
    row = {**wemath_row("p", "3steps_multi", "B"), "image_path": stored(30)}
    write_parquet(tmp_path / "b/wemath/data/testmini-00000-of-00001.parquet", [row])
    (one,) = WeMath().load(tmp_path / "b")
    assert (one.columns["part"], one.columns["steps"], one.answer) == ("multi", "3", "B")
    assert load_image(one.images[0], one.root).getpixel((0, 0)) == (30, 30, 30)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (
            "A. 1 cm;B. 1.5 cm;C. 3.14 cm.; D. No correct answer",
            ("1 cm", "1.5 cm", "3.14 cm.", "No correct answer"),
        ),
        ("A. B; B. C; C. D; D. E; E. No correct answer", ("B", "C", "D", "E", "No correct answer")),
        ("A. only", ("only",)),
        ("no letters", ()),
    ],
)
def test_options_in_one_text(options: str, texts: tuple[str, ...]) -> None:
    """Bug: an option that is itself a letter, or a number with a point, splits the list."""
    assert _choices(options) == texts


def test_missing_data_says_what_to_fetch(tmp_path: Path) -> None:
    """Bug: a user without the data reads a traceback."""
    with pytest.raises(MissingData, match=r"We-Math/We-Math(.*\n)*.*wemath/testmini\.json"):
        WeMath().load(tmp_path)
    task: Task = WeMath()
    assert task.name == "wemath"


def test_ten_thousand_hostile_replies_take_no_time(tmp_path: Path) -> None:
    """Bug: a step that is quadratic in a reply of 100 kB."""
    row = items([("p", 2)], tmp_path)[0]
    texts = ["Answer" * 16_000, "<" * 100_000, " " * 100_000] + ["Answer: A" + " x" * 500] * 10_000
    started = time.monotonic()
    WeMath().marks(replies([row] * len(texts), *texts))
    assert time.monotonic() - started < 30
