"""The tasks without files: the same rows as the data sets', graded as in training."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval_files import replies, values
from reflectvlm.data import digits, shapes
from reflectvlm.data.images import load_image
from reflectvlm.eval.tasks.builtin import Digits, Shapes
from reflectvlm.eval.types import Task
from reflectvlm.rewards import Accuracy


@pytest.mark.parametrize("task", [Digits(size=12), Shapes(size=12)])
def test_rows_and_rule(task: Digits | Shapes) -> None:
    """Bug: evaluation and training disagree about what is right, or rows of the training split are asked."""
    items = task.load(Path("nowhere"))
    same = digits.Digits(split="test", size=12) if task.name == "digits" else shapes.shapes("test", 12)
    assert [(one.id, one.question, one.answer) for one in items] == [
        (one.id, one.question, one.answer) for one in same
    ]
    assert load_image(items[3].images[0], items[3].root).tobytes() == same[3].images[0].tobytes()
    texts = [rf"\boxed{{{one.answer}}}" for one in items[:-2]] + [items[-2].answer, r"\boxed{no}"]
    marks = task.marks(replies(items, *texts))
    assert values(marks) == [1.0] * 10 + [0.0, 0.0]
    found = task.summary(items, marks)
    assert (found.headline, found.values["accuracy"], found.unscored) == ("accuracy", 10 / 12, 0)
    kinds = {one.columns["kind"] for one in items}
    assert {f"accuracy/kind/{kind}" for kind in kinds} == set(found.values) - {"accuracy"}
    assert isinstance(task, Task)


def test_a_tag_may_hold_the_answer() -> None:
    """Bug: a model that answers in a tag scores 0 in every built-in task."""
    task = Digits(size=1, accuracy=Accuracy(answer_from="CONCLUSION"))
    (only,) = task.load(Path())
    assert values(task.marks(replies([only], f"<CONCLUSION>{only.answer}</CONCLUSION>"))) == [1.0]


def test_variants_and_their_names() -> None:
    """Bug: a split that does not exist is noticed after the model was loaded."""
    assert (Digits().name, Shapes(split="validation").name) == ("digits", "shapes_validation")
    assert len(Digits().load(Path())) == len(Shapes().load(Path())) == 400
    with pytest.raises(ValueError, match="Digits has no split 'x'"):
        Digits(split="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Shapes.size is 0"):
        Shapes(size=0)
