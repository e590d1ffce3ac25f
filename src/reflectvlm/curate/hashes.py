"""Hashes that say whether two texts or two images are nearly the same. Nothing is kept here; `near.py` does
that.

Texts: words -> runs of n words (shingles), 64 bits each -> MinHash (Broder, 1997): equal entries of two
signatures are as frequent as the Jaccard similarity of the two sets. A sketch is the smallest 128 shingles,
from which that similarity is computed, exactly for texts of at most that many.

Images: `structure` is the sign of the 8 x 8 lowest frequencies of a 32 x 32 grey picture about their
median, rows and columns of frequency 0 left out, so that brightness does not count. It is blind to colour,
which is why `colour` stands beside it: whether each cell of a 4 x 4 grid is bluish or yellowish, reddish or
greenish, or neither.

Left out: crops, rotations, mirror images. The usual packages for both pull in scipy, which nothing else
here needs."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

    from reflectvlm.data.fetch import ImageLimits, RowImage

Hashes = NDArray[np.uint64]

BANDS, IN_BAND = 20, 4
"""Two texts of similarity s share a band with probability 1 - (1 - s^4)^20: 0.99997 at 0.8, 0.94 at 0.6,
0.03 at 0.2."""
SKETCH = 128
"""Shingles of a sketch."""

_NORMAL_FORM_MAX_CHARACTERS = 20_000  # the normal form takes quadratic time in long runs of combining marks
_PIECE = 4096  # shingles that are hashed at once
_EAST = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9_-]{0,30}>")
_WORD = re.compile(rf"[{_EAST}]|[^\W_{_EAST}]+|[-+*/=<>^%°√∠±×÷−]")
_SIGNIFICANT = re.compile(r"\d+(?:[.,]\d+)*|(?<![^\W\d_])[A-Z]{1,4}(?![^\W\d_])|[+*/=<>^%°√±×÷−]|-(?=\s?\d)")
_SEEDS = np.random.default_rng(20250703).integers(0, 2**63, BANDS * IN_BAND, dtype=np.uint64)
_FLAT = 2.0  # grey levels of standard deviation
_TINT = 5.0  # of 128


class ImageHash(NamedTuple):
    """64 bits each."""

    pixels: int
    """Equal for the same decoded pixels, and for nothing else."""
    structure: int
    colour: int


def words(text: str) -> list[str]:
    """Words of a text in lower case, signs of arithmetic among them, tags and other punctuation left out. A
    character of Chinese, Japanese or Korean is a word.

    Example: `words("<image> Is AB = 3.5?")` is `["is", "ab", "=", "3", "5"]`
    """
    text = _TAG.sub(" ", text)
    if not text.isascii() and len(text) <= _NORMAL_FORM_MAX_CHARACTERS:
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.casefold())


def significant(text: str) -> int:
    """A hash of what makes two alike questions different ones: numbers, signs of arithmetic and names of
    points, in order.

    "Find angle ABC if AB = 3" and the same with ABD, or with 4, have different ones.
    """
    found = [part for part in _SIGNIFICANT.findall(_TAG.sub(" ", text)) if part not in ("A", "I")]
    if not any(map(str.islower, text)):  # all in capitals: no name stands out
        found = [part for part in found if not part.isalpha()]
    return hashed(" ".join(found))


def hashed(text: str) -> int:
    """64 bits of a text, the same in every process."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def shingles(parts: Sequence[str], n: int) -> Hashes:
    """Hashes of all runs of n words, sorted, each once; of fewer words, the one hash of all."""
    if not parts:
        return np.array([hashed("")], dtype=np.uint64)
    return np.unique(runs(parts, min(n, len(parts))))


def runs(parts: Sequence[str], n: int) -> Hashes:
    """Hashes of the runs of n words in their order; none if there are fewer words."""
    each = np.fromiter(map(_word, parts), dtype=np.uint64, count=len(parts))
    count = max(len(parts) - n + 1, 0)
    found = np.full(count, n, dtype=np.uint64)
    for k in range(n if count else 0):
        found = mixed(found + each[k : k + count])
    return found


def mixed(values: Hashes) -> Hashes:
    """A bijection of 64-bit numbers that makes neighbours unlike each other (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def minhash(found: Hashes) -> Hashes:
    """The signature: the smallest of all shingles under each of 80 hash functions."""
    smallest = np.full(len(_SEEDS), np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(found), _PIECE):
        piece = mixed(found[start : start + _PIECE, None] ^ _SEEDS)
        np.minimum(smallest, piece.min(axis=0), out=smallest)
    return smallest


def bands(signature: Hashes, within: int = 0) -> Hashes:
    """20 keys; two texts may be alike if they share one. Keys of another `within` are others."""
    rows = signature.reshape(BANDS, IN_BAND)
    keys = mixed(np.arange(1, BANDS + 1, dtype=np.uint64) + mixed(np.array([within], dtype=np.uint64)))
    for k in range(IN_BAND):
        keys = mixed(keys + rows[:, k])
    return keys


def sketch(found: Hashes) -> bytes:
    """The smallest shingles, 32 bits each: enough for `similarity`."""
    return (found[:SKETCH] >> np.uint64(32)).astype(np.uint32).tobytes()


def similarity(one: bytes, other: bytes) -> float:
    """Jaccard similarity of two sets by their sketches. Of sets with more than 128 shingles it is an
    estimate from the smallest ones of the union, with a standard error of at most 0.05."""
    a, b = (np.frombuffer(data, dtype=np.uint32) for data in (one, other))
    ends = [part[-1] for part in (a, b) if len(part) == SKETCH]
    if ends:  # what lies above is not known of one of the two
        a, b = (part[part <= min(ends)] for part in (a, b))
    common = len(np.intersect1d(a, b))
    return common / max(len(np.union1d(a, b)), 1)


def image_hash(image: Image) -> ImageHash:
    """Hashes of a decoded RGB image."""
    from PIL import Image as images

    pixels = blake2b(repr((image.mode, image.size)).encode(), digest_size=8)
    pixels.update(image.tobytes())
    grey = image.convert("L").resize((32, 32), images.Resampling.BICUBIC)
    tints = image.convert("YCbCr").resize((4, 4), images.Resampling.BOX)
    chroma = np.asarray(tints, dtype=np.float64)[:, :, 1:] - 128
    return ImageHash(
        pixels=int.from_bytes(pixels.digest(), "little"),
        structure=_structure(np.asarray(grey, dtype=np.float64)),
        colour=_bits(np.concatenate([(chroma > _TINT).ravel(), (chroma < -_TINT).ravel()])),
    )


def row_hashes(
    images: Sequence[RowImage], root: Path, limits: ImageLimits | None = None
) -> tuple[ImageHash, ...]:
    """Hashes of a row's images; raises `BadImage`. Images are read one at a time and let go."""
    from reflectvlm.data.images import load_image

    return tuple(image_hash(load_image(image, root, limits)) for image in images)


def distances(one: int, others: Hashes) -> NDArray[np.int64]:
    """Number of bits in which each of the others differs."""
    v = others ^ np.uint64(one)
    v = v - ((v >> np.uint64(1)) & np.uint64(0x5555555555555555))
    v = (v & np.uint64(0x3333333333333333)) + ((v >> np.uint64(2)) & np.uint64(0x3333333333333333))
    v = (v + (v >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((v * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)


def _structure(grey: NDArray[np.float64]) -> int:
    """An image without structure has its lightness instead, 0 to 63 ones: noise would decide otherwise."""
    if grey.std() < _FLAT:
        return (1 << int(grey.mean() / 4)) - 1
    waves = _waves()
    low = (waves @ grey @ waves.T).ravel()
    return _bits(low > np.median(low))


@functools.cache
def _waves() -> NDArray[np.float64]:
    """Frequencies 1 to 8 of the discrete cosine transform of 32 values, [8, 32]."""
    place = np.arange(32)
    return np.array([np.cos(np.pi * (2 * place + 1) * k / 64) for k in range(1, 9)])


def _bits(values: NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(values).tobytes(), "big")


@functools.lru_cache(maxsize=2**16)
def _word(word: str) -> int:
    return hashed(word)
