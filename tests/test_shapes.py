"""The coloured-shapes task: right answers, pictures that show them, splits that share nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflectvlm.data.shapes import COLOURS, KINDS, SHAPES, Split, shapes
from reflectvlm.types import Sample

settings_of_a_sample = st.tuples(
    st.sampled_from(get_args(Split)),
    st.integers(0, 10**6 - 1),  # number of the sample
    st.integers(0, 3),  # seed
    st.sampled_from([24, 64, 100]),  # image size
    st.sampled_from([1, 2, 3, 9]),  # most objects
)


def made(settings: tuple[Split, int, int, int, int]) -> Sample:
    split, index, seed, side, most = settings
    return shapes(split, 10**6, seed, side, most)[index]


def answer(question: str, things: list[dict[str, Any]]) -> str:
    """The answer worked out once more, from the words of the question and the boxes."""
    words = question.rstrip("?").split()
    colours = [thing["colour"] for thing in things]
    kinds = [thing["shape"] for thing in things]
    if question.startswith("How many"):
        word = words[2].removesuffix("s")
        return str((colours + kinds).count(word))
    if question.startswith("What colour"):
        (thing,) = [thing for thing in things if thing["shape"] == words[-1]]
        return str(thing["colour"])
    if question.startswith("Are there more"):
        return "yes" if kinds.count(words[3][:-1]) > kinds.count(words[5][:-1]) else "no"
    # "Is the red circle left of the blue square", "… above the blue square"
    side = 0 if "left" in words else 1
    (one,) = [thing for thing in things if [thing["colour"], thing["shape"]] == words[2:4]]
    (other,) = [thing for thing in things if [thing["colour"], thing["shape"]] == words[-2:]]
    return "yes" if one["box"][side] < other["box"][side] else "no"


@settings(max_examples=200, deadline=None)
@given(settings_of_a_sample)
def test_answers_are_right(picked: tuple[Split, int, int, int, int]) -> None:
    """A wrong gold answer rewards the wrong rollouts."""
    sample = made(picked)
    assert answer(sample.question, list(sample.columns["objects"])) == sample.answer


@settings(max_examples=200, deadline=None)
@given(settings_of_a_sample)
def test_pictures_show_the_objects(picked: tuple[Split, int, int, int, int]) -> None:
    """A shape outside its box, under another or not drawn at all."""
    sample = made(picked)
    pixels = np.asarray(sample.images[0]).astype(int)
    rest = pixels.copy()
    for thing in sample.columns["objects"]:
        left, top, right, bottom = thing["box"]
        assert 0 <= left < right <= pixels.shape[1]
        assert 0 <= top < bottom <= pixels.shape[0]
        inside = pixels[top:bottom, left:right]
        drawn = (inside == COLOURS[thing["colour"]]).all(-1)
        # area of a triangle 1/2, of a circle 0.785, of a square 1; small ones are coarse
        low, high = {"triangle": (0.35, 0.75), "circle": (0.6, 0.95), "square": (1, 1)}[thing["shape"]]
        if right - left >= 8:
            assert low <= drawn.mean() <= high
        assert drawn.any(0).all()
        assert drawn[-1].any()
        rest[top:bottom, left:right] = 255
    assert (rest == 255).all()


@settings(max_examples=200, deadline=None)
@given(settings_of_a_sample)
def test_facts_hold_the_answer(picked: tuple[Split, int, int, int, int]) -> None:
    """Facts feed example traces: false ones teach to see what is not there."""
    sample = made(picked)
    facts = sample.columns["facts"]
    things = sample.columns["objects"]
    names = {f"{thing['colour']} {thing['shape']}" for thing in things}
    assert facts
    for fact in facts:
        assert fact.endswith(".")
        for colour in COLOURS:
            for shape in SHAPES:
                if f"{colour} {shape} is" in fact:
                    assert f"{colour} {shape}" in names
    kind = sample.columns["kind"]
    if kind.startswith("count") and sample.answer != "0":
        assert len(facts) == int(sample.answer) + 1
        assert facts[-1].endswith(f" {sample.answer}.")
    if kind == "colour_of":
        assert facts[-1] == f"It is {sample.answer}."


def scene(sample: Sample) -> frozenset[tuple[Any, ...]]:
    return frozenset((thing["cell"], thing["colour"], thing["shape"]) for thing in sample.columns["objects"])


def test_splits_share_no_scene() -> None:
    """A test picture seen in training, also under another seed; small scenes collide most."""
    seen = {
        split: {
            scene(sample)
            for seed in (0, 1)
            for sample in shapes(split, size=400, seed=seed, max_objects=2, image_size=24)
        }
        for split in get_args(Split)
    }
    assert all(len(scenes) > 30 for scenes in seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_same_sample_every_time() -> None:
    """Python's hash of a text changes from run to run, and a resumed run must see the same data."""
    sample = shapes(seed=3, size=50)[7]
    again = shapes(seed=3)[7]
    assert (sample.id, sample.question, sample.columns) == (again.id, again.question, again.columns)
    assert sample.images[0].tobytes() == again.images[0].tobytes()
    # Recorded once; another number means that every published run changes.
    first = shapes()[0]
    assert (first.id, first.question, first.answer) == (
        "shapes-train-0-0",
        "Is the purple circle above the black square?",
        "no",
    )
    assert shapes(seed=4)[7].question != sample.question or scene(shapes(seed=4)[7]) != scene(sample)


def test_kinds_and_answers_are_balanced() -> None:
    """A policy that always says "yes" or "1" must not score well."""
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for sample in shapes("validation", image_size=24):
        answers[sample.columns["kind"]][sample.answer] += 1
    total = sum(answers.values(), Counter())
    assert total.most_common(1)[0][1] < 0.45 * 1000
    for kind, counts in answers.items():
        assert 120 < counts.total() < 220, kind  # 1000 / 6 = 167, three sigma 35
        assert counts.most_common(1)[0][1] < 0.75 * counts.total(), kind


def test_one_object_has_no_relations() -> None:
    """A question about two shapes cannot be drawn with one, and the search would never end."""
    kinds = {sample.columns["kind"] for sample in shapes("test", size=60, max_objects=1)}
    assert kinds == set(KINDS) - {"left_of", "above"}


def test_sequence() -> None:
    """Unlimited training data still ends, counts from the end and can be sliced."""
    train, validation = shapes(), shapes("validation")
    assert (len(train), len(validation)) == (2**31, 1000)
    assert train[-1].id == f"shapes-train-0-{2**31 - 1}"
    assert [sample.id[-3:] for sample in validation[997:]] == ["997", "998", "999"]
    assert len(list(shapes("test", size=3))) == 3
    with pytest.raises(IndexError, match=r"no number 1000"):
        validation[1000]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"size": 0}, "size is 0. It must be at least 1"),
        ({"image_size": 8}, "image_size is 8. It must be 24 to 4096"),
        ({"max_objects": 10}, "max_objects is 10. It must be 1 to 9"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], match: str) -> None:
    """Ten shapes do not fit into nine cells: `sample` would raise far from the cause."""
    with pytest.raises(ValueError, match=match):
        shapes(**wrong)


def test_wrong_split() -> None:
    """A recipe can name any split; the type checks that run in tests must be stepped around here."""
    data = shapes()
    object.__setattr__(data, "split", "dev")
    with pytest.raises(ValueError, match=r"split is 'dev'. It must be one of train, validation, test"):
        data.__post_init__()
