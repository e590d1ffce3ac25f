"""Small made-up files of the mathematics, counting and pair benchmarks, in each form their loaders read."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from reflectvlm.eval.types import Item, Reply


def png(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(shade))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def stored(shade: int = 0, path: str | None = None) -> dict[str, Any]:
    """An image as the hub's tables hold it."""
    return {"bytes": png(shade), "path": path}


def replies(items: Sequence[Item], *texts: str) -> list[Reply]:
    return [Reply(item=item, text=text) for item, text in zip(items, texts, strict=True)]


class Scripted:
    """A language model that says one thing after the other, and remembers what it was asked."""

    def __init__(self, *told: str | None) -> None:
        self.told = list(told)
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[str], /) -> list[str | None]:
        self.asked += prompts
        return [self.told.pop(0) for _ in prompts]


MATHVISTA = [
    {
        "pid": "1",
        "question": "How far?",
        "image": "images/1.jpg",
        "choices": None,
        "unit": "m",
        "precision": 1.0,
        "answer": "1.2",
        "question_type": "free_form",
        "answer_type": "float",
        "metadata": {"task": "textbook", "skills": ["algebra", "logic"], "language": "english"},
    },
    {
        "pid": "2",
        "question": "Which angle?",
        "image": "images/2.jpg",
        "choices": ["135", "140", "1450"],
        "unit": None,
        "precision": None,
        "answer": "140",
        "question_type": "multi_choice",
        "answer_type": "text",
        "metadata": {"task": "geometry", "skills": ["algebra"], "language": "english"},
    },
    {
        "pid": "3",
        "question": "How many?",
        "image": "images/3.jpg",
        "choices": None,
        "unit": None,
        "precision": None,
        "answer": "4",
        "question_type": "free_form",
        "answer_type": "integer",
        "metadata": {"task": "geometry", "skills": [], "language": "chinese"},
    },
    {
        "pid": "4",
        "question": "Which years?",
        "image": "images/4.jpg",
        "choices": None,
        "unit": None,
        "precision": None,
        "answer": "[2007, 2008]",
        "question_type": "free_form",
        "answer_type": "list",
        "metadata": {"task": "chart", "skills": ["logic"], "language": "english"},
    },
]


def mathvista_files(folder: Path, queries: bool = True) -> None:
    """The official repository's `data`, below `folder`."""
    write_json(folder / "testmini.json", {row["pid"]: row for row in MATHVISTA})
    if queries:
        write_json(folder / "query.json", {row["pid"]: f"Q{row['pid']}" for row in MATHVISTA})
    picture(folder / "images/1.jpg")


def mathvista_hub(folder: Path) -> None:
    rows = [{**row, "query": f"Hub {row['pid']}", "decoded_image": stored(9)} for row in MATHVISTA]
    write_parquet(folder / "data/testmini-00000-of-00001-abc.parquet", rows)


def mathverse_row(index: int, version: str, answer: str, **changed: Any) -> dict[str, Any]:
    return {
        "sample_index": str(index),
        "problem_index": "1",
        "problem_version": version,
        "question": "What?\nChoices:\nA:40°\nB:60°",
        "image": "" if version == "Text Only" else f"images_version_1-4/image_{index}.png",
        "answer": answer,
        "question_type": "multi-choice",
        "metadata": {"split": "testmini", "source": "s", "subject": "Plane Geometry", "subfield": "Angle"},
        "query_wo": f"wo {index}",
        "query_cot": f"cot {index}",
        "question_for_eval": f"for eval {index}",
        **changed,
    }


MATHVERSE = [
    mathverse_row(1, "Text Dominant", "B"),
    mathverse_row(2, "Vision Only", "A"),
    mathverse_row(
        3,
        "Vision Only",
        "14",
        question="",
        question_type="free-form",
        metadata={"subject": "Solid Geometry", "subfield": "Length"},
    ),
]
TEXT_ONLY = [mathverse_row(1, "Text Only", "B")]


def mathverse_files(folder: Path) -> None:
    write_json(folder / "testmini.json", MATHVERSE)
    write_json(folder / "testmini_text_only.json", TEXT_ONLY)
    picture(folder / "images/images_version_1-4/image_1.png")


def mathverse_hub(folder: Path) -> None:
    write_parquet(folder / "testmini.parquet", [{**row, "image": stored()} for row in MATHVERSE])
    write_parquet(folder / "testmini_text_only.parquet", TEXT_ONLY)


MATHVISION = [
    {
        "id": "4",
        "question": "How many?\n<image1>",
        "options": [],
        "answer": "6",
        "solution": None,
        "level": 1,
        "subject": "counting",
        "image": "images/4.jpg",
    },
    {
        "id": "6",
        "question": "Which picture?\n<image1>",
        "options": ["A", "B", "C", "D", "E"],
        "answer": "D",
        "solution": None,
        "level": 3,
        "subject": "logic",
        "image": "images/6.jpg",
    },
    {
        "id": "91",
        "question": "How long? <image1>",
        "options": ["6", r"\frac{1}{2}"],
        "answer": "B",
        "solution": None,
        "level": 1,
        "subject": "logic",
        "image": "images/91.jpg",
    },
]


def mathvision_files(folder: Path) -> None:
    """The official repository: `data/test.jsonl` beside `images`."""
    path = folder / "data/test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in MATHVISION), "utf-8")
    picture(folder / "images/4.jpg")


def mathvision_hub(folder: Path, split: str = "test") -> None:
    rows = [{**row, "level": str(row["level"]), "decoded_image": stored(7)} for row in MATHVISION]
    write_parquet(folder / f"data/{split}-00000-of-00001.parquet", rows)


def mathvision_table(folder: Path) -> None:
    """Look-Back's table: image 4 lies in the folder, image 6 only in the table."""
    picture(folder / "images/4.jpg")
    encoded = base64.b64encode(png(5)).decode()
    lines = [
        "index\timage\tquestion\tanswer\tcategory\tlevel\tchoices",
        f"4\t{encoded}\tHow many?\t6\tcounting\t1.0\t[]",
        f"6\t{encoded}\t\"Which?\nA. one\"\tD\tlogic\t3\t\"['1', '2', '3', '40']\"",
    ]
    (folder / "MathVision.tsv").write_text("\n".join(lines) + "\n", "utf-8")


def wemath_row(problem: str, key: str, answer: str, concept: str = "Area of Circles") -> dict[str, Any]:
    return {
        "ID": problem,
        "split": "testmini",
        "knowledge concept": concept,
        "question": f"What of {problem} {key}?",
        "option": "A. 3, 4;B. 400; C. 5;    D. No correct answer",
        "answer": answer,
        "image_path": f"{key[:6]}/image/{problem}-{key}.png",
        "key": key,
        "question number": 1,
        "knowledge concept description": "",
    }


def wemath_rows(problems: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """All parts of problems with 2 or 3 steps; the gold answer of each is A."""
    return [
        wemath_row(problem, f"{steps}steps_{part}", "A")
        for problem, steps in problems
        for part in [*map(str, range(1, steps + 1)), "multi"]
    ]


def wemath_files(folder: Path, rows: Sequence[dict[str, Any]], nodes: bool = True) -> None:
    write_json(folder / "testmini.json", rows)
    if nodes:
        node = {"root2": "Calculation", "full node": "Plane Figures_Calculation_Areas_Area of Circles"}
        write_json(folder / "knowledge_structure_nodes.json", [node])


def hallusion_row(
    category: str, figure: str, question: str, answer: str, visual: str = "1", place: str = "0"
) -> dict[str, Any]:
    bare = category == "VS" and figure == "0"
    return {
        "category": category,
        "subcategory": "chart",
        "visual_input": "0" if bare else visual,
        "set_id": place,
        "figure_id": figure,
        "sample_note": "n",
        "question_id": question,
        "question": "In 2019, is A larger? Is it?",
        "gt_answer_details": "A is larger.",
        "gt_answer": answer,
        "filename": None if bare else f"./hallusion_bench/{category}/chart/{place}_{figure}.png",
    }


HALLUSION = [
    hallusion_row("VD", "0", "0", "1"),
    hallusion_row("VD", "0", "1", "0"),
    hallusion_row("VD", "1", "0", "0", visual="2"),
    hallusion_row("VD", "1", "1", "1", visual="2"),
    hallusion_row("VS", "0", "0", "1"),
    hallusion_row("VS", "1", "0", "1"),
    hallusion_row("VS", "2", "0", "0", visual="2"),
]


def hallusion_files(folder: Path, pictures: str = "") -> None:
    write_json(folder / "HallusionBench.json", HALLUSION)
    picture(folder / pictures / "hallusion_bench/VD/chart/0_0.png")


def hallusion_hub(folder: Path) -> None:
    shown = [{**row, "image": stored()} for row in HALLUSION if row["filename"]]
    write_parquet(folder / "data/image-00000-of-00001.parquet", shown)
    bare = [row for row in HALLUSION if not row["filename"]]
    write_parquet(folder / "data/non_image-00000-of-00001.parquet", bare)


TALLYQA = [
    {
        "answer": 4,
        "data_source": "imported_genome",
        "image": "VG_100K_2/24.jpg",
        "image_id": 924,
        "issimple": False,
        "question": "How many headlights does the bus have?",
        "question_id": 30095774,
    },
    {
        "answer": 2,
        "data_source": "amt",
        "image": "VG_100K/2.jpg",
        "image_id": 92,
        "issimple": True,
        "question": "How many dogs?",
        "question_id": 30095775,
    },
]


def tallyqa_files(folder: Path) -> None:
    write_json(folder / "test.json", TALLYQA)
    picture(folder / "VG_100K/2.jpg")


def tallyqa_hub(folder: Path) -> None:
    questions = [
        {"question": row["question"], "answer": str(row["answer"]), "is_simple": row["issimple"]}
        for row in TALLYQA
    ]
    write_parquet(folder / "data/test-00000-of-00001.parquet", [{"image": stored(3), "qa": questions}])


def sharegpt_row(name: str, answer: str, image: str = "images/7.png") -> dict[str, Any]:
    return {
        "id": name,
        "images": [image],
        "messages": [
            {"role": "user", "content": f"<image>How many in {name}?"},
            {"role": "assistant", "content": answer},
        ],
    }


GEOMATH = [
    {"id": "g1", "image": "geo/1.png", "problem": "Find x.", "solution": "12"},
    {"id": "g2", "image": ["geo/2.png"], "problem": "Which?", "solution": "B"},
    {"id": "g2", "image": "geo/3.png", "problem": "Length?", "solution": "2.5"},
]


def geomath_files(folder: Path) -> None:
    write_json(folder / "test_jsons/Structure-Perception-id-test-820.json", GEOMATH)
    picture(folder / "test_images/geo/1.png")
