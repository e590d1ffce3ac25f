"""Files of predictions, ours and other tools', and `reflectvlm score` on them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reflectvlm.cli import main
from reflectvlm.eval.matching import matched
from reflectvlm.eval.named import make_task
from reflectvlm.eval.others import read_predictions
from reflectvlm.eval.predictions import Prediction, Predictions, items_of
from reflectvlm.eval.result import score_task
from reflectvlm.eval.scorers import Lookback, Official, Strict
from reflectvlm.eval.tasks.pope import POPE
from reflectvlm.eval.types import Item

ROWS = [
    ("11", "How many?", "4", r"So \boxed{4}"),
    ("12", "Which?", "E", "I give up."),
    ("13", "Is it?", "yes", ""),
]
"""Id, question, gold answer, reply. Right by our rule: the first; by Look-Back's: the second too."""
WORDS = ("index", "question", "answer", "prediction")


def lines(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def ours(text_of: str = "text") -> str:
    return lines(*({"id": i, "number": 0, "question": q, "answer": a, text_of: t} for i, q, a, t in ROWS))


def tsv(separator: str = "\t") -> str:
    rows = [WORDS, *ROWS]
    return "\n".join(separator.join(f'"{cell}"' for cell in row) for row in rows) + "\n"


FORMS: dict[str, tuple[str, str]] = {
    "ours": ("reflectvlm", ours()),
    "Look-Back": (
        "Look-Back",
        json.dumps(
            {
                "results": [
                    {"id": i, "question": q, "answer": a, "prediction": t, "accuracy": 0.0, "correct": False}
                    for i, q, a, t in ROWS
                ],
                "metrics": {"accuracy": 0.0},
                "config": {},
            },
            indent=2,
        ),
    ),
    "Look-Back's list": (
        "Look-Back",
        json.dumps([{"id": i, "question": q, "gt": a, "response": t} for i, q, a, t in ROWS]),
    ),
    "VLMEvalKit tsv": ("VLMEvalKit", tsv()),
    "VLMEvalKit csv": ("VLMEvalKit", tsv(",")),
    "VLMEvalKit json": (
        "VLMEvalKit",
        json.dumps([dict(zip(WORDS, (int(row[0]), *row[1:]), strict=True)) for row in ROWS]),
    ),
    "VLMEvalKit columns": (
        "VLMEvalKit",
        json.dumps({word: {str(n): row[c] for n, row in enumerate(ROWS)} for c, word in enumerate(WORDS)}),
    ),
    "lmms-eval": (
        "lmms-eval",
        lines(
            *(
                {"doc_id": int(i), "target": a, "input": q, "resps": [[t]], "filtered_resps": [t.upper()]}
                for i, q, a, t in ROWS
            )
        ),
    ),
    "lmms-eval without resps": (
        "lmms-eval",
        lines(
            *({"doc_id": i, "target": a, "input": q, "filtered_resps": [t or " "]} for i, q, a, t in ROWS)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_known_by_its_content(form: str, tmp_path: Path) -> None:
    """Bug: a form read as another one: gold answers taken for replies, or replies that were filtered."""
    kind, text = FORMS[form]
    file = tmp_path / "any.name"
    file.write_text(text, encoding="utf-8-sig" if "tsv" in form else "utf-8")
    found = read_predictions(file)
    assert found.kind == kind
    assert [(line.id, line.question, line.answer, line.text.strip()) for line in found.lines] == ROWS
    assert [line.number for line in found.lines] == [0, 0, 0]


def test_a_spreadsheet(tmp_path: Path) -> None:
    """Bug: an id 11 that comes back as 11.0, and an empty cell as the text None."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(WORDS)
    for id, question, answer, text in ROWS:
        book.active.append((float(id), question, int(answer) if answer.isdigit() else answer, text or None))
    book.save(tmp_path / "any.bin")
    book.close()
    found = read_predictions(tmp_path / "any.bin")
    assert found.kind == "VLMEvalKit"
    assert [(line.id, line.question, line.answer, line.text) for line in found.lines] == ROWS
    (tmp_path / "broken").write_bytes((tmp_path / "any.bin").read_bytes()[:200])
    with pytest.raises(ValueError, match="is no xlsx table that can be read"):
        read_predictions(tmp_path / "broken")


def test_several_replies_to_one_item(tmp_path: Path) -> None:
    """Bug: of several replies only the last one counts, or all but the first."""
    file = tmp_path / "samples.jsonl"
    file.write_text(lines({"doc_id": 3, "target": "4", "resps": [["a", "b"]]}))
    assert [(line.id, line.number, line.text) for line in read_predictions(file).lines] == [
        ("3", 0, "a"),
        ("3", 1, "b"),
    ]


def test_a_cut_line_and_a_line_said_twice(tmp_path: Path) -> None:
    """Bug: half a line as a reply; of two lines of one item the older one."""
    file = tmp_path / "ours.jsonl"
    again = {"id": "11", "number": 0, "question": "How many?", "answer": "4", "text": "again"}
    file.write_text(ours() + lines(again) + '{"id": "14", "ques')
    found = read_predictions(file)
    assert [line.id for line in found.lines] == ["12", "13", "11"]
    assert found.lines[-1].text == "again"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no rows"),
        (b'{"a": 1}\n{"a": 2}\n', "its first row has a"),
        (b"question\tanswer\nq\ta\n", "its first row has question, answer"),
        (b"\x80\x04\x95pickle", "neither UTF-8 text nor an xlsx table"),
        (b'{"id": "1", "question": "q", "text": "t"}\n{oh no\n{"id": "2"}\n', "any:2 is no JSON"),
        (b'{"id": "1", "question": "q", "text": "t"}\n{"id": "2"}\n', "any:2 is no prediction"),
        (b'{"doc_id": 1, "resps": [[[-0.5, true]]]}\n', "no texts as its resps"),
        (b'{"doc_id": 1, "resps": [["a"]]}\n[1]\n', "any:2 is no JSON object"),
        (b"[" * 100_000, "is no JSON"),
    ],
)
def test_what_is_no_file_of_predictions(content: bytes, message: str, tmp_path: Path) -> None:
    """Bug: a traceback, or a figure, for a file of something else."""
    (tmp_path / "any").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path / "any")
    with pytest.raises(ValueError, match="none cannot be read: No such file or directory"):
        read_predictions(tmp_path / "none")


# -- replies to a task's items --------------------------------------------------------------------


def predictions(*rows: Prediction, kind: str = "VLMEvalKit") -> Predictions:
    return Predictions(path=Path("some.file"), kind=kind, lines=rows)


def items(count: int = 4) -> list[Item]:
    return [Item(id=str(n), question=f"Question {n}?", answer=str(10 * n)) for n in range(count)]


def test_items_without_a_reply_stay_in_the_denominator() -> None:
    """Bug: rows that another tool has dropped shrink the denominator, as in Look-Back's own evaluation."""
    found = matched(items(), predictions(Prediction(id="1", question="Question 1?", text="x")))
    assert [(reply.item.id, reply.text) for reply in found.replies] == [
        ("0", ""),
        ("1", "x"),
        ("2", ""),
        ("3", ""),
    ]
    assert found.absent == ["0", "2", "3"]
    assert found.samples == 1


@pytest.mark.parametrize("number", [0, 1])
def test_what_was_never_answered_is_wrong_by_every_scorer(number: int) -> None:
    """Bug: a rule that takes nothing for yes finds an item right whose image is missing or that has no reply,
    also as its second reply."""
    asked = [
        Item(id=str(n), question=f"Question {n}?", answer="Yes", lookback_answer="N", columns={"set": "any"})
        for n in range(3)
    ]
    texts = [
        Prediction(id="0", question="Question 0?", text="", number=number),
        Prediction(id="1", question="Question 1?", text="", missing="gone", number=number),
    ]
    lines = [*(replace(line, number=n) for n in range(number) for line in texts), *texts]
    given = predictions(*lines, kind="reflectvlm")
    result = score_task(
        "pope", POPE(), matched(asked, given), given.missing, [Official(), Lookback(), Strict()]
    )
    official = result.marks["official"]
    assert [mark.value for mark in official] == [1.0, 0.0, 0.0] * (number + 1)
    assert [mark.note for mark in official[1:3]] == ["no image", "no reply"]
    assert [mark.value for mark in result.marks["lookback"]][:3] == [1.0, 0.0, 0.0]
    assert (list(result.missing), result.absent) == (["1"], ["2"])
    assert result.summaries["official"].values["accuracy"] == pytest.approx(1 / 3)


def test_what_a_rule_leaves_open_stays_open() -> None:
    """Bug: rows without an image are all that a benchmark without its judge has scored: an accuracy of 0."""
    asked = items(2)
    given = predictions(Prediction(id="0", question="Question 0?", text="x"), kind="reflectvlm")
    result = score_task("any", None, matched(asked, given), given.missing, [Official(), Strict()])
    assert [mark.value for mark in result.marks["official"]] == [None, None]
    assert [mark.value for mark in result.marks["strict"]] == [0.0, 0.0]


def test_row_numbers_that_are_ids_by_accident() -> None:
    """Bug: rows counted from 1 by another tool, scored against the neighbour's gold answer."""
    rows = [
        Prediction(id=str(n + 1), question=f"Question {n}?", answer=str(10 * n), text=f"t{n}")
        for n in range(4)
    ]
    found = matched(items(), predictions(*rows))
    assert [reply.text for reply in found.replies] == ["t0", "t1", "t2", "t3"]
    strangers = [
        Prediction(id=str(n), question=f"Something else {n}", answer="z", text="t") for n in range(4)
    ]
    with pytest.raises(ValueError, match="does not belong to this task"):
        matched(items(), predictions(*strangers))
    with pytest.raises(ValueError, match=r"neither the ids \('9', … there; '0', '1', '2', … here\)"):
        matched(items(), predictions(Prediction(id="9", text="t"), kind="reflectvlm"))


def test_a_question_that_is_asked_of_several_images() -> None:
    """Bug: replies to a question that a benchmark asks of many images are dropped as if nobody had answered,
    or given to the wrong image."""
    asked = [Item(id=f"p{n}", question="How many?", answer=gold) for n, gold in enumerate("350")]
    rows = [
        Prediction(id=str(n), question="How many?", answer=gold, text=f"t{n}") for n, gold in enumerate("350")
    ]
    found = matched(asked, predictions(*rows))
    assert [(reply.item.id, reply.text) for reply in found.replies] == [
        ("p0", "t0"),
        ("p1", "t1"),
        ("p2", "t2"),
    ]
    assert not found.absent
    assert [r.text for r in matched(asked[:2], predictions(*rows)).replies] == ["t0", "t1"]  # a limit
    again = [replace(row, text=row.text + "b") for row in rows]
    assert matched(asked, predictions(*rows, *again)).samples == 2
    with pytest.raises(ValueError, match=r"asks 'How many\?' several times, of other gold answers"):
        matched(asked, predictions(*rows[1:]))


def pope(*sets: str) -> list[Item]:
    """Two questions of each set, the same ones everywhere."""
    return [
        Item(id=f"{name}/{n}", question=f"Is there a {thing}?", answer=gold, columns={"set": name})
        for name in sets
        for n, (thing, gold) in enumerate((("cat", "Yes"), ("dog", "No")), start=1)
    ]


def table(*indexes: object) -> Predictions:
    """A table of index and prediction alone."""
    return predictions(*(Prediction(id=str(index), text=f"t{index}") for index in indexes))


def test_a_table_of_index_and_prediction_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: refused as not belonging to the task, or joined to other rows without a word."""
    asked = pope("random", "popular")
    for start in (0, 1):
        caplog.clear()
        found = matched(asked, table(*range(start, start + 4)))
        assert [reply.text for reply in found.replies] == [f"t{n}" for n in range(start, start + 4)]
        assert f"counted from {start}, are taken for those of the task in their order" in caplog.text
        assert "random/1 to popular/2" in caplog.text
    for other in (table(0, 1, 2), table(5, 6, 7, 8)):
        with pytest.raises(
            ValueError, match=r"does not tell which rows of this task it has: . rows there, 4 here. Keep"
        ):
            matched(asked, other)
    caplog.clear()
    found = matched(items(2), table(0, 1, 2))  # with ids that are the table's, as under a limit
    assert [reply.text for reply in found.replies] == ["t0", "t1"]
    assert not caplog.text


def test_row_numbers_without_questions_that_are_ids_by_accident(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: items 1 to 10 get the replies of rows 0 to 9 that have their number, which are the neighbours'."""
    asked = [Item(id=str(n), question=f"Question {n}?", answer=str(10 * n)) for n in range(1, 11)]
    found = matched(asked, table(*range(10)))
    assert [reply.text for reply in found.replies] == [f"t{n}" for n in range(10)]
    assert not found.absent
    assert "counted from 0, are taken for those of the task in their order, 1 to 10" in caplog.text
    # With gold answers, which say that the numbers are not the ids: of yes and no half agree by accident.
    for golds in ([str(10 * n) for n in range(1, 11)], ["yes", "no", "no", "yes", "yes"] * 2):
        these = [replace(item, answer=gold) for item, gold in zip(asked, golds, strict=True)]
        rows = [Prediction(id=str(n), answer=gold, text=f"t{n}") for n, gold in enumerate(golds)]
        with pytest.raises(ValueError, match="does not belong to this task"):
            matched(these, predictions(*rows))
        own = [replace(row, id=str(n)) for n, row in enumerate(rows, start=1)]
        assert [reply.text for reply in matched(these, predictions(*own)).replies] == [r.text for r in rows]


def test_the_benchmark_s_own_index(tmp_path: Path) -> None:
    """Bug: VLMEvalKit's POPE keeps a question of several sets once: replies are given to the wrong rows."""
    (tmp_path / "POPE").mkdir()
    rows = [
        (17, "iVBORw0KGgo=", "Is there a cat?", "Yes", "random,popular"),
        (18, "17", "Is there a dog?", "No", "random"),
        (40, "17", "Is there a dog?", "No", "popular, adversarial"),
        (41, "17", "Is there a cat?", "Yes", "adversarial"),
    ]
    head = ("index", "image", "question", "answer", "category")
    text = "\n".join("\t".join(map(str, row)) for row in (head, *rows)) + "\n"
    (tmp_path / "POPE" / "POPE.tsv").write_text(text)
    asked = POPE().load(tmp_path)
    assert [item.id for item in asked] == [
        "random/17", "random/18", "popular/17", "popular/40", "adversarial/40", "adversarial/41",
    ]  # fmt: skip
    assert len({item.images for item in asked}) == 1
    bare = matched(asked, table(41, 40, 18, 17))
    assert [reply.text for reply in bare.replies] == ["t17", "t18", "t17", "t40", "t40", "t41"]
    full = [Prediction(id=str(row[0]), question=row[2], answer=row[3], text=f"t{row[0]}") for row in rows]
    assert [reply.text for reply in matched(asked, predictions(*full)).replies] == [
        reply.text for reply in bare.replies
    ]
    # Another table's index, whose yes and no agree by accident, or which is counted from another number.
    others = [replace(line, question="What?") for line in full]
    with pytest.raises(ValueError, match="does not belong to this task"):
        matched(asked, predictions(*others))
    with pytest.raises(ValueError, match="does not tell which rows of this task it has"):
        matched(asked, table(18, 40, 41, 42))


def test_rows_of_a_table_of_all_sets(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: rows counted from 1 given to the neighbour; or in the order of the task where its table has
    another one."""
    asked = [
        replace(item, columns={"index": str(place)})
        for item, place in zip(pope("random", "popular"), (2, 3, 0, 1), strict=True)
    ]
    found = matched(asked, table(0, 1, 2, 3))
    assert [reply.text for reply in found.replies] == ["t2", "t3", "t0", "t1"]
    assert not caplog.text
    found = matched(asked, table(1, 2, 3, 4))
    assert [reply.text for reply in found.replies] == ["t3", "t4", "t1", "t2"]
    assert "counted from 1" in caplog.text


@pytest.mark.parametrize("nested", [False, True])
def test_lmms_eval_s_names_of_a_row(nested: bool, tmp_path: Path) -> None:
    """Bug: POPE's rows are told apart by their number in another order, so that every reply is to another
    image; or a log whose id is inside of doc is unknown."""
    asked = pope("random", "popular")
    rows = []
    for place, item in enumerate(reversed(asked)):
        name, _, number = item.id.partition("/")
        doc: dict[str, Any] = {"question_id": number, "category": name, "question": item.question}
        where: dict[str, Any] = doc if nested else {}
        where["doc_id"] = place
        row = {"target": item.answer.lower(), "filtered_resps": [f"t {item.id}"], "doc": doc}
        rows.append(row if nested else row | where)
    file = tmp_path / "samples"
    file.write_text(lines(*rows))
    found = read_predictions(file)
    assert found.kind == "lmms-eval"
    assert [reply.text for reply in matched(asked, found).replies] == [f"t {item.id}" for item in asked]
    assert [reply.text for reply in matched(asked[:1], found).replies] == ["t random/1"]  # a limit
    # Names that are ids by accident, of other questions: they do not count.
    strange = [replace(line, question="What?", answer="?") for line in found.lines]
    with pytest.raises(ValueError, match="does not belong to this task"):
        matched(asked, replace(found, lines=strange))


def test_ids_of_ours_that_fit_by_accident() -> None:
    """Bug: a file of ours with one id in common is scored against another benchmark's gold answers, and what
    is yes or no agrees with half of them."""
    asked = [Item(id=str(n), question=f"Question {n}?", answer="yes") for n in range(3)]
    rows = [Prediction(id=str(n), question=f"Something else {n}", answer="yes", text="yes") for n in range(3)]
    with pytest.raises(ValueError, match="'0', 'Something else 0' there and 'Question 0\\?' here"):
        matched(asked, predictions(*rows, kind="reflectvlm"))
    rows = [replace(line, question=f"Question  {n}?\n") for n, line in enumerate(rows)]
    assert len(matched(asked, predictions(*rows, kind="reflectvlm")).replies) == 3


def test_several_numbers_come_number_by_number() -> None:
    """Bug: second replies between the first ones: a task's figures are those of one number."""
    rows = [Prediction(id=str(n), number=m, text=f"{n}{m}") for n in range(2) for m in range(2)]
    found = matched(items(2), predictions(*rows, kind="reflectvlm"))
    assert [reply.text for reply in found.replies] == ["00", "10", "01", "11"]
    assert found.samples == 2
    assert found.absent == []
    assert [item.id for item in items_of(rows)] == ["0", "1"]


# -- the command ----------------------------------------------------------------------------------


def test_score_without_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: figures by other gold answers than the file's, or official ones where nobody knows the rule."""
    file = tmp_path / "results.json"
    file.write_text(FORMS["Look-Back"][1])
    assert main(["score", str(file), f"out={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    cells = [cell.strip() for cell in out.splitlines()[4].split("|")[1:-1]]
    assert cells[:7] == ["results", "accuracy", "3", "–", "66.67", "33.33", "0.0 – 100.0"]
    assert cells[7:] == ["1", "official 3", "0", "0"]
    scores = json.loads((tmp_path / "out" / "scores-results.json").read_text())
    assert scores["scorers"]["lookback"]["values"] == {"accuracy": pytest.approx(2 / 3)}
    assert scores["scorers"]["official"]["values"] == {"accuracy": None}
    (row,) = map(json.loads, (tmp_path / "out" / "differing-results.jsonl").read_text().splitlines())
    assert row["id"] == "12"
    assert {name: mark["value"] for name, mark in row["marks"].items()} == {
        "official": None, "lookback": 1.0, "strict": 0.0,
    }  # fmt: skip
    assert "| results" in (tmp_path / "out" / "table.md").read_text()


def test_against_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the gain with the wrong sign, or the items of one model in the other's column."""
    for name, right in (("first", 2), ("second", 6)):
        texts = [f"\\boxed{{{4 if n < right else 5}}}" for n in range(8)]
        rows = [{"id": str(n), "question": "q", "answer": "4", "text": text} for n, text in enumerate(texts)]
        (tmp_path / name).write_text(lines(*rows))
    words = [str(tmp_path / "second"), f"against={tmp_path / 'first'}", "scorers=strict"]
    assert main(["score", *words]) == 0
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    # 4 items are right in the second alone: p = 2 / 2^4
    assert row[:6] == ["strict", "8", "0", "25.00", "75.00", "+50.00"]
    assert row[7:] == ["0", "4", "0.125"]


def test_a_file_of_another_task_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: shapes scored as digits, because both count their rows from 0 and ask nearly the same."""
    (item,) = make_task("digits", {"size": "1"}).load(tmp_path)
    (tmp_path / "any").write_text(lines({"id": item.id, "question": item.question, "text": "x"}))
    words = ["score", str(tmp_path / "any"), "task=digits", "digits.size=1", "scorers=strict"]
    assert main(words) == 0
    (tmp_path / "any.card.json").write_text(json.dumps({"task": "shapes"}))
    capsys.readouterr()
    assert main(words) != 0
    assert "was made with the task shapes, as its card says, not digits" in capsys.readouterr().err
    (tmp_path / "any.card.json").write_text(json.dumps({"task": "a_recipes_own"}))
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "score needs one file of predictions, got 0"),
        (["FILE", "tsk=mme"], "score has no key 'tsk'. Did you mean task?"),
        (["FILE", "task=mathvitsa"], "Did you mean mathvista?"),
        (["FILE", "mathvista.split=test"], "Add task=mathvista"),
        (["FILE", "scorers=strct"], "Did you mean strict?"),
        (["FILE", "limit=0"], "limit is 0"),
        (["FILE", "task=digits", "limit=0"], "limit is 0. It must be at least 1; limit=null is all rows"),
        (["FILE", "answer_from=boxd"], "Did you mean boxed?"),
        (["FILE", "out=FILE"], "is a file. Name a folder"),
        (["FILE", "against=nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["FILE", "ask.model=x"], "ask.model is given, and ask is not"),
        (["FILE", "ask=http://localhost:1/v1"], "ask needs ask.model=NAME"),
        (["FILE", "task=mathvista", "data_dir=nowhere"], "mathvista"),
    ],
)
def test_mistakes_are_one_line(
    words: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a traceback for a misspelt word."""
    file = tmp_path / "ours.jsonl"
    file.write_text(ours())
    assert main(["score", *[word.replace("FILE", str(file)) for word in words]]) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith("error: ")
    assert message in shown.err
    assert not shown.out  # nothing was computed before


def test_scoring_loads_no_torch(tmp_path: Path) -> None:
    """Bug: a table that takes as long as loading a model's libraries."""
    file = tmp_path / "ours.jsonl"
    file.write_text(ours())
    called = f"main(['score', {str(file)!r}])"
    code = f"import sys; from reflectvlm.cli import main; print({called}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
