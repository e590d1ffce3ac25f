"""The numbers of `reflectvlm attention data=…`: all of them for JSON, the most telling ones as tables.

A mean or a rate stands beside the number of answers that it is of, since these differ: not every answer looks
back, and a control takes the rows that it can be made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reflectvlm.attention.places import PARTS
from reflectvlm.attention.readings import by_part, by_step
from reflectvlm.attention.removing import WHERE, Removed
from reflectvlm.attention.splice import Spliced
from reflectvlm.attention.spread import HALF_WIDTH, Row, reach
from reflectvlm.train.printing import put
from reflectvlm.train.table import Table, say

if TYPE_CHECKING:
    from reflectvlm.attention_rows import Looked


def show(found: Sequence[Looked]) -> None:
    """Prints the tables, and what was left out of them."""
    for table in tables(found):
        table.show()
        put("\n")
    for one in found:
        for why, count in one.left_out.items():
            say(f"{one.name}: {count} left out of {why.rstrip('.')}")


def tables(found: Sequence[Looked]) -> list[Table]:
    """Attention by part, then each control that was asked for."""
    made = [_attention(found)]
    if any(one.removed for one in found):
        made.append(_removal(found))
    if any(one.spliced for one in found):
        made.append(_splice(found))
    return made


def _attention(found: Sequence[Looked]) -> Table:
    order = (*PARTS, "all")
    columns = ("", *PARTS, "whole answer")
    made = Table("attention to visual tokens: share of all (95 % over answers; n answers)", columns)
    for one in found:
        parts = by_part(one.readings)
        made.add(one.name, *(_mean(parts.get(part, {}), "visual") for part in order))
    return made


def _mean(row: Row, key: str) -> str:
    if (mean := row.get(key)) is None:
        return "–"
    half = reach(row, key)
    return f"{mean:.3f}{'' if half is None else f' ± {half:.3f}'} (n {row['answers']:.0f})"


def _removal(found: Sequence[Looked]) -> Table:
    columns = ("", "part", "n", "asked greyed", "other greyed", "difference (95 %)")
    made = Table("fall of the answer's log-probability in nats, by what is greyed", columns)
    for one in found:
        for part, row in removal_numbers(one.removed).items():
            error = row["standard_error"]
            half = "" if np.isnan(error) else f" ± {HALF_WIDTH * error:.2f}"
            made.add(
                one.name,
                part,
                f"{row['answers']:.0f}",
                f"{row['asked']:z.2f}",
                f"{row['other']:z.2f}",
                f"{row['difference']:z.2f}{half}",
            )
    return made


def _splice(found: Sequence[Looked]) -> Table:
    columns = ("", "wrong beginning", "right beginning")
    made = Table("right in the end, after a beginning that is put into its mouth", columns)
    for one in found:
        number = len(one.spliced)
        counts = [sum(row.repaired for row in one.spliced), sum(row.kept for row in one.spliced)]
        made.add(
            one.name,
            *(f"{count} of {number} ({100 * count / number:.0f} %)" if number else "–" for count in counts),
        )
    return made


def numbers(one: Looked, width: int = 8) -> dict[str, Any]:
    """All figures of one way, without the answers."""
    return {
        "reattention": one.reattention,
        "answers": len(one.readings),
        "with_blocks": sum(reading.blocks > 0 for reading in one.readings),
        "parts": by_part(one.readings),
        "lengths": by_step(one.readings, width),
        "removal": removal_numbers(one.removed),
        "splice": splice_numbers(one.spliced),
        "hallucination": [dataclasses.asdict(row) for row in one.hallucination],
        "left_out": one.left_out,
    }


def removal_numbers(removed: Sequence[Removed]) -> dict[str, dict[str, float]]:
    """Per part of the answer the mean fall of its log-probability when the asked region is greyed, when
    another one is, and the difference with its standard error."""
    made = {}
    for where in WHERE:
        pairs = [(one.asked[where], one.other[where]) for one in removed if where in one.asked]
        if not pairs:
            continue
        asked, other = np.array(pairs).T
        gap = asked - other
        error = float(gap.std(ddof=1) / np.sqrt(len(gap))) if len(gap) > 1 else float("nan")
        made[where] = {
            "answers": float(len(pairs)),
            "tokens": float(np.mean([one.tokens[where] for one in removed if where in one.tokens])),
            "asked": float(asked.mean()),
            "other": float(other.mean()),
            "difference": float(gap.mean()),
            "standard_error": error,
        }
    return made


def splice_numbers(spliced: Sequence[Spliced]) -> dict[str, float]:
    if not spliced:
        return {}
    return {
        "rows": float(len(spliced)),
        "repaired": float(np.mean([one.repaired for one in spliced])),
        "kept": float(np.mean([one.kept for one in spliced])),
    }
