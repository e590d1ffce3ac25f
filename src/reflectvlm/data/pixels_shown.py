"""An image in a terminal: two pixels to a character, its upper half in one colour, its ground in another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from rich.text import Text

HALF = "▀"
"""U+2580: the upper half of a character's box."""


def half_blocks(image: Image.Image, columns: int) -> Text:
    """At most `columns` wide and as many lines high as half of that; small images keep their size.

    Example: a picture of 4 x 4 pixels is two lines of four characters.
    """
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    small = image.convert("RGB")
    small.thumbnail((columns, columns))
    if small.height % 2:  # the last line's lower half shows what is above it once more
        taller = Image.new("RGB", (small.width, small.height + 1))
        taller.paste(small, (0, 1))
        taller.paste(small, (0, 0))
        small = taller
    shown, pixels = Text(no_wrap=True), np.asarray(small)
    for row in range(0, small.height, 2):
        for column in range(small.width):
            upper, lower = (Color.from_rgb(*pixels[row + half, column].tolist()) for half in (0, 1))
            shown.append(HALF, Style(color=upper, bgcolor=lower))
        shown.append("\n")
    return shown
