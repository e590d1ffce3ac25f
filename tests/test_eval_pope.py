"""POPE: the first sentence decides, everything but a no is yes, and the share of yes is the model's."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval_files import GREEN, RED, colour_of, image, item, lines, parquet, record, replies, saved, values
from reflectvlm.eval.matching import Matched
from reflectvlm.eval.result import score_task
from reflectvlm.eval.scorers import Official, Strict
from reflectvlm.eval.tasks.pope import POPE, said
from reflectvlm.eval.types import Mark, MissingData, Task

READINGS = [
    ("Yes", "yes"), ("No", "no"), ("no", "no"), ("There is not a dog.", "no"), ("No, there is none.", "no"),
    ("It is a cat. No dog.", "yes"),  # the first sentence alone
    ("NO", "yes"),  # not one of the three words
    ("no\n", "yes"), ("none", "yes"), ("Unknown", "yes"), ("", "yes"), ("I can't say", "yes"),
    ("Yes, and not only one", "no"), ("(no)", "yes"), ("no.", "no"), ("not.", "no"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "found"), READINGS)
def test_the_official_reading(reply: str, found: str) -> None:
    """Bug: Unknown or an empty reply counts as No; or a no in the second sentence counts."""
    assert said(reply) == found


def asked(*labels: str, name: str = "random") -> list:
    return [item(label, id=f"{name}/{n}", columns={"set": name}) for n, label in enumerate(labels)]


def test_figures_of_one_set() -> None:
    """Bug: as in lmms-eval, the share of yes is taken from the labels: 0.5 whatever the model says."""
    items = asked("Yes", "Yes", "Yes", "No", "No", "No")
    task = POPE(subset="random")
    marks = task.marks(replies(items, "yes", "Yes.", "no", "yes", "yes", "No"))
    found = task.summary(items, marks)
    # TP 2, FN 1, FP 2, TN 1: precision 2/4, recall 2/3, F1 4/7, yes 4 of 6, labels 3 of 6.
    assert found.values["precision/random"] == 0.5
    assert found.values["recall/random"] == 2 / 3
    assert found.values["f1/random"] == pytest.approx(4 / 7)
    assert found.values["yes_ratio/random"] == 4 / 6
    assert found.values["accuracy"] == 0.5
    assert found.headline == "f1"


def test_the_headline_is_the_mean_of_three_f1() -> None:
    """Bug: F1 over all 9,000 rows at once, which is another number."""
    random, popular = asked("Yes", "No"), asked("Yes", "Yes", "No", "No", name="popular")
    task = POPE()
    items = [*random, *popular]
    marks = task.marks(replies(items, "yes", "no", "no", "yes", "yes", "yes"))
    found = task.summary(items, marks).values
    assert found["f1/random"] == 1.0
    assert found["f1/popular"] == pytest.approx(0.4)  # TP 1, FP 2, FN 1
    assert found["f1"] == pytest.approx(0.7)  # over all rows it would be 4/7


def test_another_scorers_unknown_is_wrong_everywhere() -> None:
    """Bug: as in VLMEvalKit, a reading that is neither is a No in F1 and wrong in accuracy."""
    items = asked("Yes", "No")
    found = POPE(subset="random").summary(items, [Mark(value=1.0, answer="Yes"), Mark(value=0.0, answer="?")])
    assert found.values["accuracy"] == 0.5
    # TP 1, and the second is a false yes, as of every wrong row whose label is No: F1 is 2 / (2 + 1).
    assert (found.values["yes_ratio/random"], found.values["precision/random"]) == (1.0, 0.5)
    assert found.values["f1/random"] == 2 / 3
    strict = [Mark(value=0.0, answer="yes"), Mark(value=None, note="?")]
    half = POPE(subset="random").summary(asked("No", "Yes"), strict)
    assert (half.values["yes_ratio/random"], half.unscored) == (1.0, 1)


def test_nobody_says_yes() -> None:
    """Bug: 0 / 0 ends the evaluation, as in the official script."""
    items = asked("Yes", "No")
    found = POPE(subset="random").summary(items, POPE().marks(replies(items, "no", "no"))).values
    assert (found["precision/random"], found["recall/random"], found["f1/random"]) == (None, 0.0, 0.0)


def test_an_empty_reply_stays_and_is_noted() -> None:
    """Bug: a row whose image is missing leaves the denominator."""
    marks = POPE().marks(replies(asked("Yes", "No"), "", ""))
    assert values(marks) == [1, 0]
    assert "takes for yes" in marks[0].note


def test_a_row_that_nobody_answered() -> None:
    """Bug: without its image a No is out of precision and F1, so that fewer images make a better score; or a
    Yes is right, because the official rule takes an empty text for yes."""
    items = asked("Yes", "No", "Yes", "No")
    given = {one.id: why for one, why in zip(items, ("", "", "gone", "gone"), strict=True) if why}
    matched = Matched(items, replies(items, "yes", "no", "", ""), 1, ())
    task = POPE(subset="random")
    found = score_task("pope", task, matched, given, [Official(), Strict()]).summaries
    # TP 1, FN 1 (the third), FP 1 (the fourth), TN 1
    values = found["official"].values
    assert (values["accuracy"], values["precision/random"], values["recall/random"]) == (0.5, 0.5, 0.5)
    assert (values["f1"], values["yes_ratio"]) == (0.5, 0.5)
    assert found["strict"].values["accuracy"] == 0.0
    for given_up, last in ((given, ""), ({}, r"\boxed{maybe}")):
        texts = (r"\boxed{yes}", r"\boxed{no}", "" if given_up else r"\boxed{no}", last)
        boxed = Matched(items, replies(items, *texts), 1, ())
        strict = score_task("pope", task, boxed, given_up, [Strict()]).summaries["strict"].values
        assert (strict["accuracy"], strict["precision/random"], strict["f1"]) == (0.5, 0.5, 0.5)
    # Left empty by the model itself: yes, as officially.
    empty = score_task("pope", task, matched, {}, [Official()]).summaries["official"].values
    assert (empty["accuracy"], empty["recall/random"], empty["precision/random"]) == (0.75, 1.0, 2 / 3)


def release(root: Path) -> None:
    for name in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": f"COCO_val2014_{n}.jpg", "text": f"Is there a {thing} in the image?",
             "label": label} for n, (thing, label) in enumerate([("cat", "yes"), ("dog", "no")], start=1)
        ]  # fmt: skip
        lines(root / f"coco_pope_{name}.json", rows)
    image(root / "val2014/COCO_val2014_1.jpg", "green")


def hub() -> list[dict[str, object]]:
    return [
        {"id": "0", "question_id": str(n), "question": f"Is there a {thing} in the image?", "answer": label,
         "image_source": f"COCO_val2014_{n}", "image": record("green"), "category": name}
        for name in ("adversarial", "popular", "random")
        for n, (thing, label) in enumerate([("cat", "yes"), ("dog", "no")], start=1)
    ]  # fmt: skip


def test_release_and_hub_are_the_same_rows(tmp_path: Path) -> None:
    """Bug: another order, other ids or a label that is spelt otherwise."""
    release(tmp_path / "a/POPE")
    release(tmp_path / "b/POPE/output/coco")
    parquet(tmp_path / "c/POPE/data/test-00000-of-00001.parquet", hub())
    for name in ("random", "popular", "adversarial"):
        rows = [row for row in hub() if row["category"] == name]
        parquet(tmp_path / f"d/POPE/Full/{name}-00000-of-00001.parquet", rows)
    saved(tmp_path / "e/POPE", "test", hub())
    forms = {form: POPE().load(tmp_path / form) for form in "abcde"}
    first = [(one.id, one.question, one.answer, one.columns["set"]) for one in forms["a"]]
    assert first[0] == ("random/1", "Is there a cat in the image?", "Yes", "random")
    assert len(first) == 6
    for items in forms.values():
        assert [(one.id, one.question, one.answer, one.columns["set"]) for one in items] == first
    assert {colour_of(forms[form][0]) for form in "cde"} == {GREEN}
    assert colour_of(forms["a"][0])[0] < 20  # JPEG's name, PNG's bytes: read by content
    assert [one.id for one in POPE(subset="popular").load(tmp_path / "a")] == ["popular/1", "popular/2"]
    assert RED != GREEN


def test_missing_data_and_bad_labels(tmp_path: Path) -> None:
    """Bug: a set that is not there is left out of the mean without a word."""
    with pytest.raises(
        MissingData, match=r"(?s)POPE \(random\).*coco_pope_random\.json.*val2014.*lmms-lab/POPE"
    ):
        POPE().load(tmp_path)
    release(tmp_path / "POPE")
    (tmp_path / "POPE/coco_pope_adversarial.json").unlink()
    with pytest.raises(MissingData, match=r"POPE \(adversarial\)"):
        POPE().load(tmp_path)
    lines(
        tmp_path / "POPE/coco_pope_adversarial.json",
        [{"question_id": 1, "image": "x", "text": "?", "label": "x"}],
    )
    with pytest.raises(ValueError, match=r"coco_pope_adversarial.json:1: the label is 'X', not yes or no"):
        POPE().load(tmp_path)
    with pytest.raises(ValueError, match=r"POPE.subset is 'x'. It must be one of all, random"):
        POPE(subset="x")  # type: ignore[arg-type]
    assert isinstance(POPE(), Task)
