"""A headless browser for tests of pages. Where there is none they are skipped, and say what to install."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("REFLECTVLM_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None,
    reason="no browser: apt-get install chromium, or name another one in REFLECTVLM_BROWSER",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright drives the browser: pip install 'reflectvlm[browser]'"
    )
    with playwright.sync_playwright() as driver:
        # Its sandbox needs rights that a container's root does not have; it only opens what tests write.
        one = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield one
        one.close()
