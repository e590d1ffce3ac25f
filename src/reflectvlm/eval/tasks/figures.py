"""Means of marks, whole and by what the rows are about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from reflectvlm.eval.types import Item, Mark


def mean(values: Iterable[float | None]) -> float | None:
    """Of the scored ones; None where there is none."""
    scored = [value for value in values if value is not None]
    return sum(scored) / len(scored) if scored else None


def accuracies(
    items: Sequence[Item], marks: Sequence[Mark], by: Mapping[str, Callable[[Item], Iterable[str]]]
) -> dict[str, float | None]:
    """`accuracy`, and `accuracy/KEY/NAME` for each key of `by`, whose function names an item's groups.

    Names are in the order in which the items bring them. An item may belong to several groups or to none.
    """
    values: dict[str, list[float | None]] = {"accuracy": []}
    for key, groups in by.items():
        for item in items:
            for name in groups(item):
                values.setdefault(f"accuracy/{key}/{name}", [])
    for item, mark in zip(items, marks, strict=True):
        values["accuracy"].append(mark.value)
        for key, groups in by.items():
            for name in groups(item):
                values[f"accuracy/{key}/{name}"].append(mark.value)
    return {name: mean(found) for name, found in values.items()}


def unscored(marks: Sequence[Mark]) -> int:
    return sum(mark.value is None for mark in marks)
