"""Does a self-made cold start train as well as gold traces? The tiny base makes its own, three seeds.

    python benchmarks/coldstart.py                    # seeds 0 1 2, one after the other
    python benchmarks/coldstart.py --seeds 0 --questions 800

Gold are the traces that recipe lookback_sft makes of 400 pages: every reading in them is right, but for
those that are to be corrected. Self-made are those of `reflectvlm data coldstart method=semantic_back
source=digits self=true model=local:tiny`: of more pages, because many questions give no trace, with the
questions' answers and nothing else that is known about a page. The same recipe trains on both for as many
steps. Figures are greedy answers to the 400 test pages. Results go to benchmarks/results/coldstart.json
and .md. `--cache FOLDER` keeps what the base says, so that a second run with other shares asks it nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from reflectvlm import load_recipe
from reflectvlm.curate.coldstart_command import run as coldstart
from reflectvlm.data.digits import Digits
from reflectvlm.data.digits import reading as digit_reading

HERE = Path(__file__).parent
SHOWN = ("accuracy", "back_rate", "layout_rate")
SHARES = "corrected:0.1,confirmed:0.9"
"""Fewer corrections than the 0.3 of the gold traces: a model's own wrong readings are plausible ones, and to
train on them is to learn them."""


def made(seed: int, options: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The self-made rows and their report."""
    words = ["method=semantic_back", "source=digits", "self=true", "model=local:tiny,batch=64"]
    words += [f"seed={seed}", f"max_rows={options.questions}", f"n={options.samples}", "max_tokens=64"]
    words += [f"cache={options.cache}/{seed}"] if options.cache else []
    code = coldstart([*words, f"shares={options.shares}", f"out={folder}"])
    assert code == 0, f"exit code {code}"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return folder / "rows.jsonl", report


def truth(rows: Path, seed: int) -> float:
    """Share of the second looks that name what stands on the page: nothing in the making knew it."""
    found = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        facts: Any = Digits(seed=[11, seed])[int(row["id"].rpartition("-")[2])].columns
        seen = ", ".join(digit_reading(place, facts["digits"][place]) for place in facts["looks"])
        found.append(seen.lower() in row["trace"].partition("<back>")[2].partition("</back>")[0].lower())
    return sum(found) / len(found)


def trained(seed: int, root: Path, *overrides: str) -> dict[str, float]:
    """What recipe lookback_sft reaches on the test pages."""
    trainer = load_recipe("lookback_sft", f"seed={seed}", f"output.root={root}", *overrides)
    result = trainer.run()
    return {name: result.after[name] for name in SHOWN}


def of_seed(seed: int, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    rows, report = made(seed, options, root / f"set{seed}")
    gold = trained(seed, root / f"gold{seed}")
    own = trained(seed, root / f"own{seed}", "data=rows", f"data.path={rows}")
    return {
        "seed": seed,
        "gold": gold,
        "own": own,
        "questions": report["questions"],
        "rows": report["rows"],
        "looks": report["looks"],
        "right_readings": round(truth(rows, seed), 4),
    }


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [f"# lookback_sft on gold and on self-made traces: {len(rows)} seeds", ""]
    lines += [f"`{about['command']}`, {about['machine']}", ""]
    lines += ["| seed | gold | self-made | difference | self-made rows | right readings |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        gold, own = row["gold"]["accuracy"], row["own"]["accuracy"]
        cells = [f"{gold:.3f}", f"{own:.3f}", f"{own - gold:+.3f}", f"{row['rows']} of {row['questions']}"]
        cells.append(f"{row['right_readings']:.2f}")
        lines.append(f"| {row['seed']} | " + " | ".join(cells) + " |")
    gold, own = ([row[name]["accuracy"] for row in rows] for name in ("gold", "own"))
    change = [b - a for a, b in zip(gold, own, strict=True)]
    lines.append(f"| mean ± sd | {spread(gold)} | {spread(own)} | {spread(change)} | | |")
    layout = [row["own"]["layout_rate"] for row in rows]
    return "\n".join([*lines, "", f"Valid layout after the self-made traces: {spread(layout)}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=2400)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--shares", default=SHARES)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    command = shlex.join(["python", "benchmarks/coldstart.py", *sys.argv[1:]])
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread"
    about = {"command": command, "machine": machine, "torch": torch.__version__}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            rows.append(of_seed(seed, options, Path(folder)))
            text = table(rows, about)
            print(text, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    values = json.dumps({**about, "rows": rows}, indent=1)
    (options.out / "coldstart.json").write_text(values + "\n", encoding="utf-8")
    (options.out / "coldstart.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
