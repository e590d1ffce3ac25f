"""Makes `digits.npz` again: `python -m reflectvlm.data.digits_source OUT.npz`. Needs scikit-learn.

The scans come from scikit-learn's copy of the test part of the UCI set, shuffled once with a fixed
seed, so that every split has all digits. Nothing else in the package imports this file.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import numpy as np

_SEED = 20260101


def arrays() -> tuple[np.ndarray, np.ndarray]:
    """Pixels [1797, 8, 8] scaled from 0..16 to 0..255, and labels [1797], as the package holds them."""
    try:
        load_digits = import_module("sklearn.datasets").load_digits  # has no types
    except ImportError as error:
        raise ValueError(
            "digits.npz is made from scikit-learn's copy of the scans, and scikit-learn is not installed: "
            "pip install scikit-learn."
        ) from error
    source = load_digits()
    order = np.random.default_rng(_SEED).permutation(len(source.target))
    pixels = np.clip(source.images[order] * 16, 0, 255).astype(np.uint8)
    return pixels, source.target[order].astype(np.uint8)


def main(given: list[str]) -> None:
    if len(given) != 1 or not given[0].endswith(".npz"):
        raise ValueError(f"Got {given}. Give one name: python -m reflectvlm.data.digits_source OUT.npz")
    pixels, labels = arrays()
    np.savez_compressed(Path(given[0]), pixels=pixels, labels=labels)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        sys.exit(str(problem))
