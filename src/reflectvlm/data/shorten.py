"""A question too long for its budget, cut from its end: only its own text, never an image or its place."""

from __future__ import annotations

from collections.abc import Callable

from reflectvlm.data.rows import IMAGE_MARKER


def shortened(question: str, images: int, fits: Callable[[str], bool]) -> str | None:
    """The longest beginning of the question's text that fits, with all `<image>` markers that stand for
    images; None if no text would be left. The whole question is known not to fit.

    Example: of `"One <image> two <image> three"` with two images, a tighter and tighter budget leaves
    `"One <image> two <image> th"`, `"One <image> tw<image>"`, `"O<image><image>"`.

    `fits` is asked about ever longer texts, so a question of megabytes is never measured whole.
    """
    markers = question.count(IMAGE_MARKER)
    parts = question.split(IMAGE_MARKER) if markers == images else [question]
    cut = _kept(parts, _most(sum(map(len, parts)), lambda length: fits(_kept(parts, length))))
    if markers != images and cut.count(IMAGE_MARKER) == images and images:
        # Here a marker is text. Were as many left as there are images, they would become places.
        cut = cut[: cut.rfind(IMAGE_MARKER)]
    return cut if cut.replace(IMAGE_MARKER, "").strip() and fits(cut) else None


def _kept(parts: list[str], length: int) -> str:
    """The parts with `length` characters of text in all, and every marker between them."""
    kept = []
    for part in parts:
        kept.append(part[:length])
        length = max(0, length - len(part))
    return IMAGE_MARKER.join(kept)


def _most(total: int, fits: Callable[[int], bool]) -> int:
    """The largest of 0…total-1 that fits, by doubling and then halving; 0 if none does."""
    low, high = 0, min(64, total)
    while high < total and fits(high):
        low, high = high, min(2 * high, total)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
