"""The pictures of the tables: small multiples, one quantity each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tables import BASE, YARDSTICK, number, summary

COLOURS = {BASE: "#1b6ca8", YARDSTICK: "#c8553d", "transformers generate": "#7a7a7a"}
PANELS = {
    "rollout tokens/s": "rollout, tokens/s",
    "update tokens/s": "update, tokens/s",
    "step": "optimiser step, s",
    "peak": "peak memory, MB",
}


def comparison(found: Mapping[str, Any], file: Path) -> None:
    """A panel for each quantity, a bar for each side; the line in a bar goes from lowest to highest."""
    plt = _pyplot()
    whole = summary(found["runs"])
    figure, axes = plt.subplots(1, len(PANELS), figsize=(3 * len(PANELS), 3.2), constrained_layout=True)
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        sides = [side for side in whole if name in whole[side]]
        middle = [whole[side][name][0] for side in sides]
        reach = [
            [whole[side][name][0] - whole[side][name][1] for side in sides],
            [whole[side][name][2] - whole[side][name][0] for side in sides],
        ]
        colours = [COLOURS.get(side, "#8fb8d6") for side in sides]
        bars = axis.bar(sides, middle, yerr=reach, color=colours, capsize=3)
        axis.bar_label(bars, [number(value) for value in middle], padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1.15 * max(whole[side][name][2] for side in sides))
        axis.set_xticks(range(len(sides)), [side.replace(" ", "\n", 1) for side in sides], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found['about']['work']}; {found['about']['machine']}", fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def scaling(found: Mapping[str, Any], file: Path) -> None:
    """A column for each quantity that varies; seconds of rollout and update, and peak memory, below it."""
    plt = _pyplot()
    points = found["points"]
    names = list(dict.fromkeys(point["axis"] for point in points))
    rows = {"rollout": "rollout, s", "update": "update, s", "peak": "peak memory, MB"}
    size = (3 * len(names), 2.4 * len(rows))
    figure, axes = plt.subplots(
        len(rows), len(names), figsize=size, squeeze=False, sharey="row", constrained_layout=True
    )
    for column, name in enumerate(names):
        for row, (value, title) in enumerate(rows.items()):
            axis = axes[row][column]
            for side in (BASE, YARDSTICK):
                mine = [point for point in points if point["axis"] == name and side in point["runs"]]
                x = [point["value"] for point in mine]
                y = [summary([point["runs"][side]])[side][value][0] for point in mine]
                axis.plot(x, y, marker="o", markersize=4, color=COLOURS[side], label=side)
            _log(axis, sorted({point["value"] for point in points if point["axis"] == name}))
            axis.set_xlabel(name if row == len(rows) - 1 else "", fontsize=9)
            axis.set_ylabel(title if column == 0 else "", fontsize=9)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"around {found['about']['base']}; {found['about']['machine']}", fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _log(axis: Any, ticks: list[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot
