"""How long `reflectvlm report` takes on a run of thousands of rollouts, and how long a browser takes to open
the page, beside how busy the machine was. Needs the extra `browser` and chromium.

    python benchmarks/report.py                     5,000 rollouts of 280 tokens, 1,000 pictures
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from PIL import Image

from reflectvlm.cli import main as reflectvlm

WORDS = "so the digit in the upper left may be a four or a nine " * 20
TEXT = f"<think>{WORDS}</think> <back>four</back> \\boxed{{4}}"
STARTS = [0, *(place for place, letter in enumerate(TEXT) if letter == " ")]


def write_run(folder: Path, rollouts: int, pictures: int) -> None:
    """A run's folder as training writes it."""
    folder.mkdir()
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rollouts):
            file.write(json.dumps(row(number, f"{number % pictures:064x}")) + "\n")
    keys = [f"metric{number}" for number in range(30)]
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, 3001):
            file.write(json.dumps({"step": step} | dict.fromkeys(keys, step % 97 / 97)) + "\n")
    data = io.BytesIO()
    Image.effect_noise((256, 256), 60).convert("RGB").save(data, "JPEG", quality=82)
    (folder / "sample_images").mkdir()
    for number in range(pictures):
        (folder / "sample_images" / f"{number:064x}.jpg").write_bytes(data.getvalue())


def row(number: int, picture: str) -> dict[str, object]:
    right = float(number % 3 > 0)
    return {
        "step": number // 50,
        "sample": f"sample-{number}",
        "question": f"Which digit is upper left on page {number}?",
        "answer": "4",
        "text": TEXT,
        "reward": right,
        "parts": {"accuracy": right, "format": 1.0},
        "scored": True,
        "stop": "eos",
        "length": len(STARTS),
        "group": 8,
        "policy_version": number // 50,
        "images": [picture],
        "ids": [1] * len(STARTS),
        "offsets": STARTS,
        "logprobs": [-0.123] * len(STARTS),
        "blocks": [],
        "grids": [[1, 9, 9]],
    }


def opened(file: Path, browser: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for _ in range(3):
            tab = chromium.new_page()
            started = time.perf_counter()
            tab.goto(file.as_uri())
            tab.wait_for_selector("html[data-ready]")
            ready = time.perf_counter()
            tab.get_by_role("button", name="Wrong").click()
            filtered = time.perf_counter()
            print(f"opened in {ready - started:.2f} s, filtered in {filtered - ready:.2f} s")
            tab.close()
        chromium.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=5000)
    parser.add_argument("--pictures", type=int, default=1000)
    asked = parser.parse_args()
    browser = os.environ.get("REFLECTVLM_BROWSER") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        write_run(run, asked.rollouts, asked.pictures)
        started = time.perf_counter()
        reflectvlm(["report", str(run)])
        seconds = time.perf_counter() - started
        print(f"{os.cpu_count()} cores, load average of a minute {os.getloadavg()[0]:.1f}")
        print(f"{asked.rollouts:,} rollouts of {len(STARTS)} tokens: {seconds:.1f} s to write")
        if browser is None:
            raise SystemExit("No browser: apt-get install chromium, or name one in REFLECTVLM_BROWSER.")
        opened(run / "report.html", browser)


if __name__ == "__main__":
    main()
