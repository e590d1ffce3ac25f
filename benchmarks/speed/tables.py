"""What the runs say: medians, spread and ratios, as values and as Markdown. Pure: runs in, text out.

A run is what one process of a side reported; a side has one run a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Run: TypeAlias = Mapping[str, Any]
Spread: TypeAlias = tuple[float, float, float]
"""Median, lowest, highest."""

BASE = "ours"
YARDSTICK = "TRL"
SAME_TORCH = "ours, TRL's torch"


class DifferentWork(RuntimeError):
    """Two sides did not do the same, so their times cannot be compared."""


def check_same_work(runs: Sequence[Run], sampled: int) -> None:
    """Raises DifferentWork unless every run sampled `sampled` tokens a step behind prompts of one length,
    and all that train have as many trained parameters."""
    prompt = runs[0]["prompt"] if runs else 0
    for name, wanted in (("tokens", sampled), ("prompt", prompt)):
        for run in runs:
            if run[name] != wanted:
                raise DifferentWork(f"{run['name']} had {run[name]} for {name!r}, not {wanted}.")
    trained = {run["name"]: run["trained"] for run in runs if run["update"]}
    if len(set(trained.values())) > 1:
        raise DifferentWork(f"The sides train different numbers of parameters: {trained}.")
    for run in runs:
        if not run["rollout"]:
            raise DifferentWork(f"{run['name']} measured nothing: the first step only warms up.")


def spread(values: Sequence[float]) -> Spread:
    return statistics.median(values), min(values), max(values)


def summary(runs: Sequence[Run]) -> dict[str, dict[str, Spread]]:
    """Of each side: seconds and tokens per second of rollout, update and step, and memory in MB."""
    found: dict[str, dict[str, Spread]] = {}
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        tokens = mine[0]["tokens"]
        rollout = [seconds for run in mine for seconds in run["rollout"]]
        update = [seconds for run in mine for seconds in run["update"]]
        found[name] = {
            "rollout": spread(rollout),
            "rollout tokens/s": spread([tokens / seconds for seconds in rollout]),
            "peak": spread([run["peak"] for run in mine]),
            "above idle": spread([run["peak"] - run["idle"] for run in mine]),
        }
        if update:
            step = [a + b for a, b in zip(rollout, update, strict=True)]
            found[name] |= {
                "update": spread(update),
                "update tokens/s": spread([tokens / seconds for seconds in update]),
                "step": spread(step),
            }
    return found


def ratios(runs: Sequence[Run], other: str, base: str = BASE) -> dict[str, Spread]:
    """Time of `other` over time of `base`, and memory of `base` over memory of `other`: the ratio of the
    medians over all rounds, and the lowest and highest of the rounds' own ratios."""
    whole = summary(runs)
    rounds = [
        summary([run for run in runs if run["round"] == number])
        for number in sorted({run["round"] for run in runs})
    ]
    found: dict[str, Spread] = {}
    for name in ("step", "rollout", "update"):
        if name in whole[other] and name in whole[base]:
            each = [one[other][name][0] / one[base][name][0] for one in rounds]
            found[name] = (whole[other][name][0] / whole[base][name][0], min(each), max(each))
    for name in ("peak", "above idle"):
        each = [one[base][name][0] / one[other][name][0] for one in rounds]
        found[name] = (whole[base][name][0] / whole[other][name][0], min(each), max(each))
    return found


# -- Markdown -----------------------------------------------------------------------------------------

COLUMNS = {
    "rollout tokens/s": "rollout, tokens/s",
    "update tokens/s": "update, tokens/s",
    "rollout": "rollout, s",
    "update": "update, s",
    "step": "optimiser step, s",
    "peak": "peak memory, MB",
    "above idle": "of it above idle, MB",
}


def comparison(found: Mapping[str, Any]) -> str:
    """The page of a whole comparison."""
    runs, about = found["runs"], found["about"]
    whole = summary(runs)
    lines = [
        "# Speed, side by side",
        "",
        f"`{about['command']}`, {about['machine']}, commit {about['commit']}.",
        "",
        f"{about['model']}; {about['work']}. Medians of {about['rounds']} rounds; the sides took turns, "
        f"each a fresh process with {about['repeats']} timed steps after one that warms up; in brackets the "
        "lowest and the highest of all timed steps. Tokens are sampled tokens, prompts not counted.",
        "",
        "| | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, values in whole.items():
        cells = [_cell(values.get(column)) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [f"| {name} | " + "left out |" * len(COLUMNS) for name in about["without"]]
    lines += ["", *_ratio_lines(runs, whole), "", *_side_lines(runs)]
    return "\n".join([*lines, *(f"\n{note}" for note in about["notes"])]) + "\n"


def _ratio_lines(runs: Sequence[Run], whole: Mapping[str, Any]) -> list[str]:
    others = [(name, BASE) for name in whole if name != BASE]
    if SAME_TORCH in whole:
        others.append((YARDSTICK, SAME_TORCH))
    if not others or BASE not in whole:
        return []
    heads = ["times faster: step", "rollout", "update", "share of its peak memory", "above idle"]
    lines = [
        f"`{BASE}` against the others; in brackets the lowest and the highest of the rounds' own ratios:",
        "",
        "| " + " | ".join(["", *heads]) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for name, base in others:
        made = ratios(runs, name, base)
        cells = [_cell(made.get(key), ".2f") for key in ("step", "rollout", "update", "peak", "above idle")]
        said = name if base == BASE else f"{name}, against: {base}"
        lines.append(f"| {said} | " + " | ".join(cells) + " |")
    return lines


def _side_lines(runs: Sequence[Run]) -> list[str]:
    """Versions and settings, a line a side."""
    lines = ["Versions and settings:", ""]
    for name in dict.fromkeys(run["name"] for run in runs):
        run = next(run for run in runs if run["name"] == name)
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        settings = ", ".join(f"{key} {value}" for key, value in run["settings"].items()) or "as shipped"
        lines.append(f"- {name}: {versions}, {run['threads']} threads; {settings}")
    return lines


def tuning(found: Mapping[str, Any]) -> str:
    """The page of what was tried: a line a try, seconds a step."""
    about = found["about"]
    lines = [
        "# What was tried to make each side fast",
        "",
        f"`{about['command']}`, {about['machine']}, commit {about['commit']}.",
        "",
        f"{about['model']}; {about['work']}. Every line is a fresh process; medians of {about['repeats']} "
        "timed steps, lowest and highest in brackets. Lines of one side are to be compared with its first.",
        "",
        "| side | changed | rollout, s | update, s | step, s | peak memory, MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for one in found["tries"]:
        if "failed" in one:
            lines.append(f"| {one['side']} | {one['changed']} | did not run: {_flat(one['failed'])} | | | |")
            continue
        values = next(iter(summary([one["run"]]).values()))
        cells = [_cell(values.get(column)) for column in ("rollout", "update", "step", "peak")]
        lines.append(f"| {one['side']} | {one['changed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def scaling(found: Mapping[str, Any]) -> str:
    """The page of the sweep: a table for each quantity that was varied."""
    about = found["about"]
    lines = [
        "# How the cost grows",
        "",
        f"`{about['command']}`, {about['machine']}, commit {about['commit']}.",
        "",
        f"{about['model']}. One quantity varies at a time, around {about['base']}. Medians of at most "
        f"{about['repeats']} timed steps after one that warms up.",
    ]
    for axis in dict.fromkeys(point["axis"] for point in found["points"]):
        lines += ["", f"## {axis}", ""]
        lines += [
            f"| {axis} | step, s: ours | TRL | times faster | rollout | update | peak MB: ours | TRL |",
            "|---:|" + "---:|" * 7,
        ]
        lines += [_point_line(point) for point in found["points"] if point["axis"] == axis]
    return "\n".join(lines) + "\n"


def _point_line(point: Mapping[str, Any]) -> str:
    sides = {name: summary([run])[name] for name, run in point["runs"].items()}
    ours, trl = sides.get(BASE), sides.get(YARDSTICK)
    why = point["failed"]

    def cell(side: str, values: Mapping[str, Spread] | None, name: str) -> str:
        return _flat(why.get(side, "left out")) if values is None else f"{values[name][0]:.3g}"

    def times(name: str) -> str:
        return f"{trl[name][0] / ours[name][0]:.2f}" if ours and trl else ""

    cells = [cell(BASE, ours, "step"), cell(YARDSTICK, trl, "step")]
    cells += [times(name) for name in ("step", "rollout", "update")]
    cells += [f"{values['peak'][0]:.0f}" if values else "" for values in (ours, trl)]
    note = f" ({point['note']})" if point.get("note") else ""
    return f"| {point['value']}{note} | " + " | ".join(cells) + " |"


def _cell(values: Spread | None, form: str = "") -> str:
    if values is None:
        return ""
    middle, low, high = (number(value, form) for value in values)
    return f"{middle} ({low} to {high})" if low != high else middle


def number(value: float, form: str = "") -> str:
    """Three digits, or as `form` says."""
    if form:
        return format(value, form)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _flat(text: str) -> str:
    """Fit for one cell of a table."""
    return " ".join(text.replace("|", "/").split())[:160]
