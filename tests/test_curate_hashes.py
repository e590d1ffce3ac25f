"""Hashes of texts and images, and finding what is near by them."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps

from reflectvlm.curate.hashes import (
    SKETCH,
    ImageHash,
    bands,
    distances,
    image_hash,
    minhash,
    mixed,
    runs,
    shingles,
    significant,
    similarity,
    sketch,
    words,
)
from reflectvlm.curate.near import MOST, Keyed, Pictures

numbers = st.integers(0, 2**64 - 1)
NEAR = ImageHash(9, 0b0111, 0)
few = settings(deadline=None, max_examples=40)


def keys(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def drawing(colour: str = "red", at: int = 10, size: int = 64) -> Image.Image:
    page = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(page)
    side = size // 3
    place = at * size // 64
    pen.rectangle((place, place, place + side, place + side), fill=colour)
    pen.line((0, size - 1, size - 1, size // 2), fill="black", width=max(size // 32, 1))
    return page


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


# -- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image> Is AB = 3.5?", ["is", "ab", "=", "3", "5"]),
        ("<think>Look\n again</think>", ["look", "again"]),
        ("2-1 is \u00bd", ["2", "-", "1", "is", "1", "2"]),  # NFKC writes one half as 1⁄2
        ("\u56fe\u4e2d x", ["\u56fe", "\u4e2d", "x"]),
        ("?!", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    """Bug: tags or image markers counted as words make all traces alike; a Chinese sentence as one word makes
    none alike; without signs of arithmetic x + 3 and x - 3 are the same question."""
    assert words(text) == expected


def test_runs_are_told_apart_by_their_order() -> None:
    """Bug: a sum of word hashes finds "dog bites man" in "man bites dog"."""
    assert runs(["dog", "bites", "man"], 3)[0] != runs(["man", "bites", "dog"], 3)[0]
    assert len(runs(["a", "b", "c", "d"], 3)) == 2
    assert list(runs(["x", "a", "b", "c"], 3)[1:]) == list(runs(["a", "b", "c"], 3))
    assert len(runs(["a", "b"], 3)) == 0


def test_hashes_of_words_stay_the_same() -> None:
    """Bug: Python's own hash of a text changes with every process, so a set that is resumed would not know
    its duplicates. The number, worked out with whole numbers, is the first 8 bytes of BLAKE2b-64 of "look",
    little endian, mixed by SplitMix64's finaliser after the length of the run, 1, was added."""
    assert int(runs(["look"], 1)[0]) == 10_846_806_259_077_581_311


def test_mixed_is_splitmix64() -> None:
    """Bug: a mistyped constant makes a mixer that still looks random. The first output of SplitMix64 with
    seed 0 is published as 0xE220A8397B1DCDAF: its finaliser of the golden gamma."""
    assert int(mixed(keys(0x9E3779B97F4A7C15))[0]) == 0xE220A8397B1DCDAF


def test_similarity_of_short_texts_is_exact() -> None:
    """Bug: an estimate where the sets are known drops rows at the threshold by luck."""
    one = shingles(["a", "b", "c", "d", "e", "f"], 3)  # abc bcd cde def
    other = shingles(["a", "b", "c", "d", "e", "g"], 3)  # abc bcd cde deg: 3 of 5
    assert similarity(sketch(one), sketch(other)) == pytest.approx(3 / 5)
    assert similarity(sketch(one), sketch(one)) == 1.0


@few
@given(st.sets(numbers, min_size=1, max_size=400), st.sets(numbers, max_size=400))
def test_similarity_of_long_texts_is_near_the_truth(common: set[int], own: set[int]) -> None:
    """Bug: comparing the sketches as sets counts what one of them cut off as a difference. With k = 128
    values the standard error is at most sqrt(0.25 / 128) = 0.044; five of them are allowed."""
    mixed_common = np.unique(mixed(keys(*common)))
    everything = np.unique(mixed(keys(*common, *own)))
    truth = len(mixed_common) / len(everything)
    found = similarity(sketch(mixed_common), sketch(everything))
    assert abs(found - truth) <= (0 if len(everything) < SKETCH else 5 * math.sqrt(0.25 / SKETCH))


def test_similarity_of_cut_sketches() -> None:
    """Bug: what one sketch cut off counts as a difference. Of 900 values the first 600 against all: 2 / 3;
    as plain sets of 128 smallest the two have about 128 * 2 / 3 = 85 in common of 171, which is 0.5."""
    values = mixed(np.arange(900, dtype=np.uint64))
    found = similarity(sketch(np.sort(values[:600])), sketch(np.sort(values)))
    assert found == pytest.approx(2 / 3, abs=0.1)


def test_entries_of_signatures_agree_as_often_as_sets_overlap() -> None:
    """Bug: hash functions that order shingles alike make 80 copies of one coin. Jaccard 200 / 300: over 80
    entries the standard error is 0.053, over ten pairs of sets 0.017; four of them are allowed."""
    agreements = []
    for seed in range(10):
        values = mixed(np.arange(300, dtype=np.uint64) + np.uint64(1000 * seed))
        one, other = minhash(values[:250]), minhash(values[50:])
        agreements.append(float((one == other).mean()))
    assert np.mean(agreements) == pytest.approx(2 / 3, abs=0.067)


def test_bands_of_another_context_are_others() -> None:
    """Bug: rows with other numbers or another image fill the buckets of all that ask in the same words."""
    signature = minhash(shingles(["a", "b", "c"], 3))
    assert set(bands(signature, 1).tolist()).isdisjoint(bands(signature, 2).tolist())
    assert len(set(bands(signature, 1).tolist())) == 20


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Find angle ABC if AB = 3.", "Find the angle ABC, if AB = 3", True),
        ("Find angle ABC if AB = 3.", "Find angle ABD if AB = 3.", False),
        ("Find angle ABC if AB = 3.", "Find angle ABC if AB = 4.", False),
        ("Is 3 more than 4?", "Is 4 more than 3?", False),
        ("Solve x + 3", "Solve x \u2212 3", False),
        ("A dog or I?", "a dog or me?", True),
        ("a left-handed one", "a left handed one", True),
    ],
)
def test_significant(one: str, other: str, same: bool) -> None:
    """Bug: long questions that differ in one number are near by their words, and one of them would be
    lost."""
    assert (significant(one) == significant(other)) is same


# -- keys -----------------------------------------------------------------------------------------


@few
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3000)), max_size=60))
def test_keyed_is_a_dictionary_of_lists(added: list[tuple[int, int]]) -> None:
    """Bug: open addressing that stops at the wrong place loses rows, or finds those of a neighbour's key.
    Keys here fall on few places: they differ in their high bits."""
    table, plain = Keyed(), dict[int, list[int]]()
    for row, (high, low) in enumerate(added):
        key = (high << 40) + low % 7
        table.add(keys(key), row)
        rows = plain.setdefault(key, [])
        rows += [row] if len(rows) < MOST else []
    for high in range(41):
        for low in range(7):
            assert table.find(keys((high << 40) + low)) == plain.get((high << 40) + low, [])


def test_keyed_grows() -> None:
    """Bug: a table that doubles without placing its entries anew finds nothing that was added before."""
    table = Keyed()
    for row in range(500):
        table.add(mixed(np.arange(20, dtype=np.uint64) + np.uint64(20 * row)), row)
    for row in range(500):
        assert table.find(mixed(keys(20 * row + row % 20))) == [row]


def test_a_key_of_everybody_keeps_few() -> None:
    """Bug: one phrase that all rows share makes each look-up as long as the whole set."""
    table = Keyed()
    for row in range(3 * MOST):
        table.add(keys(7), row)
    assert table.find(keys(7)) == list(range(MOST))


# -- images ---------------------------------------------------------------------------------------


@given(numbers, st.lists(numbers, max_size=5))
def test_distances_count_bits(one: int, others: list[int]) -> None:
    """Bug: a wrong mask in the count of bits."""
    expected = [(one ^ other).bit_count() for other in others]
    assert distances(one, keys(*others)).tolist() == expected


@pytest.mark.parametrize("quality", [30, 60, 90])
@pytest.mark.parametrize("size", [32, 64, 150])
def test_the_same_picture_saved_otherwise_is_near(quality: int, size: int) -> None:
    """Bug: a set that was downloaded smaller, or saved again, is not recognised."""
    plain, other = drawing(), jpeg(drawing().resize((size, size), Image.Resampling.BICUBIC), quality)
    one, two = image_hash(plain), image_hash(other)
    assert (one.structure ^ two.structure).bit_count() <= 4
    assert (one.colour ^ two.colour).bit_count() <= 3
    assert one.pixels != two.pixels


def test_a_brighter_picture_is_near() -> None:
    """Bug: brightness as part of the structure; the transform's constant is left out for that."""
    dim = image_hash(drawing().point(lambda value: value * 3 // 4))
    assert (dim.structure ^ image_hash(drawing()).structure).bit_count() <= 4


def test_light_from_one_side_does_not_count() -> None:
    """Bug: frequency 0 of rows or columns in the structure. A ramp from left to right is made of waves that
    are constant from top to bottom, and of no others."""
    grey = np.random.default_rng(0).integers(40, 120, (32, 32))
    ramp = np.broadcast_to(np.linspace(0, 120, 32).astype(int), (32, 32))
    pages = [Image.fromarray((grey + more).astype(np.uint8)).convert("RGB") for more in (0, ramp, ramp.T)]
    plain, across, down = (image_hash(page).structure for page in pages)
    assert (plain ^ across).bit_count() <= 2
    assert (plain ^ down).bit_count() <= 2


def test_another_picture_is_far() -> None:
    """Bug: a hash of the size or of the mean alone. A moved square, its mirror image, and the negative."""
    plain = image_hash(drawing()).structure
    for other in (drawing(at=30), ImageOps.mirror(drawing()), ImageOps.invert(drawing())):
        assert (plain ^ image_hash(other).structure).bit_count() > 8


def test_another_colour_is_far() -> None:
    """Bug: "What colour is the square?" about two pictures that differ in nothing else, one of which is
    lost."""
    red, blue = image_hash(drawing("red")), image_hash(drawing("blue"))
    assert (red.colour ^ blue.colour).bit_count() > 3
    assert image_hash(drawing("black")).colour == 0


def test_flat_pictures_are_told_apart_by_lightness() -> None:
    """Bug: of a picture without structure noise would decide, and a black page would be near a white one.
    Lightness 0 is no ones, 128 is 32, 255 is 63: 255 / 4 = 63.75."""
    flat = [image_hash(Image.new("RGB", (40, 30), (value,) * 3)).structure for value in (0, 128, 255)]
    assert [one.bit_count() for one in flat] == [0, 32, 63]
    noisy = Image.fromarray(np.random.default_rng(0).integers(127, 130, (30, 40, 3), dtype=np.uint8))
    assert (image_hash(noisy).structure ^ flat[1]).bit_count() <= 1


def test_hashes_of_pixels_know_the_size() -> None:
    """Bug: 2 x 3 and 3 x 2 pixels of one colour have the same bytes."""
    wide, high = (image_hash(Image.new("RGB", size, "red")) for size in ((3, 2), (2, 3)))
    assert wide.pixels != high.pixels
    assert wide == image_hash(Image.new("RGB", (3, 2), "red"))


@few
@given(numbers, st.sets(st.integers(0, 63), max_size=6), st.integers(0, 6))
def test_near_pictures_are_always_found(structure: int, flipped: set[int], distance: int) -> None:
    """Bug: stretches of bits that leave a gap or overlap: of d differing bits in d + 1 stretches one is
    untouched."""
    other = structure
    for bit in flipped:
        other ^= 1 << bit
    pictures = Pictures(distance, 0)
    group = pictures.add((ImageHash(1, structure, 5),))
    found = pictures.near((ImageHash(2, other, 5),))
    assert found == ([(group, len(flipped))] if len(flipped) <= distance else [])


@pytest.mark.parametrize("distance", range(1, 8))
def test_differing_bits_may_be_anywhere(distance: int) -> None:
    """Bug: d stretches for d bits; bits in the middle of each of d equal stretches touch all of them."""
    pictures, other = Pictures(distance, 0), 0
    for k in range(distance):
        other |= 1 << ((2 * k + 1) * 32 // distance)
    group = pictures.add((ImageHash(1, 0, 0),))
    assert pictures.near((ImageHash(2, other, 0),)) == [(group, distance)]


def test_pictures_need_each_image_near() -> None:
    """Bug: rows with a second image that differs, with one more, or with another tint are taken for the
    same."""
    pictures = Pictures(4, 1)
    one, two = ImageHash(1, 0b1111, 0), ImageHash(2, 2**60, 0)
    group = pictures.add((one, two))
    assert pictures.near((one, two)) == [(group, 0)]
    assert pictures.near((ImageHash(3, 0b1100, 0), ImageHash(2, 2**60, 1))) == [(group, 2)]
    assert pictures.near((one,)) == []
    assert pictures.near((two, one)) == []
    assert pictures.near((one, ImageHash(2, 0b11110000, 0))) == []
    assert pictures.near((one, ImageHash(2, 2**60, 0b11))) == []
    assert pictures.add((one, two)) == group
    alone = pictures.add((one,))
    assert pictures.near((one, two)) == [(group, 0)]
    assert pictures.near((NEAR,)) == [(alone, 1)]


def test_pictures_by_pixels_only() -> None:
    """Bug: `distance=None` that still takes near ones."""
    pictures = Pictures(None, 64)
    group = pictures.add((ImageHash(1, 3, 0),))
    assert pictures.near((ImageHash(1, 3, 0),)) == [(group, 0)]
    assert pictures.near((ImageHash(2, 3, 0),)) == []
