"""The curves of a run as one picture: small multiples, raw points light, their moving average bold.

Only matplotlib's Agg canvas and its objects are used, so nothing global (backend, style, open
figures) changes in the caller's process. Left out: interactive plots and comparison of runs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflectvlm.train.reflections import for_display

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEYS = (
    "reward",
    "accuracy",
    "back_rate",
    "layout_rate",
    "blocks/count",
    "blocks/tokens_each",
    "blocks/empty",
    "length/mean",
    "kl",
    "entropy",
    "loss",
    "grad_norm",
)
TITLES = {
    "reward": "reward",
    "accuracy": "accuracy",
    "back_rate": "answers with a look back",
    "layout_rate": "valid layout",
    "blocks/count": "looks per answer",
    "blocks/tokens_each": "tokens per look",
    "blocks/empty": "empty looks",
    "length/mean": "tokens per answer",
    "kl": "KL to the reference",
    "entropy": "entropy, nats",
    "loss": "loss",
    "grad_norm": "gradient norm",
}
RATES = ("accuracy", "back_rate", "layout_rate", "blocks/empty")

_TRAIN = "#2563eb"
_EVAL = "#ea580c"
_INK = "#374151"

Series = tuple[list[int], list[float]]


def curves(
    metrics_jsonl: Path,
    out: Path,
    keys: Sequence[str] | None = None,
    *,
    labels: Mapping[str, str] | None = None,
) -> Path:
    """Draw each of `keys` that occurs, and `eval/<key>` into the same panel, as a PNG at `out`. Without
    `keys` it is `KEYS`, those of blocks only in runs where they say something.

    A run without any of them gets a picture that says so: a plot never fails a training.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = read_series(metrics_jsonl)
    means = _means(series)
    told = for_display(means) if keys is None else means
    shown = [key for key in (KEYS if keys is None else keys) if key in told]
    columns = min(3, max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(3.9 * columns, 2.7 * rows), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    if not shown:
        figure.text(0.5, 0.5, "No metrics recorded.", ha="center", va="center", color=_INK)
    for index, key in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1)
        title = (labels or {}).get(key) or TITLES.get(key, key)
        _panel(axes, title, series.get(key), series.get(f"eval/{key}"), rate=key in RATES)
        if index >= len(shown) - columns:
            axes.set_xlabel("step", fontsize=8.5, color=_INK)
    temporary = out.with_name(f".{out.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, out)
    return out


def read_series(metrics_jsonl: Path) -> dict[str, Series]:
    """Steps and finite values of every key. Lines that are cut are passed over; of two values for
    one step the later line's counts."""
    points: dict[str, dict[int, float]] = {}
    lines = metrics_jsonl.read_bytes().splitlines() if metrics_jsonl.exists() else []
    for line in lines:
        try:
            row: Any = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or "step" not in row:
            continue
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(key, {})[row["step"]] = value
    return {key: ([*sorted(found)], [found[step] for step in sorted(found)]) for key, found in points.items()}


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of up to `window` values around each one; at the ends of as many as there are.

    Example: `moving_average([0, 3, 6], 3) == [1.5, 3.0, 4.5]`
    """
    half = window // 2
    near = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in near]


def _means(series: Mapping[str, Series]) -> dict[str, float]:
    """Means of all keys, training and evaluation as one."""
    together: dict[str, list[float]] = {}
    for key, (_, values) in series.items():
        together.setdefault(key.removeprefix("eval/"), []).extend(values)
    return {key: sum(values) / len(values) for key, values in together.items()}


def _panel(axes: Axes, title: str, train: Series | None, evaluated: Series | None, *, rate: bool) -> None:
    if train is not None:
        steps, values = train
        few = len(values) < 12
        window = 1 if few else max(3, len(values) // 15) | 1
        if not few:
            axes.plot(steps, values, color=_TRAIN, alpha=0.25, linewidth=0.9)
        marker = "o" if few else None
        smooth = moving_average(values, window)
        axes.plot(steps, smooth, color=_TRAIN, linewidth=1.8, marker=marker, markersize=3.5, label="train")
    if evaluated is not None:
        axes.plot(*evaluated, color=_EVAL, linewidth=1.2, marker="o", markersize=4.5, label="evaluation")
        if train is not None:
            axes.legend(fontsize=7.5, frameon=False, labelcolor=_INK, loc="best")
    if rate:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    _quiet(axes, title)


def _quiet(axes: Axes, title: str) -> None:
    # A key may hold "$": it is a name here, not a formula.
    axes.set_title(title, fontsize=10, color=_INK, loc="left", fontweight="bold", parse_math=False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    axes.tick_params(labelsize=8, colors=_INK, length=0)
    axes.locator_params(axis="x", nbins=6, integer=True)
    axes.locator_params(axis="y", nbins=5)
