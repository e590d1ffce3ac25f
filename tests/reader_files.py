"""Small made-up files in the layouts of public data sets, for the readers' tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from bad_rows import encoded

PICTURE = encoded(Image.new("RGB", (40, 30), (200, 30, 30)))
STORED = {"bytes": PICTURE, "path": "x.png"}


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PICTURE)


def table(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def llava_cot(folder: Path) -> Path:
    """Two rows, the second with two exchanges."""
    thought = "<SUMMARY> s </SUMMARY>\n<CAPTION> c </CAPTION>\n<REASONING> r </REASONING>\n"
    reply = thought + "<CONCLUSION> {} </CONCLUSION>"
    rows = [
        {"id": "a", "image": "sqa/1.png", "conversations": turns("What is red?", reply.format("B"))},
        {
            "id": "a",
            "image": "sqa/1.png",
            "conversations": turns("First?", reply.format("one"), "And then?", reply.format("two")),
        },
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture(folder / "image/sqa/1.png")
    return folder


def geometry3k(folder: Path) -> Path:
    """Two problems of `train`, one without logic forms."""
    for number, answer in ((2, "C"), (10, "A")):
        place = folder / f"train/{number}"
        picture(place / "img_diagram.png")
        (place / "data.json").write_text(
            json.dumps(
                {
                    "id": number,
                    "problem_text": "Find x.",
                    "annotat_text": "Find $x$.",
                    "choices": ["1", "2", "\\sqrt{3}", "4"],
                    "answer": answer,
                    "problem_type_graph": ["Triangle"],
                    "problem_type_goal": ["Length"],
                }
            )
        )
    forms = {"text_logic_form": ["Find(x)"], "diagram_logic_form": ["Equals(LengthOf(Line(A, B)), 3)"]}
    (folder / "train/2/logic_form.json").write_text(json.dumps(forms))
    return folder


def geometry3k_hub(folder: Path) -> Path:
    row = {"images": [STORED], "problem": "<image>Find x.", "answer": "3"}
    table(folder / "data/validation-00000-of-00001.parquet", row, row)
    return folder


def mathvision(folder: Path) -> Path:
    """The authors' lines: a choice, and a free answer."""
    common = {"image": "images/1.png", "solution": None, "level": 2, "subject": "counting"}
    rows = [
        {
            "id": "1",
            "question": "How many? <image1> or <image1>",
            "options": ["2", "3"],
            "answer": "B",
            **common,
        },
        {"id": "2", "question": "Which? <image1>", "options": ["A", "B"], "answer": "A", **common},
    ]
    (folder / "data").mkdir(parents=True)
    (folder / "data/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture(folder / "images/1.png")
    return folder


def mathvision_hub(folder: Path) -> Path:
    row = {
        "id": "7",
        "question": "<image1> How many?",
        "options": [],
        "image": "images/7.jpg",
        "decoded_image": STORED,
        "answer": "12",
        "solution": "so",
        "level": 5,
        "subject": "algebra",
    }
    table(folder / "data/testmini-00000-of-00001-abc.parquet", row)
    return folder


def polymath(folder: Path) -> Path:
    row = {
        "image": STORED,
        "answer_option": "1, 2, 3, 4",
        "final_answer_range": "1-4",
        "final_answer": "3",
        "category": "odd_one_out",
    }
    table(folder / "data/test-00000-of-00001.parquet", row, {**row, "final_answer": None})
    return folder


def scemqa(folder: Path) -> Path:
    gold = "Answer (final answer highlighted)"
    choice = {
        "Math": [{"Question": "Where?\n\nA. a\nB. b", gold: "B", "ImagePath": "Math/1"}],
        "Physics": [{"Question": "Why?\nA. a", gold: "who knows", "ImagePath": "Physics/1"}],
    }
    free = {
        "Math_Free_Response": [
            {
                "Question": "How much?",
                gold: "\\answer{\\frac{1}{2}} \\answer{0.5} Half of it.",
                "ImagePath": "Math_Free_Response/1",
            }
        ]
    }
    picture(folder / "Multiple_Choice/Math/1.png")
    picture(folder / "Multiple_Choice/Physics/1.jpg")
    picture(folder / "Free_Response/Math_Free_Response/1.jpg")
    (folder / "Multiple_Choice/multiple_choice.json").write_text(json.dumps(choice))
    (folder / "Free_Response/free_response.json").write_text(json.dumps(free))
    return folder


def geo170k(folder: Path) -> Path:
    """Three items; the texts hold brackets and escaped quotes, on which a scanner may stumble."""
    question = '<image>\nWhat is "x" in [A, {B}?\nChoices:\nA: 1\nB: 2'
    rows = [
        {"image": "geo3k/1.png", "conversations": turns(question, "It is 2. Answer:A. No.\nAnswer:B")},
        {"image": "geo3k/1.png", "conversations": turns(question, "Hence the answer is option A.")},
        {"image": "geo3k/1.png", "conversations": turns(question, "Nobody knows \\ [.")},
    ]
    captions = [{"image": "geo3k/1.png", "conversations": turns("<image>\nDescribe it.", "A triangle.")}]
    (folder / "qa_tuning.json").write_text(json.dumps(rows, indent=1))
    (folder / "alignment.json").write_text(json.dumps(captions))
    picture(folder / "images/geo3k/1.png")
    return folder


def geo170k_hub(folder: Path) -> Path:
    row = {"image": "geo3k/1.png", "conversations": turns("<image>\nx?", "Answer:C")}
    table(folder / "data/qa_tuning-00000-of-00001-32a3.parquet", row)
    picture(folder / "images/geo3k/1.png")
    return folder


def mmk12(folder: Path) -> Path:
    row = {"id": "k-1", "question": "<image> Area?", "answer": " 12 ", "subject": "math", "image": STORED}
    table(folder / "data/train-00000-of-00001.parquet", row)
    return folder


def virl39k(folder: Path) -> Path:
    row = {
        "question": "<image><image> Same?",
        "answer": "\\boxed{\\frac{1}{2}}",
        "PassRate_32BTrained": 0.5,
        "PassRate_7BBase": -1.0,
        "category": "Spatial",
        "source": "made up",
        "qid": "q-1",
        "image": ["images/a.png", "images/b.png"],
    }
    table(folder / "39Krelease.parquet", row)
    picture(folder / "images/a.png")
    picture(folder / "images/b.png")
    return folder
