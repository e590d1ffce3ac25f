"""A request's name, made of all that decides its reply: the same in every run and on every machine.

Images count by their bytes, wherever they lie, so a file that was changed is another request. An image at a
web address counts by the address: nothing is downloaded to find out whether a reply is known.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from reflectvlm.curate.types import Request, Teacher
from reflectvlm.data.fetch import ImageLimits, RowImage, fetch

_ADDRESS = ("http://", "https://")


def request_key(teacher: Teacher, request: Request) -> str:
    """Name of what this teacher says to this request. Raises `BadImage`."""
    return key_of(teacher.name, content_hash(request))


def key_of(teacher: str, content: str) -> str:
    """`request_key` from the teacher's name and the request's `content_hash`."""
    return hashlib.sha256(f"{teacher}\n{content}".encode("utf-8", "surrogatepass")).hexdigest()


def content_hash(request: Request) -> str:
    """Name of the request alone, whoever is asked. The row that it is about does not count."""
    content = {
        "purpose": request.purpose,
        "text": request.text,
        "system": request.system,
        "number": request.number,
        "max_tokens": request.max_tokens,
        "temperature": float(request.temperature),
        "images": [image_hash(image, request.root) for image in request.images],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def image_hash(image: RowImage, root: Path) -> str:
    """Of the encoded bytes; of a picture in memory, of its pixels. Raises `BadImage`."""
    if isinstance(image, str) and image[:8].lower().startswith(_ADDRESS):
        return hashlib.sha256(image.encode("utf-8", "surrogatepass")).hexdigest()
    if hasattr(image, "tobytes") and hasattr(image, "mode"):
        pixels = f"{image.mode} {image.size} ".encode() + image.tobytes()
        return hashlib.sha256(pixels).hexdigest()
    if isinstance(image, Mapping) and image.get("bytes") is None and image.get("path"):
        return image_hash(image["path"], root)
    if isinstance(image, str | os.PathLike):
        try:
            about = os.stat(os.path.join(root, image))
        except (OSError, ValueError):
            pass  # a data URL, or a file that is not there: `fetch` knows
        else:
            return _file_hash(os.fspath(image), Path(root), about.st_mtime_ns, about.st_size, about.st_ino)
    return hashlib.sha256(fetch(image, root, ImageLimits())).hexdigest()


@functools.lru_cache(maxsize=65536)
def _file_hash(name: str, root: Path, *_when: int) -> str:
    """Read once for all the requests about it, unless it changes meanwhile."""
    return hashlib.sha256(fetch(name, root, ImageLimits())).hexdigest()
