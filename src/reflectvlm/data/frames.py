"""`load_frames`: what a row calls a video -> upright RGB frames within limits, or a `BadImage`.

Which frames are taken, and how large they are, is decided by qwen-vl-utils (an extra) and its keys: `fps` or
`nframes`, `min_frames`, `max_frames`, `video_start`, `video_end`, `min_pixels`, `max_pixels`, `total_pixels`,
`resized_height` with `resized_width`. What is opened is decided here, because that package opens any path
and any address: a file is read within limits, as an image's is, must begin like one of `CONTAINERS` (a text
that names other files is a playlist to a video library) and is handed on as a copy under a name of ours.

Frames are shown as images, one after another. A Qwen video is something else: two frames share a block
of visual tokens, and positions count time. So a video costs twice as many tokens here, and a model's
knowledge of time comes from the order alone. Left out: sound, and videos with an alpha channel.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from reflectvlm.data.fetch import BadImage, ImageLimits, describe, fetch
from reflectvlm.data.images import load_image

EXTRA = "Install the extra: pip install 'reflectvlm[qwen-vl-utils]'."
CONTAINERS = {
    "MP4 or MOV": (4, (b"ftyp", b"moov", b"mdat", b"wide", b"free")),
    "Matroska or WebM": (0, (b"\x1aE\xdf\xa3",)),
    "AVI": (8, (b"AVI ",)),
}
"""How a video's file begins: the place, and the letters that stand there."""
DECODERS = ("torchcodec", "decord")
"""Packages that decode single frames. Without them qwen-vl-utils reads a whole video into memory."""


class FrameReader(Protocol):
    """Frames of `item["video"]`, the path of a file or a list of RGB images, by the item's other keys."""

    def __call__(self, item: Mapping[str, Any], /) -> Sequence[Image.Image]: ...


def load_frames(
    value: Any,
    options: Mapping[str, Any],
    root: Path,
    limits: ImageLimits,
    reader: FrameReader | None = None,
) -> tuple[Image.Image, ...]:
    """The frames of a video: a file in any form that an image may have, or a list of frames.

    Example: `load_frames("clips/3.mp4", {"nframes": 4}, Path("data"), ImageLimits())`
    """
    several = isinstance(value, list | tuple)
    read = reader or qwen_reader(file=not several)
    if several:
        return _listed(value, options, root, limits, read)
    wanted = _within(options, limits, describe(value))
    data = _fetched(value, root, limits)
    with tempfile.TemporaryDirectory(prefix="reflectvlm-") as folder:
        path = os.path.join(folder, "video")
        Path(path).write_bytes(data)
        found = _read(read, {**wanted, "video": path}, describe(value))
    if len(found) > limits.max_frames:
        raise _too_many(describe(value), len(found), limits)
    return tuple(load_image(frame, root, limits) for frame in found)


def _listed(
    frames: Sequence[Any], options: Mapping[str, Any], root: Path, limits: ImageLimits, read: FrameReader
) -> tuple[Image.Image, ...]:
    """Frames that are there already, one by one as safe as any image; the reader makes their size."""
    shown = f"of {len(frames)} frames"
    if not frames:
        raise BadImage("missing video", "entry", "is an empty list", "Name its frames.")
    if len(frames) > limits.max_frames:
        raise _too_many(shown, len(frames), limits)
    images = [load_image(frame, root, limits) for frame in frames]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        rule = f"has frames of {len(sizes)} sizes, {' and '.join(map(str, sorted(sizes)[:2]))} among them"
        raise BadImage("unequal frames", shown, rule, "Give all frames of a video one size.")
    # An odd number comes back with its last frame twice, for videos whose tokens take two frames each.
    return tuple(_read(read, {**options, "video": images}, shown)[: len(images)])


def qwen_reader(*, file: bool) -> FrameReader:
    """qwen-vl-utils, or a `BadImage` that says what is missing. A list of frames needs no decoder."""
    if find_spec("qwen_vl_utils") is None:
        raise BadImage("video without qwen-vl-utils", "in the row", "needs qwen-vl-utils", EXTRA)
    if file and not any(find_spec(name) for name in DECODERS):
        remedy = f"Install one, or give the video as a list of frames (pip install {DECODERS[0]})."
        raise BadImage("video without decoder", "in the row", f"needs {' or '.join(DECODERS)}", remedy)
    return qwen_frames


def qwen_frames(item: Mapping[str, Any]) -> list[Image.Image]:
    """`fetch_video` of qwen-vl-utils, its [T, 3, H, W] values from 0 to 255 as images again."""
    try:
        from qwen_vl_utils import fetch_video
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        why = str(error).split("\n")[0][:120]
        remedy = "Install a torchvision that fits your torch."
        rule = f"needs qwen-vl-utils, which cannot be imported ({why})"
        raise BadImage("video without qwen-vl-utils", "in the row", rule, remedy) from None
    values = fetch_video(dict(item)).round().clamp(0, 255).byte()
    return [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in values]


def _within(options: Mapping[str, Any], limits: ImageLimits, shown: str) -> dict[str, Any]:
    """The row's wishes, but for no more frames than the limit."""
    asked = options.get("nframes")
    if asked is not None:
        if asked > limits.max_frames:
            raise _too_many(shown, asked, limits)
        return dict(options)
    most = min(options.get("max_frames", limits.max_frames), limits.max_frames)
    return {**options, "max_frames": most, "min_frames": min(options.get("min_frames", 4), most)}


def _too_many(shown: str, found: int, limits: ImageLimits) -> BadImage:
    rule = f"has or asks for {found:,} frames and {limits.max_frames:,} are allowed"
    return BadImage("too many frames", shown, rule, "Ask for fewer, or raise ImageLimits.max_frames.")


def _fetched(value: Any, root: Path, limits: ImageLimits) -> bytes:
    try:
        data = fetch(value, root, dataclasses.replace(limits, max_bytes=limits.max_video_bytes))
    except BadImage as bad:  # in the words of a video
        remedy = bad.remedy.replace("max_bytes", "max_video_bytes")
        raise BadImage(bad.reason.replace("image", "video"), bad.value, bad.rule, remedy) from None
    if not any(data[at : at + 4].startswith(known) for at, known in CONTAINERS.values()):
        remedy = f"Give {', '.join(CONTAINERS)}, or a list of frames."
        raise BadImage("not a video", describe(value), "is not a video of a known kind", remedy)
    return data


def _read(read: FrameReader, item: Mapping[str, Any], shown: str) -> Sequence[Image.Image]:
    try:
        found = read(item)
    except BadImage:
        raise
    except Exception as error:  # noqa: BLE001 - boundary: what a decoder raises on hostile bytes
        # Where a decoder fails, the package tries torchvision's, which may be missing: the first one counts.
        first = error.__context__ or error
        why = "".join(c if " " <= c <= "~" else "?" for c in str(first).split("\n")[0])[:120]
        remedy = "Look at its keys (nframes, fps, sizes), or encode it again."
        raise BadImage(
            "broken video", shown, f"cannot be decoded ({why or type(first).__name__})", remedy
        ) from None
    if not found:
        raise BadImage("empty video", shown, "has no frames", "Leave it out.")
    return found
