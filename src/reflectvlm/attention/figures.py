"""Figures of one answer: shares along it, and layer by layer. Those over many answers are in
`figures_means.py`.

Lines differ in dashes and marks as well as in colour, regions are hatched, and maps grow evenly darker, so
that all of it can be read in black and white.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from reflectvlm.attention.files import new_figure
from reflectvlm.attention.places import KINDS
from reflectvlm.attention.trends import Trend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#374151"
STYLES: Mapping[str, Mapping[str, Any]] = {
    "image": {"color": "#1e3a8a", "linewidth": 2.4, "linestyle": "-"},
    "inserted": {"color": "#b45309", "linewidth": 2.0, "linestyle": "-", "marker": "o", "markersize": 3.5},
    "query": {"color": "#0f766e", "linewidth": 1.5, "linestyle": (0, (6, 2))},
    "generated": {"color": "#6b7280", "linewidth": 1.5, "linestyle": (0, (1, 1.5))},
    "before": {"color": "#9ca3af", "linewidth": 1.3, "linestyle": (0, (4, 1, 1, 1))},
}
SAID = {
    "image": "image",
    "inserted": "inserted image",
    "query": "question",
    "generated": "generated",
    "before": "before the image",
}


def trend_figure(made: Trend, title: str, region: str = "<back>") -> Figure:
    """Look-Back's figure, and below it the plain shares."""
    figure = new_figure(9.5, 6.2)
    above, below = figure.subplots(2, 1, sharex=True)
    shares = dict(zip(KINDS[1:], made.shares.T, strict=True))
    _lines(above, made, shares, region)
    _words(above, made)
    quiet(above, f"{title}\nas published: shares of what is attended to from the image on, mean of layers")
    _lines(below, made, dict(zip(KINDS, made.absolute.T, strict=True)), region)
    quiet(below, "plain shares of all attention")
    below.set_xlabel("generated token", fontsize=9, color=INK)
    below.set_xlim(-0.5, max(len(made.tokens) - 0.5, 0.5))
    return figure


def layers_figure(made: Trend, title: str, kind: str = "visual", region: str = "<back>") -> Figure:
    """Layers against tokens: the plain share of one kind."""
    layers = made.per_layer(kind)
    figure = new_figure(9.5, min(max(1.9 + 0.16 * len(layers), 2.6), 7.5))
    axes = figure.subplots()
    shown = axes.imshow(layers, aspect="auto", cmap="Greys", vmin=0, interpolation="nearest")
    for first, stop in made.regions:
        for x in (first - 0.5, stop - 0.5):
            axes.axvline(x, color="#b45309", linewidth=1.6, linestyle=(0, (5, 2)))
        axes.annotate(
            region,
            ((first + stop - 1) / 2, 1),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=8,
            color="#b45309",
            parse_math=False,
        )
    ticks = range(0, len(made.layers), max(1, len(made.layers) // 8))
    axes.set_yticks(list(ticks), [str(made.layers[tick]) for tick in ticks])
    axes.set_ylabel("layer", fontsize=9, color=INK)
    axes.set_xlabel("generated token", fontsize=9, color=INK)
    quiet(axes, title, grid=False, pad=16 if made.regions else 6)
    bar = figure.colorbar(shown, ax=axes, pad=0.01)
    bar.set_label(f"share on {'visual tokens' if kind == 'visual' else SAID[kind]}", fontsize=8.5, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK)
    return figure


def quiet(axes: Axes, title: str, grid: bool = True, pad: float = 6) -> None:
    axes.set_title(title, fontsize=9.5, color=INK, loc="left", parse_math=False, pad=pad)
    if grid:
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9ca3af")
    axes.tick_params(labelsize=8, colors=INK, length=2)


def _lines(axes: Axes, made: Trend, shares: Mapping[str, np.ndarray], region: str) -> None:
    for first, stop in made.regions:
        axes.axvspan(
            first - 0.5, stop - 0.5, facecolor="#f3f4f6", edgecolor="#d1d5db", hatch="////", zorder=0
        )
        axes.annotate(
            region,
            ((first + stop - 1) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -3),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9,
            color=INK,
            parse_math=False,
            bbox={"facecolor": "white", "edgecolor": "#d1d5db", "pad": 2},
        )
    for kind in ("before", "generated", "query", "image", "inserted"):
        if kind in shares and (kind != "inserted" or shares[kind].any()):
            shown = np.where(shares[kind] > 0, shares[kind], np.nan) if kind == "inserted" else shares[kind]
            axes.plot(shown, label=SAID[kind], **STYLES[kind])
    axes.set_ylim(0, max(0.05, 1.12 * max(float(np.max(one)) for one in shares.values())))
    axes.set_ylabel("share of attention", fontsize=9, color=INK)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        fontsize=8.5,
        frameon=False,
        labelcolor=INK,
        handlelength=3.4,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )


def _words(axes: Axes, made: Trend, most: int = 6) -> None:
    """Where the image is attended to most, each place above its neighbours: the token, and the one that it
    predicts; a space as `␣`."""
    image = np.maximum(made.shares[:, 0], made.shares[:, 3])
    padded = np.concatenate([[-1.0], image, [-1.0]])
    peaks = [n for n in range(len(image)) if padded[n] < image[n] >= padded[n + 2] and made.tokens[n]]
    said = [_spelled(token) for token in (*made.tokens, "")]
    for n in sorted(peaks, key=lambda n: -image[n])[:most]:
        follows = made.query == "token" and said[n + 1]
        axes.annotate(
            f"{said[n]}→{said[n + 1]}" if follows else said[n],
            (n, image[n]),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="black",
            parse_math=False,
        )


def _spelled(token: str) -> str:
    return "".join("␣" if letter.isspace() else letter for letter in token)[:10]
