"""The size that one image of a Qwen-style row asks for: the rule of the model's own image processor.

A row's wish comes before the run's limits (`policy.min_pixels`, `policy.max_pixels`), which hold for all
images and for the visual tokens that are made of this one in the end.
"""

from __future__ import annotations

from collections.abc import Mapping

FACTOR = 28
"""Side of a visual token in pixels for Qwen2-VL and Qwen2.5-VL: 14 to a patch, 2 patches to a side."""
LEAST, MOST = 4 * FACTOR**2, 16384 * FACTOR**2
"""Pixels that qwen-vl-utils allows where a row says nothing."""


def item_size(width: int, height: int, wish: Mapping[str, int]) -> tuple[int, int]:
    """(width, height) of an image after `resized_height` with `resized_width`, or else `min_pixels` and
    `max_pixels`.

    Example: `item_size(1000, 500, {"max_pixels": 100_000})` is (420, 196). Raises ValueError for a size
    whose one side is more than 200 times the other.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    least, most = LEAST, MOST
    if "resized_height" in wish:
        width, height = wish["resized_width"], wish["resized_height"]
    else:
        least, most = wish.get("min_pixels", LEAST), wish.get("max_pixels", MOST)
    rows, columns = smart_resize(height, width, factor=FACTOR, min_pixels=least, max_pixels=most)
    return columns, rows
