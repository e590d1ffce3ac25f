"""Predictions of any tool, recognised by what is in the file and never by its name.

    reflectvlm     JSON lines with id, question, text (`predictions.py`)
    Look-Back      {"results": [{id, question, answer or gt, prediction or response, …}], …}, or the list
    VLMEvalKit     a table with index, prediction, and mostly question, answer: xlsx, tsv, csv or json
    lmms-eval      the samples log: JSON lines with doc_id, target, and resps or filtered_resps; what the
                   row in doc calls itself (question_id, with its category for POPE; id, pid, …) counts first

Gold answers are taken from the file where it has them; with a task they are the task's. Left out: pickles,
which run what is in them, and log-likelihoods, which are no replies. An xlsx file needs openpyxl.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from reflectvlm.eval.predictions import NEEDED, OURS, Prediction, Predictions, numbered, read_lines

Row: TypeAlias = Mapping[str, Any]

_REPLIES = ("prediction", "response", "output", "model_output")
_GOLD = ("answer", "gt", "gt_answer", "ground_truth", "target", "gold")
_ROW_NAMES = ("question_id", "id", "index", "pid", "sample_index")
_LONGEST_CELL = 2**27


def read_predictions(path: str | Path) -> Predictions:
    """Raises ValueError in one line for a file that holds none."""
    path = Path(path).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"{path} cannot be read: {why}. Name a file of predictions.") from error
    rows = _rows(data, path)
    kind = next((kind for kind, knows in _KINDS.items() if knows(rows[0])), None) if rows else None
    if kind is None:
        what = f"its first row has {_names(rows[0])}" if rows else "it has no rows"
        raise ValueError(
            f"{path} holds no predictions that are known here: {what}. Known are JSON lines of "
            f"`reflectvlm eval` "
            "(id, question, text), Look-Back's results (answer, prediction), VLMEvalKit's tables (index, "
            "prediction) and lmms-eval's samples (doc_id, resps)."
        )
    if kind == OURS:
        return Predictions(path=path, kind=kind, lines=read_lines(data, path), card=_card(path))
    read = {"lmms-eval": _lmms, "VLMEvalKit": _vlmevalkit, "Look-Back": _lookback}[kind]
    lines = [line for place, row in enumerate(rows, start=1) for line in read(row, f"{path}, row {place}")]
    return Predictions(path=path, kind=kind, lines=numbered(lines))


_KINDS: Mapping[str, Callable[[Row], bool]] = {
    OURS: lambda row: row.keys() >= NEEDED,
    "lmms-eval": lambda row: bool(
        row.keys() & {"doc_id", "doc"} and row.keys() & {"resps", "filtered_resps"}
    ),
    "VLMEvalKit": lambda row: row.keys() >= {"index", "prediction"},
    "Look-Back": lambda row: _key(row, _REPLIES) is not None and _key(row, _GOLD) is not None,
}


# -- one row of each ------------------------------------------------------------------------------


def _lookback(row: Row, place: str) -> list[Prediction]:
    reply = _key(row, _REPLIES)
    if reply is None:
        raise ValueError(f"{place} has no prediction, as the rows before it have. Repair the file.")
    gold = _key(row, _GOLD)
    return [
        Prediction(
            id=_id(row.get("id", row.get("index", place.rpartition(" ")[2]))),
            question=_text(row.get("question")),
            answer=_text(row[gold]) if gold else "",
            text=_text(row[reply]),
        )
    ]


def _vlmevalkit(row: Row, place: str) -> list[Prediction]:
    if "index" not in row or "prediction" not in row:
        raise ValueError(
            f"{place} has no index or no prediction, as the rows before it have. Repair the file."
        )
    return [
        Prediction(
            id=_id(row["index"]),
            question=_text(row.get("question")),
            answer=_text(row.get("answer")),
            text=_text(row["prediction"]),
        )
    ]


def _lmms(row: Row, place: str) -> list[Prediction]:
    inside = row.get("doc")
    doc: Row = inside if isinstance(inside, Mapping) else {}
    named = _named(doc)
    id = row.get("doc_id", doc.get("doc_id", next(iter(named.values()), None)))
    if id is None:
        raise ValueError(f"{place} has no doc_id, as the rows before it have. Repair the file.")
    texts = _flat(row.get("resps") or row.get("filtered_resps"))
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{place} has no texts as its resps, so it is no reply of a model that writes. Log a task "
            f"that generates."
        )
    question = doc.get("question", row.get("input"))
    return [
        Prediction(
            id=_id(id),
            question=question if isinstance(question, str) else "",
            answer=_text(row.get("target")),
            text=text,
            named=named,
        )
        for text in texts
    ]


def _named(doc: Row) -> dict[str, str]:
    """What a data set's row calls itself; POPE counts the questions of each category on its own."""
    found = {name: _id(doc[name]) for name in _ROW_NAMES if isinstance(doc.get(name), str | int | float)}
    if "question_id" in found and doc.get("category"):
        found = {"category/question_id": f"{doc['category']}/{found['question_id']}", **found}
    return found


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [one for part in value for one in _flat(part)]
    return [] if value is None else [value]


# -- rows of a file -------------------------------------------------------------------------------


def _rows(data: bytes, path: Path) -> Sequence[Row]:
    if data.startswith(b"PK\x03\x04"):
        return _xlsx(data, path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is neither UTF-8 text nor an xlsx table (byte {error.start}). Name a file of "
            f"predictions; "
            "pickles are not read."
        ) from error
    start = text.lstrip()[:1]
    return _json(text, path) if start in ("{", "[") else _table(text, path)


def _json(text: str, path: Path) -> Sequence[Row]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return _json_lines(text, path)
    if isinstance(whole, Mapping) and isinstance(whole.get("results"), list):
        whole = whole["results"]
    if isinstance(whole, Mapping) and all(isinstance(column, Mapping) for column in whole.values()):
        return [  # a data frame by columns: {"index": {"0": …}, "prediction": {"0": …}}
            {name: column.get(place) for name, column in whole.items()}
            for place in next(iter(whole.values()), {})
        ]
    rows = whole if isinstance(whole, list) else [whole]
    return [row for row in rows if isinstance(row, Mapping)]


def _json_lines(text: str, path: Path) -> Sequence[Row]:
    rows: list[Row] = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and rows:
                continue  # without a line end: cut when its process was killed
            raise ValueError(
                f"{path}:{number} is no JSON: {str(error).splitlines()[0]}. Remove that line, or name "
                f"another file."
            ) from error
        if not isinstance(row, Mapping):
            raise ValueError(  # noqa: TRY004  a file that a user has
                f"{path}:{number} is no JSON object. Remove that line, or name another file."
            )
        rows.append(row)
    return rows


def _table(text: str, path: Path) -> Sequence[Row]:
    head = text.partition("\n")[0]
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        found = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in head else ",")
        return [{key: value for key, value in row.items() if key is not None} for row in found]
    except csv.Error as error:
        raise ValueError(f"{path} is no table: {error}. Name a file of predictions.") from error
    finally:
        csv.field_size_limit(before)


def _xlsx(data: bytes, path: Path) -> Sequence[Row]:
    try:
        import openpyxl
    except ImportError as error:
        raise ValueError(
            f"{path} is an xlsx table, which openpyxl reads, and that is not installed: "
            "pip install 'reflectvlm[xlsx]'. VLMEvalKit writes tsv with PRED_FORMAT=tsv."
        ) from error
    try:
        sheet = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True).worksheets[0]
        head, *body = sheet.iter_rows(values_only=True)
    except Exception as error:  # boundary: openpyxl raises anything on a file that is none, or is cut
        raise ValueError(f"{path} is no xlsx table that can be read. Write it again.") from error
    names = [str(name) for name in head]
    return [dict(zip(names, row, strict=False)) for row in body if any(cell is not None for cell in row)]


def _card(path: Path) -> Mapping[str, Any]:
    """The card beside a file of ours; empty where there is none."""
    try:
        found = json.loads(path.with_name(f"{path.name}.card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(row: Row, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _names(row: Row) -> str:
    shown = [str(name)[:40] for name in row][:12]
    return ", ".join(shown) or "no columns"


def _id(value: Any) -> str:
    """A spreadsheet may make 17 out of `17` and 17.0 out of that."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _text(value: Any) -> str:
    """A cell as text; empty for none, and for the NaN that a data frame has for none."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return _id(value)
