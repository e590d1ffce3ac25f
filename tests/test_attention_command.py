"""`reflectvlm attention`: what it writes for one answer and for many, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reflectvlm import Digits, Instruction
from reflectvlm.attention.files import plain, save_csv, save_json
from reflectvlm.attention.removing import Removed
from reflectvlm.attention.splice import Spliced
from reflectvlm.attention_options import check_tags, read_words, ways_of
from reflectvlm.attention_rows import digits_by_length, form_of, named
from reflectvlm.attention_tables import removal_numbers, splice_numbers
from reflectvlm.cli import main
from reflectvlm.data.digits import PLACES
from reflectvlm.generate_command import Plan
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.recipe_check import RecipeError
from test_attention_shares import answer, policy

ANSWER = "<think>upper left 7.</think> <back>Looking again: upper left 7.</back> \\boxed{7}"
FIGURES = ("trend", "layers", "maps")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    Digits(split="test", size=1)[0].images[0].save(tmp_path / "page.png")
    return tmp_path / "page.png"


def one(page: Path, out: Path, *words: str) -> int:
    text = page.with_name("answer.txt")
    text.write_text(ANSWER + "\n")
    asked = ["question=Which digit is upper left?", f"answer={text}", f"out={out}"]
    return main(["attention", "model=tiny", f"image={page}", *asked, *words])


# -- one answer -----------------------------------------------------------------------------------


def test_one_answer(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: figures without their numbers, numbers of another answer, or bytes that differ from run to run."""
    words = ("reattention=copy", "reattention.trigger=<back>", "layers=each")
    for name in ("a", "b"):
        assert one(page, tmp_path / name, *words) == 0
    assert "trend.png, layers.png, maps.png, layer_maps.png" in capsys.readouterr().out
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    drawn = [f"{figure}.{kind}" for figure in (*FIGURES, "layer_maps") for kind in ("png", "svg")]
    assert files == sorted([*drawn, "trend.csv", "attention.json", "answer.txt"])
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert (tmp_path / "a/answer.txt").read_text() == ANSWER
    found = json.loads((tmp_path / "a/attention.json").read_text())
    assert found["reattention"] == "VisualCopy(trigger='<back>')"
    per_layer = np.array(found["per_layer"])
    assert per_layer.shape == (4, len(found["tokens"]), 5)
    assert per_layer.sum(-1) == pytest.approx(np.ones(per_layer.shape[:2]), abs=1e-4)
    assert [one["shown"] for one in found["maps"]] == ["prompt", "prompt", "block 1"]
    with (tmp_path / "a/trend.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [row["text"] for row in rows] == found["tokens"]
    assert float(rows[5]["plain_image"]) == pytest.approx(per_layer.mean(0)[5, 1], abs=1e-5)
    ((first, stop),) = found["regions"]
    assert [int(row["inside"]) for row in rows] == [int(first <= n < stop) for n in range(len(rows))]


def test_figures_say_what_made_them_nowhere(page: Path, tmp_path: Path) -> None:
    """Bug: a date or a version in a file, which then changes with every run."""
    assert one(page, tmp_path / "out") == 0
    for figure in FIGURES:
        svg = (tmp_path / "out" / f"{figure}.svg").read_text()
        assert "<dc:date>" not in svg
        assert "matplotlib.org" not in svg.replace("https://matplotlib.org/</dc", "")
        with Image.open(tmp_path / "out" / f"{figure}.png") as png:
            assert "Software" not in png.info


def test_an_answer_is_generated_and_looked_at_in_some_layers(page: Path, tmp_path: Path) -> None:
    """Bug: settings of sampling, layers, tags or words that do not reach what they are about."""
    out = tmp_path / "out"
    words = [
        "question=Which digit is upper left?",
        "max_tokens=12",
        "layers=-1,0",
        "query=step",
        "tags=think",
    ]
    assert main(["attention", "model=tiny", f"image={page}", f"out={out}", *words]) == 0
    found = json.loads((out / "attention.json").read_text())
    assert found["layers"] == [3, 0]
    assert found["query"] == "step"
    assert len(found["tokens"]) <= 12
    assert one(page, tmp_path / "at", "at=upper left", "at=7") == 0
    names = [one["look"] for one in json.loads((tmp_path / "at/attention.json").read_text())["maps"]]
    assert names == [
        "'upper left' 1",
        "'upper left' 2, looking back",
        "'7' 1",
        "'7' 2, looking back",
        "'7' 3",
    ]


# -- many -----------------------------------------------------------------------------------------


def test_many_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: ways to look again that share answers, or a table without what was left out."""
    words = ["max_rows=6", "compare=implicit,copy", "reattention.limit=1", "controls=all", "max_tokens=40"]
    assert main(["attention", "model=tiny", "data=digits", f"out={tmp_path / 'out'}", *words]) == 0
    said = capsys.readouterr().out
    assert "share of all (95 % over answers; n answers)" in said
    assert re.search(r"\| implicit .*\| 0\.\d{3} ± 0\.\d{3} \(n 6\) \|", said)
    assert re.search(r"\| copy +\| answer +\| +\d \|", said)  # greyed: n of its own
    assert re.search(r"\| copy +\| +\d of \d \(\d+ %\) \|", said)
    found = json.loads((tmp_path / "out/attention.json").read_text())
    assert list(found) == ["implicit", "copy"]
    assert found["copy"]["reattention"] == "VisualCopy(trigger='<back>', limit=1)"
    for way in found.values():
        assert way["answers"] == 6
        assert 0 < way["parts"]["all"]["visual"] < 1
        assert way["splice"]["rows"] + way["left_out"].get("splice: no wrong beginning", 0) == 6
        assert way["removal"]["answer"]["answers"] > 0
    names = {file.stem for file in (tmp_path / "out").glob("*.png")}
    assert names == {"lengths", "parts", "hallucination"}
    with (tmp_path / "out/answers.csv").open() as table:
        assert [row["way"] for row in csv.DictReader(table)] == ["implicit"] * 6 + ["copy"] * 6


def test_rows_of_a_user(page: Path, tmp_path: Path) -> None:
    """Bug: boxes, beginnings or gold answers of a user's rows that the analysis does not see."""
    row = {"image": page.name, "question": "Which digit is upper left?", "answer": "7", "asked": ["a"]}
    row |= {"boxes": {"a": [0, 0, 32, 32]}, "wrong_start": "It is 3.", "right_start": "It is 7."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = [f"data={tmp_path / 'rows.jsonl'}", f"out={tmp_path / 'out'}", "controls=all", "max_tokens=12"]
    assert main(["attention", "model=tiny", *words, "columns.images=image"]) == 0
    (found,) = json.loads((tmp_path / "out/attention.json").read_text()).values()
    assert found["removal"]["answer"]["answers"] == 1
    assert found["splice"]["rows"] == 1
    assert found["parts"]["all"]["lift"] > 0


def test_numbers_of_the_controls_by_hand() -> None:
    """Bug: a difference with the wrong sign, or an error that is the spread."""
    rows = [
        Removed(id="a", asked={"answer": 3.0}, other={"answer": 1.0}, tokens={"answer": 4}, region="x"),
        Removed(
            id="b",
            asked={"answer": 5.0, "box": 1.0},
            other={"answer": 1.0, "box": 0.5},
            tokens={"answer": 6, "box": 1},
            region="x",
        ),
    ]
    made = removal_numbers(rows)
    # Gaps 2 and 4: mean 3, standard deviation sqrt(2), error of the mean 1.
    assert made["answer"] == pytest.approx(
        {"answers": 2, "tokens": 5, "asked": 4, "other": 1, "difference": 3, "standard_error": 1}
    )
    assert made["box"]["answers"] == 1
    assert plain(made["box"]["standard_error"]) is None
    spliced = [Spliced(id=str(n), repaired=n < 1, kept=n < 3, wrong_text="", right_text="") for n in range(4)]
    assert splice_numbers(spliced) == {"rows": 4, "repaired": 0.25, "kept": 0.75}
    assert splice_numbers([]) == {}


def test_the_form_of_answers_decides_how_they_are_begun() -> None:
    """Bug: a model that writes `<think>` alone is begun with a closed thought, after which it never
    answers."""
    texts = {"<think>a</think> \\boxed{7}": "think", ANSWER: "back", "<SUMMARY>a</SUMMARY>": "qwen_la"}
    for text, form in texts.items():
        assert form_of([answer(policy(), text=text)]) == form
    assert digits_by_length([answer(policy())]) == []
    assert named("runs/lookback_rl-semantic/model") == "lookback_rl-semantic"
    assert named("tiny") == "tiny"


def test_a_digit_elsewhere_on_the_page_is_no_hallucination() -> None:
    """Bug: a digit that is read rightly at a place that was not asked about counts as one that is not
    there, or raises what recall is over."""
    data = Digits(split="test", size=40, kinds=["read"], filled=(4,))
    digits, (place,) = data[0].columns["digits"], data[0].columns["looks"]
    other = (place + 1) % 4
    wrong = (digits[other] + 1) % 10
    said = f"{PLACES[place]} {digits[place]}, {PLACES[other]} {digits[other]}."
    prompt = policy().prompt(data[0], Instruction())
    last = digits_by_length([answer(policy(), text=said, prompt=prompt)])[-1]
    # Two right mentions; of the one place asked about, one is named.
    assert (last.mentioned, last.wrong, last.recall) == (2, 0, 1.0)
    said = f"{PLACES[other]} {digits[other]}, {PLACES[other]} {wrong}."
    last = digits_by_length([answer(policy(), text=said, prompt=prompt)])[-1]
    assert (last.mentioned, last.wrong, last.recall) == (2, 1, 0.0)


def test_ways_to_compare() -> None:
    """Bug: a setting that reaches one way only, or a trigger that is not the model's."""
    given = read_words(["model=x", "data=d", "compare=implicit,copy,route,text", "reattention.m=25"])
    ways = ways_of(given, Implicit(), "<back>")
    assert ways["implicit"] == Implicit()
    assert ways["copy"] == VisualCopy(trigger="<back>")
    assert ways["route"] == VisualRoute(trigger="<back>", m=25)
    assert ways["text"].trigger == "<back>"
    assert list(ways_of(read_words(["model=x", "data=d"]), VisualCopy(), "<back>").values()) == [VisualCopy()]
    wrong = read_words(["model=x", "data=d", "compare=copy", "reattention.colour=1"])
    with pytest.raises(RecipeError, match="colour is no setting of VisualCopy"):
        ways_of(wrong, Implicit(), "<back>")


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=x"], "needs image=FILE"),
        (["image=a.png"], "needs model=PATH"),
        (["model=x", "image=a", "lyers=1"], "attention has no key 'lyers'. Did you mean layers"),
        (["model=x", "image=a", "data=d"], "image and data are both given"),
        (["model=x", "data=d", "at=7"], "at and data are both given"),
        (["model=x", "image=a", "compare=copy"], "compare belongs to many rows"),
        (
            ["model=tiny", "image=a", "question=q", "layers=x"],
            "layers is 'x'. It must be whole numbers such as 0,2",
        ),
        (["model=tiny", "image=a", "question=q", "query=next"], "query is 'next'. It must be token or step"),
        (["model=tiny", "image=a", "question=q", "chunk=0"], "chunk is 0"),
        (["model=tiny", "image=a", "question=q", "tags=back,"], "tags is 'back,'"),
        (["model=tiny", "image=a", "question=q", "answer=nowhere.txt"], "cannot be read"),
        (["model=x", "image=a"], "needs the question that is asked about the image: add question="),
        (["model=x", "image=a", "question= "], "question is empty. Give what is asked about the image"),
        (
            ["model=tiny", "image=a", "question=q", "tags=bakc"],
            "tags has 'bakc'. It takes think, back, SUMMARY",
        ),
        (["model=tiny", "image=a", "question=q", "tags=bakc"], "Did you mean back?"),
        (["model=tiny", "data=digits", "tags=back,RELFECTION"], "Did you mean REFLECTION?"),
        (["model=tiny", "data=digits", "root=pages"], "root says how a file of rows is read"),
        (["model=tiny", "data=digits", "columns.id=name"], "columns.id says how a file of rows is read"),
        (["model=tiny", "data=digits", "controls=grey"], "controls is 'grey'. It takes removal, splice"),
        (["model=tiny", "data=digits", "compare=copi"], "Did you mean copy"),
        (["model=tiny", "data=digits", "compare=copy", "reattention=copy"], "compare and reattention"),
        (["model=tiny", "data=digits", "max_rows=0"], "max_rows is 0"),
        (["model=tiny", "data=digits", "batch=0"], "batch is 0"),
    ],
)
def test_wrong_words_are_refused(
    words: list[str], message: str, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a mistake that is told after a model was loaded, or not at all."""
    words = [f"image={page}" if word == "image=a" else word for word in words]
    assert main(["attention", *words]) == 2
    assert message in capsys.readouterr().err


def test_tags_of_an_answer_or_an_instruction_are_known(page: Path, tmp_path: Path) -> None:
    """Bug: a tag of one's own is refused as misspelt."""
    check_tags(["check", "back"], "Write <check>what you look at</check>.")
    assert one(page, tmp_path / "out", "tags=think,back") == 0
    with pytest.raises(RecipeError, match=r"tags has 'chek'\. .* Did you mean check"):
        check_tags(["chek"], "Write <check>what you look at</check>.")


def test_a_tag_that_only_the_model_knows(
    page: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the tag that re-attention waits for is refused unless the instruction spells it, and so is what a
    model was fine-tuned on."""
    trigger = ["reattention=copy", "reattention.trigger=<wxyz>", "tags=wxyz"]
    assert one(page, tmp_path / "out", *trigger) == 0
    assert "tags has" not in caplog.text
    # Of many rows: the check comes before any weights.
    monkeypatch.setattr(Plan, "generator", lambda _: pytest.fail("not reached", pytrace=False))
    with pytest.raises(pytest.fail.Exception, match="not reached"):
        main(["attention", "model=tiny", "data=digits", *trigger])
    assert "tags has" not in caplog.text
    check_tags(["wxyz", "back"], "")
    assert "tags has 'wxyz', which is in no layout" in caplog.text
    with pytest.raises(RecipeError, match="Did you mean wxyz"):
        check_tags(["wxyy"], "<wxyz>")


def test_text_alone_is_refused(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: an empty answer, or words that stand nowhere, told as a stack of errors."""
    assert one(page, tmp_path / "out", "at=giraffe") == 2
    assert "at='giraffe' stands nowhere" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert one(page, tmp_path / "file/out") == 2
    assert "Name another out=FOLDER" in capsys.readouterr().err


def test_files_are_plain(tmp_path: Path) -> None:
    """Bug: NaN in JSON, which no other program reads, or columns that depend on the first row."""
    values: dict[str, Any] = {"a": np.float64("nan"), "b": np.arange(2), "c": (1 / 3,), "d": None}
    save_json(values, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "a": None,
        "b": [0, 1],
        "c": [0.333333],
        "d": None,
    }
    save_csv([{"a": 1}, {"b": 2.5}], tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == "a,b\n1,\n,2.5\n"
