"""Two models on the same items: who gains where, and whether chance would do as much.

Per scorer: the mean mark over shared items of both, in per cent or as the task rates, the gain with its
paired bootstrap interval over clusters of items, and McNemar's exact test where each item has one reply that
is right or wrong.
"""

from __future__ import annotations

from reflectvlm.eval.result import TaskResult
from reflectvlm.eval.statistics import mcnemar, paired_interval
from reflectvlm.eval.table import NONE
from reflectvlm.eval.types import Summary
from reflectvlm.train.table import Table


def comparison(first: TaskResult, second: TaskResult, first_name: str, second_name: str) -> Table:
    """`second` minus `first`; items to which not both have a scored reply are left out and counted."""
    table = Table(
        f"{second_name} against {first_name}",
        (
            "scorer",
            "items",
            "left out",
            "first",
            "second",
            "gain",
            "95 %",
            "only first",
            "only second",
            "McNemar p",
        ),
    )
    for scorer in second.marks:
        if scorer in first.marks:
            table.add(scorer, *_cells(first, second, scorer))
    return table


def _cells(first: TaskResult, second: TaskResult, scorer: str) -> tuple[str, ...]:
    before, after = first.means(scorer), second.means(scorer)
    items = [item for item in second.items if item.id in before and item.id in after]
    left_out = str(len({item.id for item in (*first.items, *second.items)}) - len(items))
    if not items:
        return ("0", left_out, *[NONE] * 7)
    ours, theirs = ([means[item.id] for item in items] for means in (before, after))
    gain = paired_interval(ours, theirs, [second.clusters[item.id] for item in items])
    mean = [sum(values) / len(values) for values in (ours, theirs)]
    scale = _scale(second.summaries[scorer])
    shares = (f"{scale * mean[0]:.2f}", f"{scale * mean[1]:.2f}", f"{scale * gain.value:+.2f}")
    between = f"{scale * gain.low:+.2f} – {scale * gain.high:+.2f}"
    if {*ours, *theirs} <= {0.0, 1.0} and first.samples == second.samples == 1:
        test = mcnemar([value == 1 for value in ours], [value == 1 for value in theirs])
        told = (str(test.only_first), str(test.only_second), f"{test.p:.3g}")
    else:
        told = (NONE, NONE, NONE)
    return (str(len(items)), left_out, *shares, between, *told)


def _scale(summary: Summary) -> int:
    """Ratings as they are; marks from 0 to 1 in per cent, also where the task makes a sum of points of
    them."""
    return 1 if summary.unit == "points" and summary.mean else 100
