"""The command that makes the shipped scans again."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from reflectvlm.data.digits import _scans
from reflectvlm.data.digits_source import main


def test_the_shipped_scans_are_made_again(tmp_path: Path) -> None:
    """A file of unknown origin in the package: nobody could check what it holds."""
    pytest.importorskip("sklearn", reason="scikit-learn holds the original scans")
    main([str(tmp_path / "digits.npz")])
    with np.load(tmp_path / "digits.npz") as made:
        for name, shipped in zip(("pixels", "labels"), _scans(), strict=True):
            assert made[name].dtype == shipped.dtype
            assert np.array_equal(made[name], shipped)


def test_without_scikit_learn_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no dependency of the package, so its absence is the usual case."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        main([str(tmp_path / "digits.npz")])
    with pytest.raises(ValueError, match=r"Give one name: .*OUT.npz"):
        main([])
