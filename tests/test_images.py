"""Images of rows: what is read, what is refused, and that a refusal is one clear line."""

from __future__ import annotations

import base64
import os
import pickle
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from bad_rows import NOISE, chunk, encoded, huge_png
from reflectvlm.data.images import BadImage, ImageLimits, load_image

RED = Image.new("RGB", (6, 4), (255, 0, 0))


def refused(value: Any, root: Path, reason: str, match: str, limits: ImageLimits | None = None) -> str:
    with pytest.raises(BadImage, match=match) as caught:
        load_image(value, root, limits)
    text = str(caught.value)
    assert caught.value.reason == reason
    assert "\n" not in text
    assert len(text) < 700
    return text


def test_every_way_to_give_an_image_gives_the_same_pixels(tmp_path: Path) -> None:
    """One of the six forms is decoded differently, or returned lazily in another mode."""
    data = encoded(NOISE)
    (tmp_path / "a b é.png").write_bytes(data)
    values = [
        "a b é.png",
        Path("a b é.png"),
        str(tmp_path / "a b é.png"),
        data,
        bytearray(data),
        {"bytes": data, "path": "elsewhere.png"},
        {"bytes": None, "path": "a b é.png"},
        "data:image/png;base64," + base64.b64encode(data).decode(),
        NOISE,
    ]
    for value in values:
        image = load_image(value, tmp_path)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(NOISE)), value


def test_wrong_suffix_is_read_by_content(tmp_path: Path) -> None:
    """A JPEG named .png is common in scraped data and must not be refused."""
    (tmp_path / "x.png").write_bytes(encoded(NOISE, "JPEG"))
    assert load_image("x.png", tmp_path).size == (60, 40)


def memory(name: str) -> int:
    """Memory of this process in kB: now (VmRSS) or at its highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def test_twelve_thousand_squared_png_is_refused_before_decoding(tmp_path: Path) -> None:
    """A tiny file that asks for 432 MB of pixels passes Pillow with only a warning."""
    data = huge_png(12_000)
    assert len(data) < 200
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the highest use so far
    before = memory("VmRSS")
    refused(data, tmp_path, "image too large", "unpacks to more than")
    assert memory("VmHWM") - before < 20_000  # kB; one byte per pixel alone would be 140,000


def test_size_is_checked_without_pillows_help(tmp_path: Path) -> None:
    """8,000 x 8,000 is below Pillow's own warning, so only our limit stands before `load`."""
    text = refused(huge_png(8_000), tmp_path, "image too large", "8,000 x 8,000 pixels and 50,000,000")
    assert "max_pixels" in text


def test_fifty_thousand_squared_png_is_refused(tmp_path: Path) -> None:
    """Pillow raises a DecompressionBombError here, which is no OSError."""
    refused(huge_png(50_000), tmp_path, "image too large", "unpacks to more than")


def test_limits_are_exact(tmp_path: Path) -> None:
    """An off-by-one in a limit refuses the picture that just fits."""
    limits = ImageLimits(max_pixels=24, max_aspect=1.5, max_bytes=len(encoded(RED)))
    assert load_image(encoded(RED), tmp_path, limits).size == (6, 4)
    refused(RED, tmp_path, "image too large", "6 x 4 pixels", ImageLimits(max_pixels=23))
    refused(RED, tmp_path, "image too narrow", "more than 1.4 times", ImageLimits(max_aspect=1.4))
    small = ImageLimits(max_bytes=len(encoded(RED)) - 1)
    refused(encoded(RED), tmp_path, "image too large", "max_bytes", small)
    (tmp_path / "x.png").write_bytes(encoded(RED))
    assert load_image("x.png", tmp_path, limits).size == (6, 4)
    refused("x.png", tmp_path, "image too large", "max_bytes", small)


def test_one_by_three_hundred_is_refused_and_one_by_one_is_not(tmp_path: Path) -> None:
    """The processor would raise on the strip much later, in the middle of a run."""
    refused(Image.new("RGB", (1, 300)), tmp_path, "image too narrow", "1 x 300")
    assert load_image(Image.new("RGB", (1, 1)), tmp_path).size == (1, 1)


def test_image_without_pixels_is_refused(tmp_path: Path) -> None:
    """A PIL image may have no width, and the aspect rule would divide by it."""
    refused(Image.new("RGB", (0, 5)), tmp_path, "empty image", "0 x 5 pixels")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_cut_files_are_refused(kind: str, tmp_path: Path) -> None:
    """A cut file opens and fails at `load`, or yields grey rows without a word."""
    data = encoded(NOISE, kind)
    refused(data[: len(data) * 2 // 3], tmp_path, "broken image", "decoded|broken")


def test_flipped_byte_is_refused(tmp_path: Path) -> None:
    """A damaged PNG raises SyntaxError or OSError depending on where the damage is."""
    data = bytearray(encoded(NOISE))
    data[len(data) // 2] ^= 0xFF
    refused(bytes(data), tmp_path, "broken image", "cannot be decoded")


@pytest.mark.parametrize(
    ("data", "reason", "match"),
    [
        (b"", "empty image", "zero bytes"),
        (b"just text, no picture", "not an image", "is not an image. Give one of PNG"),
        (b"\n<!DOCTYPE html><html>404</html>", "not an image", "a web page"),
        (b"<html><body>login</body></html>", "not an image", "a web page"),
        (b"<svg xmlns='x'></svg>", "not an image", "drawing in XML"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image", "is not an image"),
    ],
)
def test_files_that_are_no_images(data: bytes, reason: str, match: str, tmp_path: Path) -> None:
    """An error page saved as .png must say so; EPS must not start another program."""
    (tmp_path / "x.png").write_bytes(data)
    assert "x.png" in refused("x.png", tmp_path, reason, match)


def test_text_chunk_bomb_is_refused(tmp_path: Path) -> None:
    """A PNG text chunk that unpacks without end raises ValueError, not OSError."""
    data = encoded(RED)
    bomb = chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(80 * PngImagePlugin.MAX_TEXT_CHUNK)))
    refused(data[:33] + bomb + data[33:], tmp_path, "broken image", "Decompressed")


def test_missing_folder_pipe_and_odd_names(tmp_path: Path) -> None:
    """Each of these raises another kind of OSError or ValueError; a pipe would hang for ever."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    assert str(tmp_path) in refused("no.png", tmp_path, "missing image", "'no.png' does not exist in")
    refused("file/no.png", tmp_path, "missing image", "does not exist")
    refused("folder", tmp_path, "unreadable image", "Is a directory")
    refused("pipe", tmp_path, "unreadable image", "not a regular file")
    refused("a\0b", tmp_path, "unreadable image", "cannot be opened")
    refused("x" * 300, tmp_path, "unreadable image", "too long")
    refused("", tmp_path, "missing image", "is empty")
    refused(None, tmp_path, "missing image", "is empty")
    refused({"bytes": None, "path": None}, tmp_path, "missing image", "neither 'bytes' nor 'path'")
    refused({"bytes": "aGk="}, tmp_path, "unsupported image", "'bytes' of type str")
    refused(17, tmp_path, "unsupported image", "of type int")


def test_no_permission(tmp_path: Path) -> None:
    """An unreadable file must be a bad row, not a crash."""
    file = tmp_path / "secret.png"
    file.write_bytes(encoded(RED))
    file.chmod(0)
    user = os.geteuid()
    if user == 0:  # nothing is forbidden to root
        os.seteuid(65534)
    try:
        refused("secret.png", tmp_path, "unreadable image", "Permission denied")
    finally:
        os.seteuid(user)


def test_paths_do_not_leave_the_root(tmp_path: Path) -> None:
    """A row of unknown origin could name any file of the machine; `root2` begins with `root`."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root2").mkdir()
    for place in (tmp_path, tmp_path / "root", tmp_path / "root2"):
        (place / "x.png").write_bytes(encoded(RED))
    root = tmp_path / "root"
    names = ["../x.png", "a/../../x.png", str(tmp_path / "x.png"), "../root2/x.png"]
    for value in [*names, {"path": "../x.png"}]:
        refused(value, root, "image outside root", "leaves the folder")
    assert load_image("a/../x.png", root).size == (6, 4)
    assert load_image("root/../x.png", tmp_path).size == (6, 4)


def test_relative_root_is_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative root must not make every path look like an escape."""
    (tmp_path / "x.png").write_bytes(encoded(RED))
    monkeypatch.chdir(tmp_path)
    assert load_image("x.png", ".").size == load_image("x.png", "").size == (6, 4)


def test_broken_data_urls(tmp_path: Path) -> None:
    """Python's decoder drops characters it does not know, unless told to be strict."""
    good = base64.b64encode(encoded(RED)).decode()
    assert load_image(f"data:image/png;base64,{good[:20]}\n{good[20:]}", tmp_path).size == (6, 4)
    refused(f"data:image/png;base64,!{good}", tmp_path, "broken image", "broken base64")
    refused(f"data:image/png;base64,{good[:-3]}", tmp_path, "broken image", "broken base64")
    refused(f"data:image/png,{good}", tmp_path, "broken image", "not in base64")
    refused("data:image/png;base64,", tmp_path, "empty image", "zero bytes")
    limits = ImageLimits(max_bytes=10)
    refused(f"data:image/png;base64,{good}", tmp_path, "image too large", "10 bytes", limits)


def test_no_bytes_and_no_keys_in_messages(tmp_path: Path) -> None:
    """Base64, bytes and signed addresses end up in logs, where they are useless or secret."""
    secret = "c2VjcmV0" * 700
    values: list[Any] = [
        secret.encode(),
        {"bytes": secret.encode(), "path": None},
        "data:image/png;base64," + secret,
        secret,
        f"http://user:{secret[:9]}@127.0.0.1:1/x.png?key={secret}",
    ]
    for value in values:
        with pytest.raises(BadImage) as caught:
            load_image(value, tmp_path)
        assert "c2Vjc" not in str(caught.value)
        assert caught.value.__cause__ is None
    refused(secret, tmp_path, "unsupported image", "prefix 'data:image/png;base64,'")


@contextmanager
def served(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/x.png?key=1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_web_addresses(tmp_path: Path) -> None:
    """A download without a limit, or an error that hides which address failed."""
    with served(200, encoded(NOISE)) as url:
        assert load_image(url, tmp_path).size == (60, 40)
        assert load_image({"bytes": None, "path": url}, tmp_path).size == (60, 40)
        refused(url, tmp_path, "image too large", "100 bytes", ImageLimits(max_bytes=100))
        refused(url, tmp_path, "unreachable image", "switched off", ImageLimits(urls=False))
    with served(404, b"") as url:
        refused(
            url,
            tmp_path,
            "unreachable image",
            "127.0.0.1:[0-9]+/x.png' was refused by its server .status 404",
        )
    refused(url, tmp_path, "unreachable image", r"cannot be reached \(ConnectionRefusedError\)")
    refused("http://[bad", tmp_path, "unreachable image", "cannot be reached")
    refused("s3://bucket/x.png", tmp_path, "unsupported image", "scheme 's3'")


def test_file_addresses_are_paths(tmp_path: Path) -> None:
    """Bug: `file://`, as Qwen-style rows have it, opens what a path may not leave `root` for."""
    (tmp_path / "a 1.png").write_bytes(encoded(NOISE))
    for value in (f"file://{tmp_path}/a 1.png", "file://a 1.png", "FILE://./a 1.png"):
        assert load_image(value, tmp_path).size == (60, 40)
    for value in ("file:///etc/passwd", "file://../a.png", "file://localhost/../../etc/passwd"):
        refused(value, tmp_path, "image outside root", "leaves the folder")
    refused("file://", tmp_path, "unreadable image", "cannot be opened")
    refused("file://b.png", tmp_path, "missing image", "does not exist")


def test_a_server_that_never_ends_is_left(tmp_path: Path) -> None:
    """A byte now and then keeps every single wait short, and the run waits for ever; and the half of a
    picture that came before a connection broke is none."""

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with suppress(OSError):  # the other side has gone
                for _ in range(50 if "slow" in self.path else 1):
                    self.wfile.write(b"x")
                    time.sleep(0.1)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url, limits = f"http://127.0.0.1:{server.server_port}", ImageLimits(timeout=0.5)
        began = time.monotonic()
        refused(
            f"{url}/slow.png", tmp_path, "unreachable image", r"cannot be reached \(TimeoutError\)", limits
        )
        assert time.monotonic() - began < 3.5
        refused(
            f"{url}/cut.png", tmp_path, "unreachable image", r"reached \(ConnectionAbortedError\)", limits
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    """A phone's picture would be shown lying on its side."""
    image = Image.new("RGB", (32, 16), (255, 255, 255))
    image.paste((255, 0, 0), (0, 0, 16, 16))  # left half red
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: left becomes top
    loaded = load_image(encoded(image, "JPEG", exif=exif, quality=100, subsampling=0), tmp_path)
    assert loaded.size == (16, 32)
    top, bottom = np.asarray(loaded)[4, 8], np.asarray(loaded)[28, 8]
    assert top[1] < 40
    assert bottom[1] > 215


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_counts(kind: str, tmp_path: Path) -> None:
    """An animation must give one image, and always the same."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert load_image(data, tmp_path).getpixel((3, 3)) == (255, 0, 0)


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    """Pillow's own conversion clips everything above 255 to white."""
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    loaded = load_image(encoded(Image.fromarray(values)), tmp_path)
    # 257 // 257 = 1, 32768 // 257 = 127, 65535 // 257 = 255
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 1, 127, 255]


def test_floats_and_long_integers_are_stretched(tmp_path: Path) -> None:
    """A float picture in 0…1 becomes black, one of 32-bit integers white."""
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    # 0.5 -> 127.5, rounded to even: 128
    assert np.asarray(load_image(encoded(floats, "TIFF"), tmp_path))[0, :, 1].tolist() == [0, 128, 255]
    integers = Image.fromarray(np.array([[-10, 0, 90]], dtype=np.int32))
    # span 100: 0 -> 10 * 2.55 = 25.5, to even 26
    assert np.asarray(load_image(integers, tmp_path))[0, :, 2].tolist() == [0, 26, 255]
    flat = Image.fromarray(np.full((2, 2), 7.0, dtype=np.float32))
    assert load_image(flat, tmp_path).getpixel((0, 0)) == (0, 0, 0)
    nan = Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32))
    refused(nan, tmp_path, "broken image", "NaN or infinity")


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "La", "PA", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    """A mode that Pillow cannot turn into RGB in one step would be reported as a broken image."""
    loaded = load_image(Image.new(mode, (3, 2)), tmp_path)
    assert (loaded.mode, loaded.size) == ("RGB", (3, 2))


def test_cmyk_jpeg(tmp_path: Path) -> None:
    """White paper is no ink: (0, 0, 0, 0)."""
    data = encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")
    assert load_image(data, tmp_path).getpixel((2, 2)) == (255, 255, 255)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    """Black text on a transparent page becomes black on black."""
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    white = (255, 255, 255)
    assert load_image(encoded(clear), tmp_path).getpixel((0, 0)) == white
    assert load_image(encoded(palette, transparency=0), tmp_path).getpixel((0, 0)) == white
    assert load_image(encoded(palette, transparency=b"\x00\xff"), tmp_path).getpixel((0, 0)) == white
    assert load_image(encoded(palette, "GIF", transparency=0), tmp_path).getpixel((0, 0)) == white
    assert load_image(encoded(keyed, transparency=(1, 2, 3)), tmp_path).getpixel((0, 0)) == white
    # 128 / 255 of black on white: 255 - 128 = 127
    assert load_image(encoded(half), tmp_path).getpixel((0, 0)) == (127, 127, 127)


def test_bad_image_survives_pickling(tmp_path: Path) -> None:
    """An exception that cannot be unpickled kills a data worker's whole pool."""
    with pytest.raises(BadImage) as caught:
        load_image(b"", tmp_path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_limits_are_checked() -> None:
    """A limit of zero refuses every image, with a message about the image."""
    for wrong in ({"max_pixels": 0}, {"max_aspect": 0.5}, {"max_bytes": -1}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=rf"ImageLimits.{name} is {value}. It must be at least 1"):
            ImageLimits(**wrong)
    with pytest.raises(ValueError, match=r"timeout is 0.0. It must be more than 0"):
        ImageLimits(timeout=0.0)
