"""The page of a scale run. Pure: results in, text out. What was not asked or did not run is said as loudly as
what failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_table import ended, first

Line = dict[str, Any]
ASKED = {
    "recipe": "recipes take steps in bfloat16",
    "oracle": "the test suite's oracles, float64",
    "check": "fast paths and plain ones, float32 and bfloat16",
    "setting": "ZeRO, host memory, LoRA, 8 bits; one process",
}
GB = 1e9
ALLOWED = 0.15
"""Of a prediction of memory."""


def page(lines: Sequence[Line]) -> str:
    out = ["# Scale on one device", "", *_where(lines), "", *_asked(lines), "", *_large(lines), ""]
    out += [*_failed(lines), "Stages:", ""]
    out += [f"- {ended(line)}" for line in lines if line["what"] == "end"]
    return "\n".join(out) + "\n"


def _where(lines: Sequence[Line]) -> list[str]:
    device = first(lines, "device")
    if device is None:
        return ["Which machine this was is not known: its stage told nothing."]
    memory = f", {device['memory'] / GB:.0f} GB" if device["memory"] else ""
    versions = ", ".join(f"{name} {number or 'missing'}" for name, number in device["versions"].items())
    told = [
        f"{device['name']}{memory}, CUDA {device['cuda']}; {device['host']}; commit {device['commit']}; "
        f"python {device['python']}, {versions}."
    ]
    if device["tiny"] or device["name"] == "CPU":
        told += ["", "**A trial of the script at tiny sizes: it measures nothing.**"]
    return told


def _asked(lines: Sequence[Line]) -> list[str]:
    out = ["| asked of tiny models | holds | fails | not run |", "|---|---:|---:|---:|"]
    for what, title in ASKED.items():
        made = [line for line in lines if line["what"] == what]
        if not made:
            out.append(f"| {title} | not asked | | |")
            continue
        count = [sum(line["ok"] is wanted for line in made) for wanted in (True, False, None)]
        out.append(f"| {title} | {count[0]} | {count[1]} | {count[2]} |")
    return out


def _large(lines: Sequence[Line]) -> list[str]:
    """Measured beside predicted; GB of live tensors, and of the whole card."""
    made = [line for line in lines if line["what"] == "7B"]
    if not made:
        return ["No step of 7B told anything."]
    out = [
        "| 7B, 2 prompts x 8 rollouts | rollout s | update s | step s | plan s | peak GB | plan GB | error "
        "| card GB | plan GB | fullest by plan |",
        "|---|" + 9 * "---:|" + "---|",
    ]
    return out + [_row(line) for line in made]


def _row(line: Line) -> str:
    title = line.get("case", line["name"])
    planned = f"{line['plan'] / GB:.4g}" if "plan" in line else ""
    if "measured" not in line:
        why = line.get("skipped") or "failed, see below"
        return f"| {title} | not measured: {why} | | | | | | | | {planned} | {line.get('plan_at', '')} |"
    taken = line["seconds"]
    rollout, update = (f"{taken[name]:.3g}" if name in taken else "" for name in ("rollout", "update"))
    error = line["predicted"] / line["measured"] - 1
    used = f"{line['card_used'] / GB:.1f}" if "card_used" in line else ""
    mark = "" if abs(error) <= ALLOWED else " **beyond 15 %**"
    return (
        f"| {title} | {rollout} | {update} | {sum(taken.values()):.3g} | "
        f"{sum(line['plan_seconds'].values()):.3g} | {line['measured'] / GB:.4g} | "
        f"{line['predicted'] / GB:.4g} | {100 * error:+.1f} %{mark} | {used} | {planned} | {line['at']} |"
    )


def _failed(lines: Sequence[Line]) -> list[str]:
    out: list[str] = []
    for line in lines:
        if line.get("ok", True) is True:
            continue
        if line["ok"] is None:
            out.append(f"- {line['name']}: not run, {line['skipped']}")
            continue
        gaps = line.get("gaps", {"difference": line["gap"]} if "gap" in line else {})
        why = line.get("error") or ", ".join(f"{name} {_gap(gap)}" for name, gap in gaps.items())
        out.append(f"- **{line['name']}** ({line['what']}): {' '.join(str(why).split())[-400:]}")
    return ["What failed or did not run:", "", *out, ""] if out else []


def _gap(gap: Any) -> str:
    """A difference, perhaps with what is allowed."""
    return f"{gap[0]:.2g} of {gap[1]:.2g}" if isinstance(gap, list | tuple) else f"{gap:.2g}"
