"""Figures over many answers: attention to visual tokens against length and by part, hallucination against
length.

Every figure has the number of answers in its legend and how far a mean can be trusted, as a band or a bar,
and its title says which: 95 % over answers, or the standard deviation over seeds (`spread.reach`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reflectvlm.attention.figures import INK, quiet
from reflectvlm.attention.files import new_figure
from reflectvlm.attention.spread import Row, reach, what_reaches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, Sequence[Row]]
"""Name -> rows along the length."""
Parts = Mapping[str, Mapping[str, Row]]
"""Name -> part of an answer -> its means."""

SEVERAL: Sequence[Mapping[str, Any]] = (
    {"color": "#1e3a8a", "linestyle": "-", "marker": "o"},
    {"color": "#b45309", "linestyle": (0, (6, 2)), "marker": "s"},
    {"color": "#0f766e", "linestyle": (0, (1, 1.5)), "marker": "^"},
    {"color": "#6b7280", "linestyle": (0, (4, 1, 1, 1)), "marker": "D"},
    {"color": "#111827", "linestyle": "-", "marker": "x"},
    {"color": "#be185d", "linestyle": (0, (3, 1)), "marker": "v"},
)
"""Of lines that are compared: models, or ways to look again."""
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")
GREYS = ("#374151", "#ffffff", "#d1d5db", "#f3f4f6", "#9ca3af", "#ffffff")
PARTS = {"before": "before", "inside": "inside", "after": "after", "all": "whole answer"}


def length_figure(curves: Curves, title: str, share: str = "visual", least: int = 5) -> Figure:
    """Name -> the rows of `readings.by_step`: mean attention to visual tokens as answers grow. A curve ends
    where fewer than `least` answers, or than all there are, are so long."""
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    for (name, rows), style in zip(curves.items(), _styles(len(curves)), strict=True):
        number = _answers(rows)
        known = [row for row in rows if (row["answers"] or 0) >= min(least, number)]
        at = [((row["from"] or 0) + (row["to"] or 0)) / 2 for row in known]
        _curve(axes, at, known, share, f"{name}, n = {number:,}", style)
    axes.set_xlabel(f"generated tokens (a curve ends below {least} answers)", fontsize=9, color=INK)
    axes.set_ylabel("share of attention", fontsize=9, color=INK)
    axes.set_ylim(bottom=0)
    _legend(axes)
    said = what_reaches([row for rows in curves.values() for row in rows])
    quiet(axes, f"{title}\nn: answers; bands: {said}")
    return figure


def parts_figure(parts: Parts, title: str) -> Figure:
    """Name -> the means of `readings.by_part`: attention to visual tokens before, inside and after, and what
    of it lies on the objects that were asked about."""
    figure = new_figure(10.5, 4.2)
    boxes = any("lift" in row for rows in parts.values() for row in rows.values())
    panels = figure.subplots(1, 2 if boxes else 1, squeeze=False)[0]
    _bars(panels[0], parts, "visual", "attention to visual tokens (plain share)")
    if boxes:
        _bars(panels[1], parts, "lift", "of it on what is asked about, over chance", base=1)
        low, high = panels[1].get_ylim()
        panels[1].set_ylim(min(low, 0.8), max(high, 1.2))  # a hundredth off chance shall look like one
        panels[1].axhline(1, color="black", linewidth=1.6)
        panels[1].annotate(
            "chance",
            (1, 1),
            xycoords=("axes fraction", "data"),
            xytext=(2, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="black",
        )
    said = what_reaches([row for rows in parts.values() for row in rows.values()])
    _heading(figure, f"{title}\nn: answers that have the part; error bars: {said}")
    handles, _ = panels[0].get_legend_handles_labels()
    labels = [_numbered(name, rows) for name, rows in parts.items()]
    figure.legend(
        handles,
        labels,
        loc="outside right upper",
        fontsize=8.5,
        frameon=False,
        labelcolor=INK,
        labelspacing=0.9,
    )
    return figure


def hallucination_figure(curves: Curves, title: str) -> Figure:
    """Name -> the rows of `hallucination.by_length` as mappings: CHAIR-i and recall against length."""
    figure = new_figure(9.5, 4.2)
    left, right = figure.subplots(1, 2, sharex=True)
    for (name, rows), style in zip(curves.items(), _styles(len(curves)), strict=True):
        for axes, key in ((left, "chair_i"), (right, "recall")):
            known = [row for row in rows if row[key] is not None]
            at = [row["length"] or 0 for row in known]
            _curve(axes, at, known, key, f"{name}, n = {_answers(rows):,}", style, most=1)
    for axes, what in ((left, "CHAIR-i: mentions of what is not there"), (right, "recall of what is there")):
        axes.set_xlabel("generated tokens", fontsize=9, color=INK)
        axes.set_ylim(0, None)
        quiet(axes, what)
    right.set_ylim(0, 1.03)
    _legend(left)
    said = what_reaches([row for rows in curves.values() for row in rows])
    _heading(figure, f"{title}\nn: answers, shorter ones with all they say; bands: {said}")
    return figure


def _curve(
    axes: Axes,
    at: Sequence[float],
    rows: Sequence[Row],
    key: str,
    label: str,
    style: Mapping[str, Any],
    most: float = np.inf,
) -> None:
    """A line through the rows' means, in a band; where the spread is unknown there is no band."""
    if not rows:
        return
    means = np.array([row[key] for row in rows], float)
    around = np.array([np.nan if (half := reach(row, key)) is None else half for row in rows], float)
    axes.plot(at, means, linewidth=1.8, markersize=4.5, label=label, **style)
    low, high = np.maximum(means - around, 0), np.minimum(means + around, most)
    axes.fill_between(at, low, high, color=style["color"], alpha=0.16, linewidth=0)


def _bars(axes: Axes, parts: Parts, key: str, title: str, base: float = 0) -> None:
    """Bars from `base` on, up or down, each with its error."""
    order = [part for part in PARTS if any(part in one for one in parts.values())]
    width = 0.8 / max(len(parts), 1)
    for number, (name, rows) in enumerate(parts.items()):
        known = [(place, rows[part]) for place, part in enumerate(order) if key in rows.get(part, {})]
        x = [place - 0.4 + width * (number + 0.5) for place, _ in known]
        means = np.array([row[key] for _, row in known], float)
        errors = np.array([reach(row, key) or 0 for _, row in known], float)
        look: dict[str, Any] = {"facecolor": GREYS[number % 6], "hatch": HATCHES[number % 6]}
        axes.bar(x, means - base, width * 0.92, bottom=base, edgecolor=INK, linewidth=0.8, label=name, **look)
        axes.errorbar(x, means, errors, fmt="none", ecolor="#b45309", elinewidth=1.4, capsize=2.5)
    axes.set_xticks(range(len(order)), [PARTS[part] for part in order])
    quiet(axes, title)


def _numbered(name: str, rows: Mapping[str, Row]) -> str:
    """With the number of answers of every part: "GRPO, n = 200", below it "before 3, inside 3, after 2"."""
    counts = {part: int(row["answers"] or 0) for part, row in rows.items()}
    parts = ", ".join(f"{part} {counts[part]:,}" for part in PARTS if part in counts and part != "all")
    return f"{name}\nn = {counts.get('all', 0):,}" + (f"; {parts}" if parts else "; no tagged region")


def _answers(rows: Sequence[Row]) -> int:
    return int(max((row["answers"] or 0 for row in rows), default=0))


def _heading(figure: Figure, title: str) -> None:
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left", parse_math=False)


def _styles(count: int) -> list[Mapping[str, Any]]:
    return [SEVERAL[number % len(SEVERAL)] for number in range(count)]


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8.5, frameon=False, labelcolor=INK, handlelength=3.4, loc="best")
