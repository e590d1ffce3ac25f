"""From what a row calls an image to its encoded bytes: a path, bytes, a data URL or a web address.

Every failure is a `BadImage`: one line that names the value, the rule and the remedy. Bytes, base64
text and the query part of an address (which may hold a key) never get into that line.

A `file://` address is the path behind it, as qwen-vl-utils reads one, and may leave `root` as little as
any other path. Left out: object stores (`s3://`), archives.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

RowImage: TypeAlias = Any
"""A path, bytes, `{"bytes": …, "path": …}`, a base64 data URL, a web address, or a PIL image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """What an image may cost. Pixels and aspect are checked before anything is decoded.

    Example: `ImageLimits(max_pixels=4_000_000, urls=False)`
    """

    max_pixels: int = 50_000_000
    """Width x height. As RGB, this many pixels take three times as many bytes."""
    max_aspect: float = 199.0
    """Long side / short side. Qwen's image processor refuses more than 200."""
    max_bytes: int = 64 * 2**20
    """Size of the encoded file, or of a download."""
    urls: bool = True
    """False: a web address in a row is an error, and no connection is ever opened."""
    timeout: float = 20.0
    """Seconds to wait for a web server, and for its whole answer."""
    max_frames: int = 64
    """Frames that one video may become; each of them costs what an image costs."""
    max_video_bytes: int = 256 * 2**20
    """Size of a video's file, or of its download."""

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_aspect", "max_bytes", "max_frames", "max_video_bytes"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"ImageLimits.{name} is {getattr(self, name)}. It must be at least 1.")
        if not self.timeout > 0:
            raise ValueError(f"ImageLimits.timeout is {self.timeout}. It must be more than 0.")


class BadImage(ValueError):
    """An image that cannot be used: `reason` is for counting, the text for reading."""

    def __init__(self, reason: str, value: str, rule: str, remedy: str) -> None:
        # All four in `args`, so that the error survives pickling on its way out of a worker.
        super().__init__(reason, value, rule, remedy)
        self.reason, self.value, self.rule, self.remedy = reason, value, rule, remedy

    def __str__(self) -> str:
        return f"Image {self.value} {self.rule}. {self.remedy}"


def describe(value: RowImage) -> str:
    """`value` in a few words that are safe to print: no bytes, no base64, no keys of an address."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"of {memoryview(value).nbytes:,} bytes"
    if isinstance(value, Mapping):
        path = value.get("path")
        if path:
            return describe(path)
        return describe(value["bytes"]) if isinstance(value.get("bytes"), bytes) else "record"
    if isinstance(value, str) and value[:5].lower() == "data:":
        return f"in a data URL of {len(value):,} characters"
    if isinstance(value, str) and "://" in value[:16]:
        return repr(_without_keys(value))
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        return repr(text) if len(text) <= 300 else f"named by a text of {len(text):,} characters"
    return f"of type {type(value).__name__}"


def _without_keys(url: str) -> str:
    """The address without its user, password, query and fragment."""
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:200]
    except ValueError:
        return url.partition("://")[0] + "://…"


def fetch(value: RowImage, root: Path, limits: ImageLimits) -> bytes:
    """The encoded bytes of `value`, at most `limits.max_bytes` of them."""
    if isinstance(value, Mapping):
        return _from_record(value, root, limits)
    if isinstance(value, bytes | bytearray | memoryview):
        return _sized(bytes(value), describe(value), limits)
    if isinstance(value, str) and value[:5].lower() == "data:":
        return _from_data_url(value, limits)
    if isinstance(value, str) and value[:8].lower().startswith(("http://", "https://")):
        return _from_web(value, limits)
    if isinstance(value, str) and value[:7].lower() == "file://":
        return _from_path(value[7:], root, limits)
    if isinstance(value, str) and "://" in value[:16]:
        scheme = value.partition("://")[0]
        remedy = "Download the images and name them by paths."
        raise BadImage(
            "unsupported image", describe(value), f"uses the scheme {scheme!r}, which is not read", remedy
        )
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        return _from_path(os.fspath(value), root, limits)
    if value is None or value == "":
        raise BadImage("missing image", "entry", "is empty", "Give a path, or leave the entry out.")
    remedy = "Give a path, bytes, a {'bytes', 'path'} record, a data URL, a web address or a PIL image."
    raise BadImage("unsupported image", describe(value), "is not something an image can be read from", remedy)


def _from_record(record: Mapping[str, Any], root: Path, limits: ImageLimits) -> bytes:
    data, path = record.get("bytes"), record.get("path")
    if data is not None:
        if not isinstance(data, bytes | bytearray | memoryview):
            remedy = "Put the encoded file there, or give 'path' alone."
            raise BadImage(
                "unsupported image", "record", f"has 'bytes' of type {type(data).__name__}", remedy
            )
        return _sized(bytes(data), describe(record), limits)
    if not path:
        raise BadImage("missing image", "record", "has neither 'bytes' nor 'path'", "Fill one of the two.")
    return fetch(path, root, limits)


def _from_path(name: str, root: Path, limits: ImageLimits) -> bytes:
    """Links are followed: the owner of the disk set them. The text of a row must not leave `root`."""
    shown = describe(name)
    if len(name) > 4096:
        remedy = "Base64 needs the prefix 'data:image/png;base64,'."
        raise BadImage("unsupported image", shown, "is too long to be a path", remedy)
    base = os.path.abspath(root)
    path = os.path.normpath(os.path.join(base, name))
    if os.path.commonpath([base, path]) != base:
        remedy = "Move it there, or pass a root that holds all images."
        raise BadImage("image outside root", shown, f"leaves the folder {base}", remedy)
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadImage("unreadable image", shown, "is not a regular file", "Name an image file.")
            return _sized(file.read(limits.max_bytes + 1), shown, limits)
    except BadImage:
        raise
    except (FileNotFoundError, NotADirectoryError):
        remedy = "Fix the path, or pass the root it is relative to."
        raise BadImage("missing image", shown, f"does not exist in {base}", remedy) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        why = getattr(error, "strerror", None) or str(error)
        raise BadImage(
            "unreadable image", shown, f"cannot be opened ({why})", "Check its name and permissions."
        ) from None


def _without_waiting(path: str, flags: int) -> int:
    """Opening a pipe must not wait for somebody to write into it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _from_data_url(url: str, limits: ImageLimits) -> bytes:
    shown = describe(url)
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        remedy = "Write 'data:image/png;base64,' and the encoded file."
        raise BadImage("broken image", shown, "is not in base64", remedy)
    if len(body) > limits.max_bytes * 3 // 2:
        raise _too_big(shown, limits)
    try:
        data = base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise BadImage("broken image", shown, "holds broken base64", "Encode the file again.") from None
    return _sized(data, shown, limits)


def _from_web(url: str, limits: ImageLimits) -> bytes:
    shown = describe(url)
    if not limits.urls:
        remedy = "Download it, or set ImageLimits(urls=True)."
        raise BadImage("unreachable image", shown, "is a web address and those are switched off", remedy)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "reflectvlm"})
        with urllib.request.urlopen(request, timeout=limits.timeout) as answer:
            return _sized(_received(answer, limits), shown, limits)
    except BadImage:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        why = f"was refused by its server (status {error.code})"
    except Exception as error:  # noqa: BLE001 - boundary: whatever a foreign server makes urllib raise
        why = f"cannot be reached ({type(getattr(error, 'reason', error)).__name__})"
    remedy = "Check the connection, or download the images and name them by paths."
    raise BadImage("unreachable image", shown, why, remedy) from None


def _received(answer: Any, limits: ImageLimits) -> bytes:
    """The answer's body. Time is taken in all: a server that sends a byte now and then would never end."""
    data, until = bytearray(), time.monotonic() + limits.timeout
    while len(data) <= limits.max_bytes and (piece := answer.read1(2**16)):
        data += piece
        if time.monotonic() > until:
            raise TimeoutError
    if len(data) <= limits.max_bytes and answer.length:
        raise ConnectionAbortedError
    return bytes(data)


def _sized(data: bytes, shown: str, limits: ImageLimits) -> bytes:
    if not data:
        raise BadImage("empty image", shown, "has zero bytes", "Copy the file again.")
    if len(data) > limits.max_bytes:
        raise _too_big(shown, limits)
    return data


def _too_big(shown: str, limits: ImageLimits) -> BadImage:
    remedy = "Shrink it, or raise ImageLimits.max_bytes."
    return BadImage("image too large", shown, f"has more than {limits.max_bytes:,} bytes", remedy)
