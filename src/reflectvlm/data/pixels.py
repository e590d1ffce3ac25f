"""Any Pillow mode to RGB, without losing what a plain `convert("RGB")` loses.

| mode | becomes |
|---|---|
| 16 bits of grey (`I;16…`) | value // 257: the full range 0…65535 onto 0…255, the same for every image |
| 32-bit integers, floats (`I`, `F`) | their own least…greatest value onto 0…255 (no range is declared) |
| anything with transparency | laid onto white |
| the rest (`1`, `L`, `P`, `CMYK`, `YCbCr`, `LAB`, …) | Pillow's conversion |

Left out: colour profiles are ignored, as the vision models' own processors ignore them.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """A new or the same image in mode RGB. Raises ValueError for floats that are not finite."""
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image) // 257)
    if image.mode in ("I", "F"):
        return _grey(_stretched(np.asarray(image)))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _onto_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _stretched(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("the pixels hold NaN or infinity")
    span = high - low
    return (values.astype(np.float64) - low) * (255.0 / span) if span > 0 else np.zeros(values.shape)


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


def _onto_white(image: Image.Image) -> Image.Image:
    # Pillow has no way from La or PA straight to RGBA; both have one over their plain partner.
    if image.mode == "La":
        image = image.convert("LA")
    layer = image.convert("RGBA")
    page = Image.new("RGB", layer.size, (255, 255, 255))
    page.paste(layer, mask=layer.getchannel("A"))
    return page
