"""The page of a GPU run: what was measured against what was aimed at. Pure: results in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TARGETS = {
    "decode, share of the copy bandwidth": 0.60,
    "decode, times transformers generate": 4.0,
    "update, times TRL": 2.0,
    "update, share of the matrix rate": 0.45,
    "peak memory, share of TRL's (at most)": 0.70,
}


def page(lines: Sequence[dict[str, Any]]) -> str:
    device = first(lines, "device")
    out = ["# On a GPU", ""]
    if device:
        work = device["work"]
        out += [
            f"{device['name']}, torch {device['torch']}, transformers {device['transformers']}; language "
            f"{device['shape']['layers']} x {device['shape']['width']}, bfloat16, random weights; "
            f"{work['prompts']} prompts x {work['group']} rollouts, {(work['pixels'] // 28) ** 2} visual "
            f"tokens, {work['tokens']} new tokens.",
            "",
        ]
    out += ["| target | aim | measured |", "|---|---:|---:|"]
    found = measured(lines)
    for name, aim in TARGETS.items():
        value = found.get(name)
        out.append(f"| {name} | {aim:g} | {'not measured' if value is None else f'{value:.2f}'} |")
    update, trl = (first(lines, "update", side) for side in ("ours", "TRL"))
    if update and trl and (names := different(update, trl)):
        out += [
            "",
            f"**The sides did different work: {', '.join(names)}.** They are not set against each other.",
        ]
    out += ["", *_sides(lines), "", *_checks(lines), "", "Stages:", ""]
    out += [f"- {ended(line)}" for line in lines if line["what"] == "end"]
    return "\n".join(out) + "\n"


def measured(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The targets' values, as far as both sides of each are there."""
    copy, matmul = first(lines, "copy"), first(lines, "matmul")
    ours, plain = _best(lines, "ours"), _best(lines, "transformers")
    update, trl = (first(lines, "update", side) for side in ("ours", "TRL"))
    values: dict[str, float] = {}
    if ours and copy:
        values["decode, share of the copy bandwidth"] = ours["bytes_per_second"] / copy["bytes_per_second"]
    if ours and plain:
        values["decode, times transformers generate"] = ours["tokens_per_second"] / plain["tokens_per_second"]
    if update and trl and not different(update, trl):
        values["update, times TRL"] = trl["seconds"] / update["seconds"]
        if "peak_allocated" in update and "peak_allocated" in trl:
            share = update["peak_allocated"] / trl["peak_allocated"]
            values["peak memory, share of TRL's (at most)"] = share
    if update and matmul:
        rate = update["flops_per_second"] / matmul["flops_per_second"]
        values["update, share of the matrix rate"] = rate
    return values


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What two updates did not have in common and should have."""
    return [name for name in ("prompt", "trained") if one.get(name) != other.get(name)]


def _sides(lines: Sequence[dict[str, Any]]) -> list[str]:
    out = ["| | tokens/s | seconds | rate | peak allocated, GB |", "|---|---:|---:|---:|---:|"]
    for line in lines:
        if line["what"] not in ("decode", "update"):
            continue
        rate = (
            f"{line['bytes_per_second'] / 1e12:.2f} TB/s"
            if line["what"] == "decode"
            else f"{line['flops_per_second'] / 1e12:.0f} TFLOP/s"
        )
        peak = f"{line['peak_allocated'] / 1e9:.1f}" if "peak_allocated" in line else ""
        out.append(
            f"| {line['what']}: {line['side']} | {line['tokens_per_second']:.0f} | {line['seconds']:.3g} | "
            f"{rate} | {peak} |"
        )
    return out


def _checks(lines: Sequence[dict[str, Any]]) -> list[str]:
    made = [line for line in lines if line["what"] == "check"]
    if not made:
        return ["No check ran."]
    failed = [line for line in made if not line["ok"]]
    out = [f"Checks: {len(made) - len(failed)} of {len(made)} hold.", ""]
    for line in failed:
        gaps = line.get("gaps", {}).items()
        why = line.get("error") or ", ".join(f"{n} {gap:.2g} of {most:.2g}" for n, (gap, most) in gaps)
        out.append(f"- {line['name']}: {' '.join(why.split())[-300:]}")
    return out


def ended(line: dict[str, Any]) -> str:
    if "skipped" in line:
        return f"{line['stage']}: not begun, {line['skipped']}"
    return f"{line['stage']}: {'ended well' if line['status'] == 0 else line['status']}, {line['seconds']} s"


def first(lines: Sequence[dict[str, Any]], what: str, side: str | None = None) -> dict[str, Any] | None:
    for line in lines:
        if line["what"] == what and (side is None or line["side"] == side):
            return line
    return None


def _best(lines: Sequence[dict[str, Any]], side: str) -> dict[str, Any] | None:
    """The fastest decoding of the sides whose name begins so: every side at its best."""
    made = [line for line in lines if line["what"] == "decode" and line["side"].startswith(side)]
    return max(made, key=lambda line: float(line["tokens_per_second"]), default=None)
