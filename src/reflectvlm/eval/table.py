"""The table of an evaluation: one row a task, a column for each scorer, and what is not in the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reflectvlm.eval.result import TaskResult, mean_interval, partly_scored, write_aside
from reflectvlm.eval.types import Summary
from reflectvlm.train.table import Table, visible

NONE = "–"
"""Not scored."""
_LISTED = 20


def table_of(results: Sequence[TaskResult], title: str) -> Table:
    """Shares in per cent, points as they are; `differ` counts the replies that two scorers mark
    differently."""
    names = list(dict.fromkeys(name for result in results for name in result.marks))
    last = names[-1]
    table = Table(
        title,
        ("task", "figure", "items", *names, f"{last} 95 %", "differ", "not scored", "no image", "no reply"),
    )
    for result in results:
        headline = result.summaries[names[0]].headline if names[0] in result.summaries else ""
        cells = [shown(result.summaries.get(name)) for name in names]
        table.add(
            result.name,
            headline,
            str(len(result.items)),
            *cells,
            _range(result, last),
            str(len(result.differing)),
            _unscored(result),
            str(len(result.missing)),
            str(len(result.absent)),
        )
    return table


def shown(summary: Summary | None) -> str:
    """The headline as a cell."""
    value = None if summary is None else summary.values.get(summary.headline)
    if summary is None or value is None:
        return NONE
    return f"{100 * value:.2f}" if summary.unit == "share" else f"{value:.2f}"


def notes(results: Sequence[TaskResult]) -> list[str]:
    """What the figures do not say: which items have no image, which no reply, and why nothing was scored."""
    lines = []
    for result in results:
        if result.missing:
            lines.append(f"{result.name}: no image for {_some(list(result.missing))}; each counts as wrong")
        if result.absent:
            lines.append(f"{result.name}: no reply to {_some(result.absent)}; each counts as wrong")
        for name, marks in result.marks.items():
            unscored = [mark for mark in marks if mark.value is None]
            whys = sorted({mark.note for mark in unscored if mark.note})
            if unscored:
                why = f": {visible(whys[0][:200])}" if whys else ""
                lines.append(
                    f"{result.name}: {name} has not scored {len(unscored)} of {len(marks)} replies{why}"
                )
            if count := partly_scored(result, name):
                lines.append(
                    f"{result.name}: {name} leaves {count} of {len(result.items)} items out of avg@k and "
                    "pass@k, of which not every reply is scored"
                )
    return lines


def write_table(results: Sequence[TaskResult], title: str, about: Mapping[str, Any], folder: Path) -> None:
    """`table.md`: the table, its notes, and what the replies were made with."""
    parts = [table_of(results, title).markdown]
    if said := notes(results):
        parts.append("\n".join(f"- {line}" for line in said) + "\n")
    if about:
        parts.append("\n".join(f"- {name}: {_cut(value)}" for name, value in about.items()) + "\n")
    write_aside(folder / "table.md", "\n".join(parts))


def _range(result: TaskResult, scorer: str) -> str:
    """Of the headline, in its unit, where that is the mean of the marks; else there is none."""
    summary = result.summaries.get(scorer)
    mean = mean_interval(result, scorer) if summary is not None and summary.mean else None
    if summary is None or mean is None:
        return NONE
    scale, digits = (100, 1) if summary.unit == "share" else (1, 2)
    return f"{scale * mean.low:.{digits}f} – {scale * mean.high:.{digits}f}"


def _unscored(result: TaskResult) -> str:
    counts = {name: sum(mark.value is None for mark in marks) for name, marks in result.marks.items()}
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "0"


def _some(ids: Sequence[str]) -> str:
    more = f", … ({len(ids)} in all)" if len(ids) > _LISTED else ""
    return visible(", ".join(ids[:_LISTED])) + more


def _cut(value: Any) -> str:
    text = visible(" ".join(str(value).split()))
    return text if len(text) <= 300 else f"{text[:299]}…"
