"""Qwen Look Again's ablation table on the embedded default, over several seeds, and what re-attention does to
the attention that the image gets.

    python benchmarks/qwen_la.py --jobs 2               # seeds 0 1 2 of `reflectvlm pipeline qwen_la`

Every seed has its own cold start, BRPO run, distilled rows and SFT runs. Figures are greedy answers to the
400 test pages, made of scans that no training step has seen. Attention: over the first 100 of them, the
share of a sampled token's attention (mean over layers and heads) that lies on visual tokens, those of the
prompt and those put in again, before, inside and after the reflections of an answer. Readings: over all
pages, how often a digit that was read twice was right the first time, how often looking again repaired or
spoiled it, and the accuracy of the answers whose last readings are all right. Results go to
benchmarks/results/qwen_la.json and .md, with the machine.
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

RAW = argparse.RawDescriptionHelpFormatter  # the text above as it is written
HERE = Path(__file__).parent
COLUMNS = ("accuracy", "hallucination", "layout", "length", "inserted", "seconds")
REGIONS = ("before", "inside", "after")
SHARES = ("text-only", "COPY", "ROUTE m=50")


def run(seed: int, overrides: list[str], root: str) -> dict[str, Any]:
    """One seed's whole chain, and its attention shares."""
    from reflectvlm.pipeline import run_pipeline

    result = run_pipeline("qwen_la", f"seed={seed}", f"root={root}/runs", *overrides)
    rows = json.loads((result.folder / "summary.json").read_text())["rows"]
    models = {row["name"]: row["model"] for row in rows}
    figures = {name: asdict(one) for name, one in result.figures.items()}
    looked = {name: look(models[name]) for name in SHARES}
    return {"seed": seed, "figures": figures} | {
        part: {name: one[part] for name, one in looked.items()} for part in ("attention", "readings")
    }


def look(model: str, pages: int = 400) -> dict[str, dict[str, float | None]]:
    """What a model's answers attend to and read, with its own re-attention."""
    from reflectvlm import Digits, Generator, SamplingParams

    generator = Generator.load(model, sampling=SamplingParams(max_tokens=128, temperature=0.0))
    rollouts = list(generator.answers(Digits(split="test", size=pages), batch=64))
    return {"attention": shares(generator.policy, rollouts[:100]), "readings": readings(rollouts)}


def readings(rollouts: Any) -> dict[str, float | None]:
    """First and last reading of every digit that an answer names at least twice."""
    from reflectvlm import Accuracy
    from reflectvlm.data.digit_mentions import mentions

    pairs: list[tuple[bool, bool]] = []
    seen_right: list[float] = []
    for rollout, right in zip(rollouts, Accuracy(answer_from="CONCLUSION")(rollouts), strict=True):
        digits = rollout.prompt.sample.columns["digits"]
        named: dict[int, list[bool]] = {}
        for place, digit in mentions(rollout.text):
            truth = None if digits[place] is None else str(digits[place])
            named.setdefault(place, []).append(digit == truth)
        pairs += [(one[0], one[-1]) for one in named.values() if len(one) > 1]
        if named and all(one[-1] for one in named.values()):
            seen_right.append(right)

    def share(of: list[bool]) -> float | None:
        return sum(of) / len(of) if of else None

    return {
        "first right": share([first for first, _ in pairs]),
        "repaired": share([last for first, last in pairs if not first]),
        "spoiled": share([not last for first, last in pairs if first]),
        "accuracy if read right": statistics.mean(seen_right) if seen_right else None,
    }


def shares(policy: Any, rollouts: Any) -> dict[str, float | None]:
    """Share of attention on visual tokens, per region of the answers."""
    totals = {region: [0.0, 0] for region in REGIONS}
    for rollout in rollouts:
        for region, (attention, tokens) in regions(policy, rollout).items():
            totals[region][0] += attention
            totals[region][1] += tokens
    return {region: total / tokens if tokens else None for region, (total, tokens) in totals.items()}


def regions(policy: Any, rollout: Any) -> dict[str, tuple[float, int]]:
    """Region -> (attention on visual tokens, summed over its tokens; number of its tokens)."""
    from reflectvlm.models.attention import AttentionWatch
    from reflectvlm.rewards.reflection import closed_blocks
    from reflectvlm.types import AttentionProbe

    blocks = closed_blocks(rollout.text, "REFLECTION")
    batch = policy.batch([(rollout.prompt, rollout.spans)])
    trained = batch.trained[0].nonzero().flatten().tolist()
    found: dict[str, tuple[float, int]] = {}
    for region in REGIONS if blocks else ("before",):
        first, last = (blocks[0].start, blocks[-1].end) if blocks else (len(rollout.text), 0)
        inside = {
            "before": lambda at, a=first: at < a,
            "inside": lambda at: any(block.start <= at < block.end for block in blocks),
            "after": lambda at, b=last: at >= b,
        }[region]
        queries = torch.zeros_like(batch.trained)
        columns = [c for c, at in zip(trained, rollout.offsets, strict=True) if inside(at)]
        queries[0, columns] = True
        if not columns:
            continue
        watch = AttentionWatch(probe=AttentionProbe(), queries=queries, width=batch.ids.shape[1])
        with torch.no_grad():
            features = policy.features(batch.images)
            embedded = policy.embed(batch.ids, batch.visual, features)
            policy.hidden(embedded, batch.positions, None, watch=watch)
        found[region] = (float(watch.total[0][batch.visual[0] >= 0].sum()), len(columns))
    return found


def spread(values: list[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.{digits}f} ± {deviation:.{digits}f}"


def tables(rows: list[dict[str, Any]], about: dict[str, str]) -> str:
    names = list(rows[0]["figures"])
    lines = [f"# Qwen Look Again on the embedded default: {len(rows)} seeds", ""]
    lines += [f"`{about['command']}`, {about['machine']}", "", "Mean ± standard deviation over seeds.", ""]
    lines += ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name in names:
        cells = [
            spread([row["figures"][name][column] for row in rows], 1 if column in COLUMNS[3:] else 3)
            for column in COLUMNS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "Share of attention on visual tokens, by where the attending token stands:", ""]
    lines += ["| | before reflections | inside | after |", "|---|---:|---:|---:|"]
    for name in SHARES:
        cells = [spread([row["attention"][name][region] for row in rows]) for region in REGIONS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "Digits that an answer reads twice, before and inside of its reflection:", ""]
    columns = list(rows[0]["readings"][SHARES[0]])
    lines += ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name in SHARES:
        cells = [spread([row["readings"][name][column] for row in rows]) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds run at one time, each on one thread")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the pipeline, key=value")
    parser.add_argument("--name", default="qwen_la")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        os.environ.setdefault("REFLECTVLM_CACHE", f"{root}/cache")
        if options.jobs > 1:
            os.environ["OMP_NUM_THREADS"] = "1"
        with ProcessPoolExecutor(options.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
            jobs = [pool.submit(run, seed, options.set, root) for seed in options.seeds]
            rows = [job.result() for job in jobs]
    about = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        + ("one thread a seed" if options.jobs > 1 else f"{torch.get_num_threads()} threads"),
    }
    results = HERE / "results"
    (results / f"{options.name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    text = tables(rows, about)
    (results / f"{options.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
