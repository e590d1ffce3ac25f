"""The built-in task: right answers, fixed rows, and splits that share no scan."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from fixtures import tokenizer
from reflectvlm.config import compose
from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import _SCANS, KINDS, PLACES, Digits, _scans, conclude
from reflectvlm.rewards import Accuracy, TagFormat
from reflectvlm.tags import layout_tags, qwen_la
from reflectvlm.types import Prompt, Rollout, Sample

PLACE = {name: i for i, name in enumerate(("upper left", "upper right", "lower left", "lower right"))}
SIDES = {"upper": (0, 1), "lower": (2, 3), "left": (0, 2), "right": (1, 3)}


def solve(question: str, digits: tuple[int | None, ...]) -> int:
    """The answer from the question's words and the page alone."""
    if found := re.fullmatch(r"What is the (\w+ \w+) digit\?", question):
        value = digits[PLACE[found[1]]]
        assert value is not None
        return value
    if found := re.fullmatch(r"Which is larger, the (\w+ \w+) or the (\w+ \w+) digit\?", question):
        pair = [digits[PLACE[found[i]]] for i in (1, 2)]
        assert None not in pair
        return max(d for d in pair if d is not None)
    if found := re.fullmatch(r"How many (\d)s are there\?", question):
        return sum(d == int(found[1]) for d in digits)
    if found := re.fullmatch(r"How many digits are larger than (\d)\?", question):
        return sum(d is not None and d > int(found[1]) for d in digits)
    found = re.fullmatch(r"(Add|What is the difference of) the two (?:(\w+) )?digits[.?]", question)
    assert found, question
    asked = [digits[i] for i in (SIDES[found[2]] if found[2] else range(4))]
    values = [d for d in asked if d is not None]
    assert len(values) == 2, "the question does not say which two"
    return sum(values) if found[1] == "Add" else abs(values[0] - values[1])


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: str) -> None:
    """A wrong gold answer rewards misreading."""
    for filled in ((2, 3, 4), (2,), (4,)):
        for sample in Digits(size=60, kinds=(kind,), filled=filled, seed=3)[:]:
            digits = sample.columns["digits"]
            assert sample.answer == str(solve(sample.question, digits)), sample.question
            assert sample.columns["kind"] == kind
            assert sum(d is not None for d in digits) in filled


def test_every_kind_and_place_is_asked() -> None:
    rows = Digits(size=300)[:]
    assert {row.columns["kind"] for row in rows} == set(KINDS)
    assert {place for row in rows if row.columns["kind"] == "read" for place in row.columns["looks"]} == {
        0,
        1,
        2,
        3,
    }
    assert {row.answer for row in rows} >= set("0123456789")


def test_a_digit_stands_where_its_column_says() -> None:
    """Cells that hold a digit are brighter than the grey noise of an empty one (mean 20)."""
    for sample in Digits(size=40, filled=(1, 2, 3), kinds=("read", "count"))[:]:
        page = np.asarray(sample.images[0].convert("L"), dtype=float)
        assert page.shape == (64, 64)
        for place, digit in enumerate(sample.columns["digits"]):
            y, x = 32 * (place // 2), 32 * (place % 2)
            brightest = page[y : y + 32, x : x + 32].max()
            assert (brightest > 100) == (digit is not None), (sample.id, PLACES[place])


def same(a: Sample, b: Sample) -> bool:
    return (a.id, a.question, a.answer, a.columns) == (b.id, b.question, b.answer, b.columns) and [
        image.tobytes() for image in a.images
    ] == [image.tobytes() for image in b.images]


def test_rows_are_fixed() -> None:
    """A row that changes between epochs or processes makes a resumed run another run."""
    for split in ("train", "validation", "test"):
        for i in (0, 7, 31):
            assert same(Digits(split=split, size=50)[i], Digits(split=split, size=90)[i])
            assert same(Digits(split=split)[i], Digits(split=split, seed=4)[i]) == (split != "train")
    pages = {
        Digits(split=split, size=9)[i].images[0].tobytes() for split in ("train", "test") for i in range(9)
    }
    assert len(pages) == 18


def test_splits_are_made_of_different_scans() -> None:
    """A test page that shows a training scan measures memory. Also by pixels: no scan occurs twice."""
    pixels, labels = _scans()
    assert (len(pixels), len(labels)) == (1797, 1797)
    ranges = [set(range(1797)[part]) for part in _SCANS.values()]
    assert [len(part) for part in ranges] == [1197, 200, 400]
    assert not ranges[0] & ranges[1] | ranges[0] & ranges[2] | ranges[1] & ranges[2]
    assert len({scan.tobytes() for scan in pixels}) == 1797
    for part in _SCANS.values():
        assert set(labels[part].tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "dev"}, "no split 'dev'"),
        ({"kinds": ("read", "multiply")}, r"kind \['multiply'\]"),
        ({"filled": (2, 5)}, "1 to 4 digits"),
        ({"filled": ()}, "1 to 4 digits"),
        ({"filled": (1, 2)}, "need two digits"),
        ({"kinds": ()}, "needs kinds"),
        ({"size": 0}, "size of at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**settings)


def test_rows_beyond_the_end_are_refused() -> None:
    """Python's own loop over a sequence ends at IndexError."""
    with pytest.raises(IndexError, match="row 3 of Digits with 3 rows"):
        Digits(size=3)[3]
    assert len(list(Digits(size=3))) == len(Digits(size=3)[:]) == 3


# -- traces ---------------------------------------------------------------------------------------

TAGGED = re.compile(
    r"<think>(?P<first>[^<>]*)</think> <back>(?P<back>[^<>]*)</back> <think>(?P<then>[^<>]*)</think> "
    r"\\boxed\{(?P<answer>\d+)\}"
)
READING = re.compile(r"((?:upper|lower) (?:left|right)) (none|\d)")


def readings(text: str) -> dict[int, int | None]:
    return {PLACE[place]: None if value == "none" else int(value) for place, value in READING.findall(text)}


def truth(sample: Sample) -> dict[int, int | None]:
    return {place: sample.columns["digits"][place] for place in sample.columns["looks"]}


@pytest.mark.parametrize("style", ["semantic", "solution"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_look_back_always_states_the_truth(style: Any, share: float) -> None:
    """A look back that repeats a misreading teaches that looking is useless."""
    rows = DigitTraces(data=Digits(size=400), style=style, wrong_first=share)
    wrong = 0
    for sample in rows:
        found = TAGGED.fullmatch(sample.columns["trace"])
        assert found, sample.columns["trace"]
        right = truth(sample)
        assert readings(found["back"]) == right
        assert found["answer"] == sample.answer
        assert found["then"] == sample.columns["working"] + "."
        first = readings(found["first"])
        assert first.keys() == right.keys()
        differing = [place for place in right if first[place] != right[place]]
        assert len(differing) <= 1
        assert all(right[place] is not None for place in differing)
        wrong += bool(differing)
    # Standard deviation of the share at 0.3: sqrt(0.3 * 0.7 / 400) = 0.023; four of them.
    assert abs(wrong / 400 - share) <= (0.092 if 0 < share < 1 else 0)


def test_a_wrong_solution_follows_from_its_wrong_reading() -> None:
    """The preliminary answer must be what the first reading gives, or the trace contradicts itself."""
    for sample in DigitTraces(data=Digits(size=200, filled=(4,)), style="solution", wrong_first=1.0):
        found = TAGGED.fullmatch(sample.columns["trace"])
        assert found
        page = list(sample.columns["digits"])
        for place, value in readings(found["first"]).items():
            page[place] = value
        stated = re.match(r"Check (\d+) on the page", found["back"])
        assert stated
        assert int(stated[1]) == solve(sample.question, tuple(page))


def test_instruct_traces_know_no_tags() -> None:
    for sample in DigitTraces(data=Digits(size=100), style="instruct", wrong_first=1.0):
        trace = sample.columns["trace"]
        assert "<" not in trace
        assert trace.endswith(f"{sample.columns['working']}. \\boxed{{{sample.answer}}}")
        assert readings(trace.lower()) == truth(sample)


QWEN_LA = re.compile(
    r"<SUMMARY>(?P<summary>[^<>]*)\.</SUMMARY><CAPTION>(?P<first>[^<>]*)\.</CAPTION>"
    r"<REASONING>(?P<reasoning>[^<>]*)\.</REASONING>"
    r"<REFLECTION>Looking again: (?P<again>[^<>.]*)\. (?P<working>[^<>.]*)\.</REFLECTION>"
    r"<CONCLUSION>(?P<answer>\d+)</CONCLUSION>"
)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_reflection_corrects_what_was_misread(share: float) -> None:
    """Bug: a reflection that repeats a misreading, or a first solution that does not follow from its
    readings: either teaches that reflecting is useless."""
    wrong = 0
    for sample in DigitTraces(data=Digits(size=400), style="qwen_la", wrong_first=share):
        found = QWEN_LA.fullmatch(sample.columns["trace"])
        assert found, sample.columns["trace"]
        right, first = truth(sample), readings(found["first"])
        assert readings(found["again"]) == right
        assert (found["working"], found["answer"]) == (sample.columns["working"], sample.answer)
        assert first.keys() == right.keys()
        differing = [place for place in right if first[place] != right[place]]
        assert len(differing) <= 1
        page = [first.get(place, digit) for place, digit in enumerate(sample.columns["digits"])]
        expected = conclude(sample.columns["kind"], sample.columns["looks"], page, sample.question)[0]
        assert found["reasoning"] == expected
        wrong += bool(differing)
    # Standard deviation of the share at 0.3: sqrt(0.3 * 0.7 / 400) = 0.023; four of them.
    assert abs(wrong / 400 - share) <= (0.092 if 0 < share < 1 else 0)


def test_qwen_la_traces_have_the_layout_and_full_marks() -> None:
    """Bug: gold answers that the run's own rewards refuse, so that a cold start teaches a broken layout."""
    rewards = TagFormat(layout=qwen_la()), Accuracy(answer_from="CONCLUSION")
    rows = DigitTraces(data=Digits(size=200, seed=9), style="qwen_la", wrong_first=0.5)
    group = [
        Rollout(prompt=Prompt(sample=row, spans=()), spans=(), text=row.columns["trace"], stop="eos")
        for row in rows
    ]
    for reward in rewards:
        assert reward(group) == [1.0] * 200
    summaries = {QWEN_LA.fullmatch(one.text)["summary"] for one in group}  # type: ignore[index]
    assert summaries >= {"Read the upper left digit", "Add two digits", "Compare two digits"}
    assert {text for text in summaries if re.fullmatch(r"Count the \ds|Count digits above \d", text)}
    for row, one in zip(rows, group, strict=True):
        if row.columns["kind"] in ("count", "exceed"):
            assert re.findall(r"\d", row.question) == re.findall(r"\d", one.text.split(".")[0])


SECOND = "<REFLECTION></REFLECTION>"


def test_a_second_reflection_is_empty_and_in_its_share() -> None:
    """Bug: other pages, misreadings or first reflections with the second one than without, so that the two
    cannot be compared; or gold answers that the run's own rewards refuse."""
    parts: Any = {"data": Digits(size=400, seed=9), "style": "qwen_la", "wrong_first": 0.5}
    once, some, all_of_them = (
        [row.columns["trace"] for row in DigitTraces(**parts, second_reflection=share)]
        for share in (0.0, 0.3, 1.0)
    )
    assert once == [row.columns["trace"] for row in DigitTraces(**parts)]
    for plain, maybe, twice in zip(once, some, all_of_them, strict=True):
        assert QWEN_LA.fullmatch(plain)
        assert maybe in (plain, twice)
        assert twice == plain.replace("</REFLECTION>", f"</REFLECTION>{SECOND}")
        assert twice.count("<REFLECTION>") == 2
    found = sum(SECOND in text for text in some) / 400
    # Standard deviation of the share: sqrt(0.3 * 0.7 / 400) = 0.023; four of them.
    assert abs(found - 0.3) <= 0.092
    group = [
        Rollout(prompt=Prompt(sample=row, spans=()), spans=(), text=text, stop="eos")
        for row, text in zip(parts["data"], all_of_them, strict=True)
    ]
    for reward in (TagFormat(layout=qwen_la()), Accuracy(answer_from="CONCLUSION")):
        assert reward(group) == [1.0] * 400


@pytest.mark.parametrize("name", ["wrong_first", "second_reflection"])
@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_shares_are_shares(name: str, share: float) -> None:
    """Bug: 15 for 15 percent gives every trace a second reflection."""
    with pytest.raises(ValueError, match=rf"DigitTraces.{name} is {share}. It is a share, from 0 to 1"):
        DigitTraces(data=Digits(size=1), **{name: share})  # type: ignore[arg-type]


@pytest.mark.parametrize("style", ["semantic", "solution"])
def test_look_back_traces_are_short(style: Any) -> None:
    """Bug: gold answers that are cut by the tiny recipes' 96 tokens."""
    tokens = tokenizer()
    rows = DigitTraces(data=Digits(size=500), style=style)
    lengths = [len(tokens.encode(row.columns["trace"], add_special_tokens=False)) for row in rows]
    assert max(lengths) + 1 <= 96  # and the end of the turn


def test_qwen_la_reflections_are_longer_than_their_target() -> None:
    """Bug: a target length that the gold reflections have already, so that BRPO has nothing to teach."""
    target = compose("qwen_la_brpo").values["rubric"]["target_tokens"]
    texts = [row.columns["trace"] for row in DigitTraces(data=Digits(size=300), style="qwen_la")]
    inner = [re.findall(r"<REFLECTION>(.*?)</REFLECTION>", text)[0] for text in texts]
    lengths = [len(tokenizer().encode(text, add_special_tokens=False)) for text in inner]
    assert sum(lengths) / 300 > 1.5 * target


def test_qwen_la_traces_are_short() -> None:
    """Bug: gold answers that are cut by the tiny recipes' 128 tokens. With each tag as one token, the
    longest look at four places."""
    tokens: Any = copy.deepcopy(tokenizer())
    tokens.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in layout_tags(qwen_la())])
    lengths: dict[int, list[int]] = {1: [], 2: [], 4: []}
    for row in DigitTraces(data=Digits(size=500), style="qwen_la"):
        ids = tokens.encode(row.columns["trace"], add_special_tokens=False)
        lengths[len(row.columns["looks"])].append(len(ids))
    assert [max(of) for of in lengths.values()] == [48, 67, 84]
    assert sum(map(sum, lengths.values())) / 500 < 70


def test_traces_keep_their_rows() -> None:
    """A trace beside another page's image is the worst gold answer."""
    data = Digits(size=20, seed=6)
    rows = DigitTraces(data=data, seed=1)
    assert len(rows) == 20
    for plain, traced in zip(data, rows[:], strict=True):
        columns = {key: value for key, value in traced.columns.items() if key != "trace"}
        assert (traced.id, traced.question, traced.answer, columns) == (
            plain.id, plain.question, plain.answer, plain.columns,
        )  # fmt: skip
        assert traced.images[0].tobytes() == plain.images[0].tobytes()
    assert [r.columns["trace"] for r in rows] == [r.columns["trace"] for r in DigitTraces(data=data, seed=1)]
    assert [r.columns["trace"] for r in rows] != [r.columns["trace"] for r in DigitTraces(data=data, seed=2)]


def test_the_examples_in_the_docstrings_hold() -> None:
    assert Digits(split="test", size=200)[0].question
    text = " ".join((DigitTraces.__doc__ or "").split())
    trace = DigitTraces(data=Digits(size=600), style="semantic")[3].columns["trace"]
    assert f'[3].columns["trace"]` is "{trace}"' in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"style": "free"}, "style is 'free'"),
        ({"wrong_first": 1.5}, "wrong_first is 1.5"),
        ({"wrong_first": -1}, "a share"),
    ],
)
def test_wrong_trace_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitTraces(data=Digits(size=3), **settings)
