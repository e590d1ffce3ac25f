"""Sections E1 and E2: images that are none, bombs and odd pictures."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bad_rows import (
    NOISE,
    encoded,
    extra_memory,
    huge_gif,
    huge_png,
    huge_webp,
    left_out,
    row,
    text_bomb,
    with_image,
    written,
)
from reflectvlm.data.images import ImageLimits
from reflectvlm.data.sources import dataset
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.types import Instruction

# -- E1: images that are none -----------------------------------------------------------------------

BROKEN = {
    "zero bytes": (b"", "empty image"),
    "cut PNG": (encoded()[:3000], "broken image"),
    "cut JPEG": (encoded(kind="JPEG")[:1500], "broken image"),
    "text": (b"just some text\n", "not an image"),
    "error page": (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
    "damaged": (encoded()[:2000] + bytes(50) + encoded()[2050:], "broken image"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("way", ["file", "data URL"])
def test_e1_broken_bytes(name: str, way: str, tmp_path: Path) -> None:
    """Bug: a broken picture ends the run with a traceback of Pillow, or becomes grey rows."""
    data, reason = BROKEN[name]
    (tmp_path / "x.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    left_out(with_image(tmp_path, "x.png" if way == "file" else url), reason, "^rows.jsonl:2: Image ")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("gone.png", "missing image"),
        ("folder", "unreadable image"),
        ("../secret.png", "image outside root"),
        ("/etc/hostname", "image outside root"),
        ("http://127.0.0.1:1/x.png", "unreachable image"),
        ("s3://bucket/x.png", "unsupported image"),
        ("data:image/png;base64,%%%%", "broken image"),
        ("data:image/png;base64,", "empty image"),
        ({"path": None, "bytes": None}, "missing image"),
        ({"path": "gone.png"}, "missing image"),
        (["good.png", "gone.png"], "missing image"),
        ([["good.png"]], "unsupported image"),
        (17, "unsupported image"),
        ("x" * 5000, "unsupported image"),
    ],
)
def test_e1_places_without_an_image(value: Any, reason: str, tmp_path: Path) -> None:
    """Bug: a row whose image is nowhere trains on its text alone; a row reads any file of the machine."""
    (tmp_path / "folder").mkdir()
    left_out(with_image(tmp_path, value), reason, "^rows.jsonl:2: Image ", limits=ImageLimits(timeout=5))


def test_e1_no_permission(tmp_path: Path) -> None:
    """Bug: PermissionError, which is neither a missing file nor a broken one, ends the run."""
    path = with_image(tmp_path, "closed.png")
    (tmp_path / "closed.png").write_bytes(encoded())
    (tmp_path / "closed.png").chmod(0)
    user = os.geteuid()
    if user == 0:  # nothing is forbidden to root, and nobody else may look into its folders
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_mode & 0o011 != 0o011:
                folder.chmod(folder.stat().st_mode | 0o011)
        os.seteuid(65534)
    try:
        left_out(path, "unreadable image", "Permission denied")
    finally:
        os.seteuid(user)


@dataclass
class Memory:
    """A source that is no file; satisfies `Source` and `Rows`."""

    rows: Sequence[Mapping[str, Any]]
    root: Path

    def open(self) -> Memory:
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.rows[index]

    def position(self, index: int) -> str:
        return f"memory:{index + 1}"


def test_e1_every_way_to_give_an_image(tmp_path: Path) -> None:
    """Bug: one of the forms that tables and files hold is decoded differently, or not at all."""
    data = encoded()
    for name in ("good.png", "really.jpg"):  # a PNG by another name
        (tmp_path / name).write_bytes(data)
    forms: list[Any] = [
        "good.png",
        "really.jpg",
        data,
        {"bytes": data, "path": None},
        {"bytes": None, "path": "good.png"},
        NOISE,
        ["good.png"],
        "data:image/png;base64," + base64.b64encode(data).decode(),
    ]
    rows = dataset(Memory([row(i, images=form) for i, form in enumerate(forms)], tmp_path))
    assert len(rows) == len(forms)
    for sample in rows:
        assert sample.images[0].tobytes() == NOISE.tobytes()


# -- E2: bombs and odd pictures ---------------------------------------------------------------------

BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "PNG of 50,000 x 50,000": (lambda: huge_png(50_000), "image too large"),
    "PNG of 12,000 x 12,000": (lambda: huge_png(12_000), "image too large"),
    "PNG of 8,000 x 8,000": (lambda: huge_png(8_000), "image too large"),
    "WebP canvas of 16,000 x 16,000": (lambda: huge_webp(16_000), "image too large"),
    "GIF screen of 60,000 x 60,000": (lambda: huge_gif(60_000), "image too large"),
    "text chunk": (text_bomb, "broken image"),
    "1 x 3000": (lambda: encoded(Image.new("RGB", (1, 3000))), "image too narrow"),
    "3000 x 10": (lambda: encoded(Image.new("RGB", (3000, 10))), "image too narrow"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_e2_bombs_are_bad_rows(name: str, tmp_path: Path) -> None:
    """Bug: a picture of some hundred bytes ends the run by its memory, or in the image processor."""
    make, reason = BOMBS[name]
    (tmp_path / "x.png").write_bytes(make())
    left_out(with_image(tmp_path, "x.png"), reason, "^rows.jsonl:2: Image 'x.png' ")


def test_e2_bombs_take_no_memory(tmp_path: Path) -> None:
    """Bug: the size is looked at after decoding, or each bomb stays in memory until the scan ends."""
    good = with_image(tmp_path, "good.png")
    rows = []
    for number, (make, _) in enumerate(BOMBS.values()):
        (tmp_path / f"{number}.png").write_bytes(make())
        rows += [row(number, images=f"{number}.png", id=f"{number}-{copy}") for copy in range(5)]
    said, megabytes = extra_memory(good, written(tmp_path / "bombs.jsonl", row(0), *rows))
    assert f"kept 1 of {len(rows) + 1} rows" in said
    # The text chunk is unpacked up to Pillow's limit of 1 MB; decoded, the smallest bomb would take 64 MB.
    assert megabytes < 40


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_e2_of_several_frames_the_first_counts(kind: str, tmp_path: Path) -> None:
    """Bug: an animation or a file of many pages gives another number of images than its row has markers."""
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:] * 20, **lossless)
    (tmp_path / "x.png").write_bytes(data)
    ((image,),) = [dataset(with_image(tmp_path, "x.png"))[1].images]
    assert image.getpixel((3, 3)) == (255, 0, 0)


def odd_pictures() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """Pictures of odd kinds, and what the pixel at (0, 0) is."""
    clear = Image.new("LA", (8, 8), (0, 0))
    keyed = Image.new("P", (8, 8), 0)
    keyed.putpalette([9, 9, 9, 255, 0, 0])
    deep = Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16))
    turned = Image.new("RGB", (16, 8), (255, 255, 255))
    turned.paste((0, 0, 0), (0, 4, 8, 8))  # below left, black: turned clockwise it is above left
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "1x1": (encoded(Image.new("RGB", (1, 1), (1, 2, 3))), (1, 2, 3)),
        "16 bit": (encoded(deep), (255, 255, 255)),
        "CMYK": (encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
        "LA": (encoded(clear), (255, 255, 255)),
        "P with transparency": (encoded(keyed, transparency=0), (255, 255, 255)),
        "EXIF rotation": (encoded(turned, exif=exif), (0, 0, 0)),
    }


@pytest.mark.parametrize("name", odd_pictures())
def test_e2_odd_pictures_are_read_as_they_look(name: str, tmp_path: Path, tiny_policy: QwenVL) -> None:
    """Bug: a deep picture becomes white, a transparent one black on black, a phone's lies on its side."""
    data, pixel = odd_pictures()[name]
    (tmp_path / "x.png").write_bytes(data)
    sample = dataset(with_image(tmp_path, "x.png"))[1]
    (image,) = sample.images
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", pixel)
    assert tiny_policy.prompt(sample, Instruction()).grids[0].tokens >= 1
