"""Figures and numbers on disk: PNG and SVG whose bytes depend on nothing but what is drawn, JSON and CSV.

Only matplotlib's Agg canvas and its objects are used, so nothing global changes in the caller's process, but
for the salt of SVG ids while a file is written.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """In inches, with its own canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """`name.png` and `name.svg`. The same figure gives the same bytes, with one version of matplotlib."""
    import matplotlib

    made = []
    with matplotlib.rc_context({"svg.hashsalt": "reflectvlm"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            file = io.BytesIO()
            figure.savefig(file, format=kind, metadata=metadata)
            made.append(write(folder / f"{name}.{kind}", file.getvalue()))
    return made


def save_json(values: Any, file: Path) -> Path:
    """NaN as null, arrays as lists, numbers with six figures."""
    return write(file, (json.dumps(plain(values), indent=1, ensure_ascii=False) + "\n").encode())


def save_csv(rows: Sequence[Mapping[str, Any]], file: Path) -> Path:
    """One line per mapping; the columns are all keys in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: plain(value) for key, value in row.items()} for row in rows)
    return write(file, text.getvalue().encode())


def write(file: Path, data: bytes) -> Path:
    """Whole or not at all. Raises ValueError, naming the file, where the folder cannot be written."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, file)
    except OSError as error:
        raise ValueError(
            f"{file} cannot be written: {error.strerror or error}. Name another out=FOLDER."
        ) from error
    return file


def plain(value: Any) -> Any:
    """What JSON can write."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value
