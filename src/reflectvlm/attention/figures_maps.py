"""Heat maps drawn: per look a row, per time that the image is shown the image lit by the map, and the map
alone.

An image is darkened where it is not attended to, so that a heat map needs no colours; the map beside it has a
scale of greys with its numbers, one scale for all maps of a figure, which makes first look and look back
comparable. Everything is in percent of one thing, the attention of a look's tokens: a patch's number, the
scale, and the sum over patches in a title. Cells are drawn as they are, not smoothed: a visual token has one
value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from reflectvlm.attention.boxes import Box
from reflectvlm.attention.figures import INK
from reflectvlm.attention.files import new_figure
from reflectvlm.attention.maps import Heat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

UNIT = "% of the look's attention, per patch"
DARKEST = 0.22
"""Of an image's brightness, where nothing is attended to."""


def maps_figure(
    heats: Sequence[Heat], images: Sequence[Image.Image], title: str, asked: Sequence[Box] = ()
) -> Figure:
    """Rows are looks, mean over layers; columns are the places where images are shown. `asked` are boxes on
    the first image."""
    looks = list(dict.fromkeys(heat.look for heat in heats))
    shown = list(dict.fromkeys((heat.shown, heat.image) for heat in heats))
    top = max((float(np.nanmax(heat.mean)) for heat in heats), default=1.0)
    figure = new_figure(1.3 + 4.6 * len(shown), 0.9 + 2.4 * len(looks))
    panels = figure.subplots(len(looks), 2 * len(shown), squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for heat in heats:
        row, column = looks.index(heat.look), 2 * shown.index((heat.shown, heat.image))
        left, right = panels[row, column], panels[row, column + 1]
        left.imshow(lit(images[heat.image], heat.mean, top), interpolation="nearest")
        _boxes(left, images[heat.image], asked if heat.image == 0 else ())
        mapped = right.imshow(100 * heat.mean, cmap="Greys", vmin=0, vmax=100 * top, interpolation="nearest")
        _frame(right)
        _numbers(right, heat.mean, top)
        where = heat.shown if len(images) == 1 else f"{heat.shown}, image {heat.image + 1}"
        left.set_title(
            f"{heat.look}\n{where}: {100 * heat.share:.1f} %, all patches",
            fontsize=8.5,
            color=INK,
            loc="left",
            parse_math=False,
        )
        if column == 2 * len(shown) - 2:
            _bar(figure, mapped, right, fraction=0.046, pad=0.03)
    layers = f", mean over heads and {layers_said(heats[0].layers)}" if heats else ""
    _heading(figure, f"{title}\n{UNIT}{layers}")
    return figure


def layer_maps_figure(heats: Sequence[Heat], title: str) -> Figure:
    """Rows are looks at places, columns layers: maps alone, one scale of greys for all."""
    layers = heats[0].layers
    top = max(float(np.nanmax(heat.maps)) for heat in heats)
    figure = new_figure(1.6 + 1.25 * len(layers), 0.8 + 1.45 * len(heats))
    panels = figure.subplots(len(heats), len(layers), squeeze=False)
    for row, heat in enumerate(heats):
        for column, layer in enumerate(layers):
            axes = panels[row, column]
            mapped = axes.imshow(
                100 * heat.maps[column], cmap="Greys", vmin=0, vmax=100 * top, interpolation="nearest"
            )
            _frame(axes)
            if row == 0:
                axes.set_title(f"layer {layer}", fontsize=8, color=INK)
            if column == 0:
                axes.set_ylabel(f"{heat.look}\n{heat.shown}", fontsize=7.5, color=INK, parse_math=False)
    _bar(figure, mapped, panels.ravel().tolist(), fraction=0.02, pad=0.01)
    _heading(figure, f"{title}\n{UNIT}, in each layer, mean over heads")
    return figure


def layers_said(layers: Sequence[int]) -> str:
    """`layers_said((0, 1, 2)) == "layers 0 to 2"`"""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"


def lit(image: Image.Image, heat: Float[np.ndarray, "rows columns"], top: float) -> np.ndarray:
    """The image in greys, as bright as it is where attention is `top`, and dark where there is none; cells
    that were not shown are black."""
    grey = np.asarray(image.convert("L"), dtype=float) / 255
    scaled = np.where(np.isnan(heat), -DARKEST / (1 - DARKEST), np.nan_to_num(heat) / max(top, 1e-12))
    light = np.clip(DARKEST + (1 - DARKEST) * scaled, 0, 1)
    rows = np.minimum(np.arange(grey.shape[0]) * heat.shape[0] // grey.shape[0], heat.shape[0] - 1)
    columns = np.minimum(np.arange(grey.shape[1]) * heat.shape[1] // grey.shape[1], heat.shape[1] - 1)
    shown = (0.3 + 0.7 * grey) * light[np.ix_(rows, columns)]
    return np.repeat(shown[..., None], 3, axis=2)


def _bar(figure: Figure, mapped: AxesImage, axes: Any, fraction: float, pad: float) -> None:
    bar = figure.colorbar(mapped, ax=axes, fraction=fraction, pad=pad)
    bar.ax.tick_params(labelsize=7, colors=INK)
    bar.set_label(UNIT, fontsize=7.5, color=INK)


def _heading(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=9.5, color=INK, x=0.01, ha="left", parse_math=False)


def _boxes(axes: Axes, image: Image.Image, boxes: Sequence[Box]) -> None:
    from matplotlib.patches import Rectangle

    for box in boxes:
        corner = (box.left * image.width - 0.5, box.top * image.height - 0.5)
        size = (box.right - box.left) * image.width, (box.bottom - box.top) * image.height
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=2.2))
        axes.add_patch(
            Rectangle(corner, *size, fill=False, edgecolor="black", linewidth=1.1, linestyle=(0, (3, 2)))
        )


def _frame(axes: Axes) -> None:
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#9ca3af")


def _numbers(axes: Axes, heat: Float[np.ndarray, "rows columns"], top: float, most: int = 36) -> None:
    """In percent, where there is room for them."""
    if heat.size > most:
        return
    for (row, column), value in np.ndenumerate(heat):
        if not np.isnan(value):
            colour = "white" if value > 0.55 * top else "black"
            axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=7, color=colour)
