"""What a check looks at of an image, without decoding it or with. Raises BadImage for one that is none.

`Named` opens nothing: a path must stay in the folder and name a file of a size that may be read, other values
must be what an image can be read from, and no connection is made. `Decoded` reads and decodes as training
will, and tells of pictures that can be used and may not look as their maker thought.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from reflectvlm.data.fetch import fetch
from reflectvlm.data.images import FORMATS, ImageLimits, RowImage, load_image

Odd: TypeAlias = Callable[[str, str], None]
"""Takes (reason, what is odd about the picture)."""

_SUFFIXES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
}
_TINY = 8
"""Pixels of a side below which nothing can be seen."""
_TURNED = 0x0112


@dataclass(frozen=True)
class Named:
    """Example: `Named(Path("data"), ImageLimits())("pages/17.png")`"""

    root: Path
    limits: ImageLimits

    @cached_property
    def _base(self) -> str:
        return os.path.abspath(self.root)

    def __call__(self, value: RowImage) -> None:
        if isinstance(value, str) and self._is_file(value):
            return
        if isinstance(value, Image.Image):
            return
        if (
            isinstance(value, str)
            and value[:8].lower().startswith(("http://", "https://"))
            and self.limits.urls
        ):
            return
        if isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
            self(value["path"])
            return
        # Whatever is left is wrong or held in the row itself: the reader says which, in its own words.
        fetch(value, self.root, self.limits)

    def _is_file(self, name: str) -> bool:
        """Certainly an image's file by its name and size. False says nothing."""
        if not name or ".." in name or name[0] == "/" or "://" in name or len(name) > 1000:
            return False
        try:
            status = os.stat(f"{self._base}/{name}")
        except (OSError, ValueError):
            return False
        return stat.S_ISREG(status.st_mode) and 0 < status.st_size <= self.limits.max_bytes


@dataclass(frozen=True)
class Decoded:
    """Example: `Decoded(Path("data"), ImageLimits(), odd=print)("pages/17.png")` is (640, 480)."""

    root: Path
    limits: ImageLimits
    odd: Odd

    def __call__(self, value: RowImage) -> tuple[int, int]:
        if isinstance(value, Image.Image):
            return load_image(value, self.root, self.limits).size
        data = fetch(value, self.root, self.limits)
        # With its path, so that what is wrong is told of the file and not of some bytes.
        path = value.get("path") if isinstance(value, Mapping) else value
        named = path if isinstance(path, str) and path[:5].lower() != "data:" else None
        size = load_image({"bytes": data, "path": named}, self.root, self.limits).size
        for reason, detail in _oddities(data, named, size):
            self.odd(reason, detail)
        return size


def _oddities(data: bytes, name: str | None, size: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """Of a picture that can be decoded."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        shown = f"Image {name!r}" if name and len(name) <= 300 else "An image"
        named = _SUFFIXES.get(os.path.splitext(name or "")[1].lower())
        found = "JPEG" if image.format == "MPO" else image.format
        if named is not None and found != named:
            yield "another format than named", f"{shown} is {found}, which its name does not say."
        if getattr(image, "is_animated", False) and image.format != "MPO":
            yield "several frames", f"{shown} has several frames or pages; the first counts."
        if min(size) < _TINY:
            yield "tiny image", f"{shown} has {size[0]} x {size[1]} pixels."
        if image.mode[0] in "IF" or image.mode in ("CMYK", "LA", "PA") or "transparency" in image.info:
            yield "converted image", f"{shown} is of mode {image.mode} and is shown as RGB, on white."
        if _exif(image).get(_TURNED, 1) != 1:
            yield "turned image", f"{shown} is turned upright by its EXIF entry."


def _exif(image: Image.Image) -> Mapping[int, Any]:
    try:
        return image.getexif()
    except Exception:  # noqa: BLE001 - boundary: what Pillow raises on entries that no picture needs
        return {}
