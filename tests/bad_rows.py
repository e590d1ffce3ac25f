"""Pictures and rows with defects, for tests."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from reflectvlm.data.rows import BadRow, Columns
from reflectvlm.data.sources import dataset

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
text_only = partial(dataset, columns=Columns(images=None))


def encoded(image: Image.Image = NOISE, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def huge_png(side: int) -> bytes:
    """A valid header of side x side grey pixels with hardly any data behind it."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def huge_webp(side: int) -> bytes:
    """An animation of tiny frames on a canvas of side x side; its decoder is made when it is opened."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    place = data.index(b"VP8X") + 8 + 4
    data[place : place + 6] = (side - 1).to_bytes(3, "little") * 2
    return bytes(data)


def huge_gif(side: int) -> bytes:
    data = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    data[6:10] = struct.pack("<HH", side, side)
    return bytes(data)


def text_bomb() -> bytes:
    """80 MB of text in a chunk of some kilobytes."""
    data = encoded()
    text = b"Comment\x00\x00" + zlib.compress(bytes(80 * PngImagePlugin.MAX_TEXT_CHUNK))
    return data[:33] + chunk(b"zTXt", text) + data[33:]


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"question": f"q{number}", "answer": f"a{number}", "images": "good.png", **more}


def written(path: Path, *lines: Mapping[str, Any] | str | bytes) -> Path:
    parts = [json.dumps(line) + "\n" if isinstance(line, Mapping) else line for line in lines]
    path.write_bytes(b"".join(part.encode() if isinstance(part, str) else part for part in parts))
    return path


def left_out(path: Path, reason: str, match: str, **settings: Any) -> None:
    """Row 2 of three is bad: "error" refuses it by file and line, "skip" leaves out exactly it, counted,
    and no share of bad rows is allowed in silence."""
    with pytest.raises(BadRow, match=match) as caught:
        dataset(path, on_bad="error", **settings)
    place = f"{path.name}:2"
    assert caught.value.position == place
    assert str(caught.value).startswith(f"{place}: ")
    assert len(str(caught.value).splitlines()) == 1
    data = dataset(path, max_bad=0.34, **settings)
    assert [sample.question for sample in data] == ["q1", "q3"]
    assert data.report.reasons == {reason: (place,)}
    with pytest.raises(
        ValueError, match=r"Too many bad rows, max_bad=0.3 allows 0: kept 2 of 3 rows; 1 skip"
    ):
        dataset(path, max_bad=0.3, **settings)


def with_image(folder: Path, value: Any) -> Path:
    """Three rows, the second with this image."""
    (folder / "good.png").write_bytes(encoded())
    return written(folder / "rows.jsonl", row(1), row(2, images=value), row(3))


CHILD = """
import sys
from pathlib import Path
from reflectvlm.data.rows import Columns
from reflectvlm.data.sources import dataset
import numpy, PIL.Image
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) // 1024
dataset(sys.argv[1])[0]
before = peak()
try:
    print(dataset(sys.argv[2], columns=Columns(images=eval(sys.argv[3])), max_bad=1.0).report)
except ValueError as error:
    print(error)
print(peak() - before)
"""


def extra_memory(good: Path, path: Path, images: str | None = "images") -> tuple[str, int]:
    """What a process of its own says about the rows, and how many MB more they took than three plain ones."""
    told = subprocess.run(
        [sys.executable, "-c", CHILD, str(good), str(path), repr(images)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    *said, megabytes = told.stdout.strip().splitlines()
    return "\n".join(said), int(megabytes)
