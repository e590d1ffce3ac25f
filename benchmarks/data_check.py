"""How fast `reflectvlm data check` reads, and how much memory it takes, on a file made for it.

    python benchmarks/data_check.py [rows=500000] [out=benchmarks/results/data_check.md]

Rows are of a usual size (a question of some 150 characters, a trace of 600, an image by its path, three more
columns), 1 in 1,000 of them with one of eight defects, so that what is found can be compared with what was
put in. Each file is checked in a process of its own, without images; the same is done for a tenth of the
rows, so that memory that grows with the file shows. Seconds are the process's own (CPU) and the clock's.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

WORDS = [
    "angle",
    "area",
    "below",
    "circle",
    "count",
    "cut",
    "equal",
    "figure",
    "given",
    "height",
    "line",
    "sum",
]
DEFECTS = ("missing answer", "empty answer", "broken JSON", "duplicate id", "markers differ from images",
           "missing image", "invalid UTF-8", "question is no text")  # fmt: skip
EVERY = 1000

CHILD = """
import json, sys, time
from reflectvlm.data.check import FileCheck
from reflectvlm.data.findings import Tally
from reflectvlm.data.sources import pick
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024
small, large = sys.argv[1:]
FileCheck()(pick(small), Tally())
before = peak()
tally, cpu = Tally(), time.process_time()
checked = FileCheck()(pick(large), tally)
cpu = time.process_time() - cpu
counts = {}
for _, reason, count, _ in tally.kinds("problem"):
    counts[reason] = counts.get(reason, 0) + count
print(json.dumps([checked.rows, cpu, checked.seconds, before, peak(), counts]))
"""


def rows(count: int) -> Iterator[bytes]:
    rng = random.Random(0)
    for number in range(1, count + 1):
        row = {
            "id": f"row-{number}",
            "question": f"<image> {' '.join(rng.choices(WORDS, k=25))}?",
            "answer": str(rng.randrange(1000)),
            "images": f"images/{number % 100}.png",
            "trace": f"<think>{' '.join(rng.choices(WORDS, k=100))}</think>",
            "level": number % 5,
            "subject": rng.choice(WORDS),
            "tags": ["made", "up"],
        }
        kind = DEFECTS[number // EVERY % len(DEFECTS)] if number % EVERY == 0 else ""
        yield _line(row, kind)


def _line(row: dict[str, object], kind: str) -> bytes:
    changes: dict[str, dict[str, object]] = {
        "empty answer": {"answer": " "},
        "duplicate id": {"id": "row-1"},
        "markers differ from images": {"question": "<image><image> What?"},
        "missing image": {"images": "images/gone.png"},
        "question is no text": {"question": 12},
    }
    row |= changes.get(kind, {})
    if kind == "missing answer":
        del row["answer"]
    line = json.dumps(row).encode()
    if kind == "broken JSON":
        line = line[:-9]
    if kind == "invalid UTF-8":
        line = line.replace(b"<think>", b"<think>\xff")
    return line + b"\n"


def measured(folder: Path, count: int) -> list[object]:
    (folder / "images").mkdir(exist_ok=True)
    for number in range(100):
        (folder / f"images/{number}.png").write_bytes(b"not looked into")
    small, large = folder / "small.jsonl", folder / f"rows-{count}.jsonl"
    small.write_bytes(b"".join(rows(50)))
    with large.open("wb") as file:
        file.writelines(rows(count))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(small), str(large)], capture_output=True, text=True, check=True
    )
    size = large.stat().st_size
    large.unlink()
    return [*json.loads(done.stdout), size]


def expected(count: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for number in range(EVERY, count + 1, EVERY):
        kind = DEFECTS[number // EVERY % len(DEFECTS)]
        found[kind] = found.get(kind, 0) + 1
    return found


def main(words: list[str]) -> None:
    if any("=" not in word for word in words):
        raise SystemExit(__doc__)
    given = dict(word.split("=", 1) for word in words)
    count = int(given.get("rows", 500_000))
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    lines = [
        "# data check: rows a second and memory",
        "",
        f"Made by `python benchmarks/data_check.py rows={count}`; without images, one process, {machine}.",
        "",
        "| rows | file, MB | CPU s | rows per CPU s | clock s | RSS before, MB | peak RSS, MB | all found |",
        "|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for size in (count // 10, count):
            total, cpu, clock, before, peak, counts, length = measured(Path(folder), size)
            right = "yes" if counts == expected(size) else f"no: {counts} for {expected(size)}"
            lines.append(
                f"| {total:,} | {length / 1e6:,.0f} | {cpu:.1f} | {total / cpu:,.0f} | {clock:.1f} "
                f"| {before:.0f} | {peak:.0f} | {right} |"
            )
    text = "\n".join(lines) + "\n"
    print(text)
    if "out" in given:
        Path(given["out"]).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
