"""`load_image`: whatever a row calls an image -> an upright RGB image within limits, or a `BadImage`.

Pillow opens a picture lazily: a cut file fails only at `load`, and a 173-byte PNG can ask for 432 MB
of pixels. So the size is checked between `open` and `load`, and everything a decoder raises on
hostile bytes becomes one readable line. Of an animation or a multi-page file, the first frame counts.

Left out: formats beyond `FORMATS`. Pillow reads more (EPS by calling another program, icons with
images inside); rows of unknown origin get only the plain ones.
"""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from reflectvlm.data.fetch import BadImage, ImageLimits, RowImage, describe, fetch
from reflectvlm.data.pixels import to_rgb

__all__ = ["FORMATS", "BadImage", "ImageLimits", "RowImage", "load_image"]

# A phone's multi-picture JPEG ("MPO") comes through Pillow's JPEG reader.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

_warnings_lock = threading.Lock()


def load_image(value: RowImage, root: Path | str, limits: ImageLimits | None = None) -> Image.Image:
    """Read one image of a row. Paths are relative to `root` and may not leave it.

    Example: `load_image("pages/17.png", root="data", limits=ImageLimits(max_pixels=4_000_000))`
    """
    limits = limits or ImageLimits()
    if isinstance(value, Image.Image):
        return _decoded(value, describe(value), limits)
    data = fetch(value, Path(root), limits)
    shown = describe(value)
    with _opened(data, shown) as image:
        return _decoded(image, shown, limits)


def _opened(data: bytes, shown: str) -> Image.Image:
    try:
        # The warning filters belong to the whole process: one thread at a time may change them.
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        rule = f"unpacks to more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels"
        raise BadImage("image too large", shown, rule, "Shrink it.") from None
    except Exception as error:  # noqa: BLE001 - boundary: what a decoder raises on hostile bytes
        known = isinstance(error, UnidentifiedImageError)
        rule = f"is not an image{_looks_like(data)}" if known else f"is broken ({_why(error)})"
        remedy = f"Give one of {', '.join(FORMATS)}." if known else "Save it again."
        raise BadImage("not an image" if known else "broken image", shown, rule, remedy) from None


def _decoded(image: Image.Image, shown: str, limits: ImageLimits) -> Image.Image:
    _check_size(image.size, shown, limits)
    try:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))  # always a copy, so the file can be closed
    except Exception as error:  # noqa: BLE001 - boundary: what a decoder raises on hostile bytes
        remedy = "Copy or save the file again."
        raise BadImage("broken image", shown, f"cannot be decoded ({_why(error)})", remedy) from None


def _check_size(size: tuple[int, int], shown: str, limits: ImageLimits) -> None:
    width, height = size
    if min(size) < 1:
        raise BadImage("empty image", shown, f"has {width} x {height} pixels", "Leave it out.")
    if width * height > limits.max_pixels:
        rule = f"has {width:,} x {height:,} pixels and {limits.max_pixels:,} are allowed"
        raise BadImage("image too large", shown, rule, "Shrink it, or raise ImageLimits.max_pixels.")
    if max(size) > limits.max_aspect * min(size):
        rule = f"is {width:,} x {height:,}: one side is more than {limits.max_aspect:g} times the other"
        raise BadImage("image too narrow", shown, rule, "Crop or pad it.")


def _why(error: Exception) -> str:
    """The decoder's words in one short line. None of Pillow's messages repeats the file's bytes,
    but chunk names and the like are the file's, so only printable ASCII gets through."""
    text = "".join(c if " " <= c <= "~" else "?" for c in str(error).split("\n")[0])
    return text[:120] or type(error).__name__


def _looks_like(data: bytes) -> str:
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return " but a web page"
    if head.startswith((b"<svg", b"<?xml")):
        return " of pixels but a drawing in XML"
    return ""
