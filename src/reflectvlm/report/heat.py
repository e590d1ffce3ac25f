"""Where each token of an answer looked: attention to an image's visual tokens, in 8 bits.

Left out: how attention is captured (`reflectvlm.attention`).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from reflectvlm.types import Grid


@dataclass(frozen=True, kw_only=True, eq=False)
class Heat:
    """T tokens' attention to the R x C merged cells of one image.

    A token's largest weight is `peaks[t]`, and `levels` are weights in 255ths of it, so that a token that
    looks little shows where it looks all the same.
    """

    image: int
    rows: int
    columns: int
    levels: bytes
    """T x R x C, token by token in raster order."""
    peaks: tuple[float, ...]
    shares: tuple[float, ...]
    """Sum of each token's weights: how much of its attention is on the image."""

    def __post_init__(self) -> None:
        tokens, cells = len(self.peaks), self.rows * self.columns
        if len(self.levels) != tokens * cells or len(self.shares) != tokens:
            raise ValueError(
                f"Heat has {len(self.levels)} levels and {len(self.shares)} shares for {tokens} tokens of "
                f"{self.rows} x {self.columns} cells. Give one level per token and cell, one share per token."
            )

    @classmethod
    def of(cls, weights: Float[np.ndarray, "T V"], grid: Grid, image: int = 0) -> Heat:
        """From attention weights to the visual tokens of an image; the frames of a video are added up."""
        cells = weights.reshape(len(weights), grid.frames, -1).sum(1)
        peaks = cells.max(1, initial=0.0)
        scaled = cells / np.where(peaks > 0, peaks, 1.0)[:, None]
        return cls(
            image=image,
            rows=grid.rows,
            columns=grid.columns,
            levels=np.rint(255 * scaled).astype(np.uint8).tobytes(),
            peaks=tuple(peaks.tolist()),
            shares=tuple(cells.sum(1).tolist()),
        )

    def as_json(self) -> dict[str, Any]:
        """As the page reads it."""
        return {
            "image": self.image,
            "rows": self.rows,
            "columns": self.columns,
            "levels": base64.b64encode(self.levels).decode(),
            "peaks": [float(f"{peak:.3g}") for peak in self.peaks],
            "shares": [float(f"{share:.3g}") for share in self.shares],
        }
