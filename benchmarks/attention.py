"""What trained models look at, and whether they use it: Look-Back against GRPO without `<back>`, with
controls.

    for seed in 0 1 2; do
      reflectvlm train recipe=lookback_rl seed=$seed root=runs/lookback-$seed
      reflectvlm train recipe=grpo seed=$seed root=runs/grpo-$seed
    done
    python benchmarks/attention.py --lookback runs/lookback-?/*/model --grpo runs/grpo-?/*/model

The greedy answers to test pages, made of scans that no training step has seen. Per model: the share of
attention on the image before, inside and after `<back>`; how much less probable an answer is when the digits
that are asked about are greyed, and when as large another part of the page is; how often a wrong first
reading that is put into its mouth is repaired; digits named that are not there. Look-Back's models also with
the image inserted at `<back>` and with as many tokens of text there, neither of which they were trained
with. `--copy` takes models that were trained with COPY (recipe qwen_la_copy), with and without their image,
and with text.

Results go to benchmarks/results/attention.json and .md, figures beside them. Of several seeds tables and
figures have the mean and the standard deviation over seeds, of one the figures have the error over answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from reflectvlm import Accuracy, Digits, Generator, Implicit, SamplingParams, VisualCopy
from reflectvlm.attention import MatchedText, heat_maps, trend
from reflectvlm.attention.boxes import objects_of
from reflectvlm.attention.figures import trend_figure
from reflectvlm.attention.figures_maps import maps_figure
from reflectvlm.attention.figures_means import hallucination_figure, length_figure, parts_figure
from reflectvlm.attention.files import plain, save_figure
from reflectvlm.attention.places import PARTS
from reflectvlm.attention.readings import by_part, by_step
from reflectvlm.attention.spread import curves_over_seeds, parts_over_seeds
from reflectvlm.attention_options import Asked
from reflectvlm.attention_rows import Looked, look
from reflectvlm.attention_tables import numbers
from reflectvlm.protocols import Reattention

RAW = argparse.RawDescriptionHelpFormatter  # the text above as it is written
HERE = Path(__file__).parent
SAMPLING = SamplingParams(max_tokens=128, temperature=0.0)
AT_BACK = VisualCopy(trigger="<back>", limit=1)
Ways = Mapping[str, Callable[[Generator], Reattention]]


def own(generator: Generator) -> Reattention:
    """What a model was trained with."""
    assert generator.reattention is not None
    return generator.reattention


LOOKBACK: Ways = {
    "Look-Back": lambda _: Implicit(),
    "Look-Back, image at <back>": lambda _: AT_BACK,
    "Look-Back, text at <back>": lambda _: MatchedText(like=AT_BACK),
}
GRPO: Ways = {"GRPO": lambda _: Implicit()}
COPY: Ways = {
    "COPY": own,
    "COPY, text instead": lambda one: MatchedText(like=own(one)),
    "COPY, nothing inserted": lambda _: Implicit(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    for name, recipe in (("lookback", "lookback_rl"), ("grpo", "grpo"), ("copy", "qwen_la_copy")):
        parser.add_argument(f"--{name}", nargs="+", default=[], help=f"models of recipe {recipe}, one a seed")
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--example", type=int, default=4, help="the page whose curve and maps are drawn")
    parser.add_argument("--name", default="attention")
    options = parser.parse_args()
    if not options.lookback and not options.grpo and not options.copy:
        parser.error("name trained models: --lookback, --grpo or --copy; --help says how they are trained")
    started = time.perf_counter()
    looked = looked_at(options)
    about = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "training": training(options),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "pages": options.pages,
        "seconds": round(time.perf_counter() - started),
    }
    results = HERE / "results"
    draw(looked, results, options)
    rows = {name: [numbers(one) | one.left_out for one, _ in seeds] for name, seeds in looked.items()}
    for name, seeds in looked.items():
        for row, (_, more) in zip(rows[name], seeds, strict=True):
            row |= more
    (results / f"{options.name}.json").write_text(json.dumps(plain({**about, "rows": rows}), indent=1) + "\n")
    text = tables(rows, about)
    (results / f"{options.name}.md").write_text(text)
    print(text)


def looked_at(options: argparse.Namespace) -> dict[str, list[tuple[Looked, dict[str, float]]]]:
    """Name -> per seed what was found, and what else is known of its answers."""
    asked = Asked(
        out=HERE / "results", layers=None, each=False, tags=("back", "REFLECTION"), query="token", chunk=64
    )
    pages = Digits(split="test", size=options.pages)
    found: dict[str, list[tuple[Looked, dict[str, float]]]] = {}
    for models, ways in ((options.lookback, LOOKBACK), (options.grpo, GRPO), (options.copy, COPY)):
        for model in models:
            loaded = Generator.load(model, sampling=SAMPLING)
            for name, way in ways.items():
                generator = dataclasses.replace(loaded, reattention=way(loaded))
                one = look(generator, name, pages, asked, ("removal", "splice"), 64)
                found.setdefault(name, []).append((one, {"accuracy": accuracy(one, pages)}))
                print(f"{model}, {name}: done", file=sys.stderr)
    if "Look-Back" in found and "GRPO" in found:
        begin = statistics.mean(
            float((reading.part == 0).sum()) for one, _ in found["Look-Back"] for reading in one.readings
        )
        for one, more in found["GRPO"]:
            more |= late(one, round(begin))
    return found


def accuracy(one: Looked, pages: Sequence[Any]) -> float:
    box = Accuracy(answer_from="CONCLUSION" if one.name.startswith("COPY") else "boxed")
    gold = {page.id: page.answer for page in pages}
    right = [box.is_right(reading.text, gold[reading.id], reading.id) for reading in one.readings]
    return statistics.mean(map(float, right))


def late(one: Looked, begin: int) -> dict[str, float]:
    """The shares of tokens from number `begin` on, where Look-Back's `<back>` begins on average: the fair
    partner of what is inside of it, since attention to an image falls as an answer grows."""
    tails = [reading.shares[begin:] for reading in one.readings if len(reading.shares) > begin]
    return {
        "late_from": float(begin),
        "late_answers": float(len(tails)),
        "late_visual": statistics.mean(float(tail[:, 2].mean()) for tail in tails) if tails else float("nan"),
        "late_published": statistics.mean(float(tail[:, 3].mean()) for tail in tails)
        if tails
        else float("nan"),
    }


def training(options: argparse.Namespace) -> list[str]:
    """The command that made each model, as far as its run's folder tells."""
    made = []
    for recipe, models in (
        ("lookback_rl", options.lookback),
        ("grpo", options.grpo),
        ("qwen_la_copy", options.copy),
    ):
        for model in models:
            file = Path(model).parent / "overrides.txt"
            words = file.read_text().split("\n") if file.is_file() else []
            kept = [word for word in words if word and not word.startswith(("output.root=", "root="))]
            made.append(shlex.join(["reflectvlm", "train", f"recipe={recipe}", *kept]))
    return made


# -- what is shown --------------------------------------------------------------------------------


def draw(looked: Mapping[str, Sequence[Any]], folder: Path, options: argparse.Namespace) -> None:
    """Figures over all seeds, and one page of the first Look-Back model."""
    seeds_of = {name: [one for one, _ in seeds] for name, seeds in looked.items()}
    title = counted(options.pages, seeds_of)
    steps = {
        name: curves_over_seeds([by_step(one.readings) for one in seeds]) for name, seeds in seeds_of.items()
    }
    parts = {
        name: parts_over_seeds([by_part(one.readings) for one in seeds]) for name, seeds in seeds_of.items()
    }
    said = {
        name: curves_over_seeds([list(map(dataclasses.asdict, one.hallucination)) for one in seeds])
        for name, seeds in seeds_of.items()
    }
    lengths = length_figure(steps, f"attention to visual tokens, {title}")
    save_figure(lengths, folder, f"{options.name}_lengths")
    save_figure(parts_figure(parts, title), folder, f"{options.name}_parts")
    save_figure(hallucination_figure(said, title), folder, f"{options.name}_hallucination")
    page = Digits(split="test", size=options.example + 1)[options.example]
    shown = {
        "lookback": (options.lookback, LOOKBACK, "Look-Back"),
        "grpo": (options.grpo, GRPO, "GRPO"),
        "copy": (options.copy, COPY, "COPY"),
    }
    for key, (models, ways, name) in shown.items():
        if not models:
            continue
        loaded = Generator.load(models[0], sampling=SAMPLING)
        generator = dataclasses.replace(loaded, reattention=ways[name](loaded))
        (rollout,) = generator.batch([page])
        label = f"{name}: {page.question}"
        region = next((f"<{tag}>" for tag in ("back", "REFLECTION") if f"<{tag}>" in rollout.text), "")
        made = trend(generator.policy, rollout)
        save_figure(trend_figure(made, label, region), folder, f"{options.name}_{key}_trend")
        objects = objects_of(page)
        assert objects is not None
        drawn = maps_figure(heat_maps(generator.policy, rollout), page.images, label, objects.wanted)
        save_figure(drawn, folder, f"{options.name}_{key}_maps")


def counted(pages: int, looked: Mapping[str, Sequence[Any]]) -> str:
    """ "200 test pages, 3 seeds"; "2 to 3 seeds" where models differ in it."""
    numbers = sorted({len(seeds) for seeds in looked.values()})
    some = " to ".join(map(str, dict.fromkeys([numbers[0], numbers[-1]])))
    return f"{pages} test pages, {some} seed{'s' if numbers[-1] > 1 else ''}"


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None and value == value]
    if not known:
        return "–"
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{deviation}"


def of(rows: Sequence[Mapping[str, Any]], key: str, number: str, digits: int = 3) -> str:
    """A mean or a rate of each seed, and what it is of in all seeds: "0.250 ± 0.010 (n 400)"."""
    known = [row for row in rows if row.get(key) is not None]
    said = spread([row[key] for row in known], digits)
    return said if said == "–" else f"{said} (n {sum(row[number] for row in known):.0f})"


def tables(rows: Mapping[str, Sequence[Mapping[str, Any]]], about: Mapping[str, Any]) -> str:
    rows = {name.replace("<back>", "`<back>`"): seeds for name, seeds in rows.items()}
    title = counted(about["pages"], rows)
    lines = [f"# What is looked at: {title}", ""]
    lines += [f"`{about['command']}`, {about['machine']}, {about['seconds']} s. Models:", ""]
    lines += [f"- `{command}`" for command in about["training"]]
    lines += [
        "",
        "Mean ± standard deviation over seeds. n is of all seeds together: answers, but of CHAIR-i mentions "
        "and of recall digits that are asked about.",
        "",
    ]
    lines += _table("Share of attention on the image's tokens, inserted ones counted (plain)", "visual", rows)
    lines += _table(
        "The same as Look-Back's figure counts it (prompt's image, without the system prompt)",
        "published",
        rows,
    )
    lines += _late(rows)
    lines += _table(
        "Of it, on the quarters that are asked about, over chance (1: no more than elsewhere)", "lift", rows
    )
    lines += _removal(rows)
    lines += _splice(rows)
    return "\n".join(lines) + "\n"


def _table(title: str, key: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    order = (*PARTS, "all")
    lines = [f"## {title}", "", f"| | {' | '.join(order)} |", "|---|" + "---:|" * len(order)]
    for name, seeds in rows.items():
        parts = [[row["parts"].get(part, {}) for row in seeds] for part in order]
        cells = [of(part, key, "answers") for part in parts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _late(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    seeds = [row for row in rows.get("GRPO", ()) if "late_from" in row]
    if not seeds:
        return []
    return [
        f"GRPO from token {seeds[0]['late_from']:.0f} on, where Look-Back's `<back>` begins on average: "
        f"plain {of(seeds, 'late_visual', 'late_answers')}, "
        f"as published {of(seeds, 'late_published', 'late_answers')}.",
        "",
    ]


def _removal(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    order = (*PARTS, "answer")
    lines = ["## Fall of the answer's log-probability, in nats, by what is greyed", ""]
    head = " | ".join(f"{part}: asked, other" for part in order)
    lines += [f"| | {head} |", "|---|" + "---:|" * len(order)]
    for name, seeds in rows.items():
        falls = [[row["removal"].get(part, {}) for row in seeds] for part in order]
        cells = [
            ", ".join([spread([one.get("asked") for one in part], 2), of(part, "other", "answers", 2)])
            for part in falls
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _splice(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = ["## Answers, and what becomes of a beginning with a wrong reading", ""]
    lines += ["| | accuracy | wrong beginning repaired | right beginning kept | CHAIR-i | recall |"]
    lines += ["|---|" + "---:|" * 5]
    for name, seeds in rows.items():
        last = [row["hallucination"][-1] if row["hallucination"] else {} for row in seeds]
        cells = [of(seeds, "accuracy", "answers")]
        cells += [of([row["splice"] for row in seeds], key, "rows") for key in ("repaired", "kept")]
        cells += [of(last, "chair_i", "mentioned"), of(last, "recall", "there")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
