"""Run folders for tests of the report: written by hand, so that each test says what is in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

WRONG = "<think>a</think> \\boxed{2}"
RIGHT = "<think>see</think> <back>upper left 4</back> \\boxed{4}"


def row(
    step: int, sample: str, text: str, *, right: bool = True, group: int = 1, **more: Any
) -> dict[str, Any]:
    """One line of `samples.jsonl`; every character is a token, with a log-prob of -0.5."""
    accuracy = 1.0 if right else 0.0
    return {
        "step": step,
        "sample": sample,
        "question": f"What is in {sample}?",
        "answer": "4",
        "text": text,
        "reward": 0.9 * accuracy + 0.1,
        "parts": {"accuracy": accuracy, "format": 1.0},
        "scored": True,
        "stop": "eos",
        "length": len(text) + 1,
        "inserted": 0,
        "group": group,
        "policy_version": step,
        "images": [],
        "ids": [1] * (len(text) + 1),
        "offsets": list(range(len(text))),
        "logprobs": [-0.5] * len(text) + [-0.01],
        "blocks": [],
        "grids": [[1, 2, 2]],
    } | more


def run_folder(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]] = (),
    *,
    tag: str = "<back>",
    recipe: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """A run's folder with these logs; JSON is YAML, too."""
    path.mkdir(parents=True)
    for name, lines in (("samples.jsonl", rows), ("metrics.jsonl", metrics)):
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (path / "recipe.yaml").write_text(json.dumps({"tag": tag, "steps": 20, **(recipe or {})}))
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def picture(path: Path, color: str = "white") -> str:
    """Keeps a 32 x 32 page of four quarters in a run's folder; returns its digest."""
    page = Image.new("RGB", (32, 32), color)
    page.paste("black", (0, 0, 16, 16))
    digest = hashlib.sha256(color.encode()).hexdigest()
    (path / "sample_images").mkdir(parents=True, exist_ok=True)
    page.save(path / "sample_images" / f"{digest}.png")
    return digest


def curve(keys: Sequence[str], steps: int = 20) -> list[dict[str, float]]:
    """Metrics that grow from 0 to 1, and held-out ones every fifth step."""
    lines: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        values = dict.fromkeys(keys, step / steps)
        lines.append({"step": step} | values)
        if step % 5 == 0:
            lines.append({"step": step} | {f"eval/{key}": value for key, value in values.items()})
    return lines
