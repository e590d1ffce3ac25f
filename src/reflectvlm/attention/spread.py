"""How far a mean over answers can be trusted: its standard error, and the spread over seeds.

Tokens and mentions of one answer depend on each other, so the answer is what is drawn at random, here as in
a rate over all tokens: of a ratio of sums over answers the error is that of its linearisation (the ratio
estimator of survey sampling). Answers of one model say nothing about what another training run would give:
for that there are seeds. Left out: intervals of a rate whose every answer is alike; their error is 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

COUNTS = ("answers", "captions", "mentioned", "wrong", "there")
"""What several seeds have together; of everything else they have a mean."""
_PLACES = ("from", "to", "length")
_ERROR, _DEVIATION = "_se", "_sd"
HALF_WIDTH = 1.96
"""Standard errors on either side of a mean, for 95 %."""

Row = Mapping[str, float | None]
"""A mean `visual`, with `visual_se`, its standard error over answers, or `visual_sd`, its standard deviation
over seeds."""


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two values."""
    return statistics.stdev(values) / math.sqrt(len(values))


def ratio_error(sums: Sequence[float], counts: Sequence[float]) -> float | None:
    """Standard error of sum(sums) / sum(counts), one of each per answer; None for less than two answers or
    counts of zero."""
    above, below = np.asarray(sums, float), np.asarray(counts, float)
    number, total = len(below), below.sum()
    if number < 2 or not total:
        return None
    rest = above - above.sum() / total * below
    return float(np.sqrt(number / (number - 1) * (rest**2).sum()) / total)


def with_errors(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Name -> mean, and its standard error where there are at least two values."""
    made = {name: float(np.mean(known)) for name, known in values.items() if known}
    errors = {name: standard_error(known) for name, known in values.items() if len(known) > 1}
    return made | {f"{name}{_ERROR}": error for name, error in errors.items()}


def over_seeds(rows: Sequence[Row]) -> dict[str, float | None]:
    """One row of several seeds: means with their standard deviation, and counts added up. A value that a
    seed does not have is the mean of the others. One seed alone keeps its standard errors."""
    if len(rows) == 1:
        return dict(rows[0])
    made: dict[str, float | None] = {}
    for key in dict.fromkeys(key for row in rows for key in row if not key.endswith(_ERROR)):
        known = [value for row in rows if (value := row.get(key)) is not None]
        if key in COUNTS:
            made[key] = sum(known)
        elif key in _PLACES:
            made[key] = max(known)
        else:
            made[key] = statistics.mean(known) if known else None
            if len(known) > 1:
                made[f"{key}{_DEVIATION}"] = statistics.stdev(known)
    return made


def parts_over_seeds(seeds: Sequence[Mapping[str, Row]]) -> dict[str, dict[str, float | None]]:
    """Of `readings.by_part` of each seed; a part that some seeds lack is that of the others."""
    names = dict.fromkeys(part for one in seeds for part in one)
    return {part: over_seeds([one[part] for one in seeds if part in one]) for part in names}


def curves_over_seeds(seeds: Sequence[Sequence[Row]]) -> list[dict[str, float | None]]:
    """Of `readings.by_step` or `hallucination.by_length` of each seed, as far as all of them reach."""
    return [over_seeds(rows) for rows in zip(*seeds, strict=False)]


def reach(row: Row, key: str) -> float | None:
    """Half the height of an error bar: the standard deviation over seeds where there is one, else
    `HALF_WIDTH` standard errors; None where neither is known."""
    deviation, error = row.get(f"{key}{_DEVIATION}"), row.get(f"{key}{_ERROR}")
    if deviation is not None:
        return deviation
    return None if error is None else HALF_WIDTH * error


def what_reaches(rows: Sequence[Row]) -> str:
    """What `reach` gives for these rows, in words."""
    keys = {key for row in rows for key, value in row.items() if value is not None}
    over_answers = f"95 % (± {HALF_WIDTH} standard errors over answers)"
    if any(key.endswith(_DEVIATION) for key in keys):
        alone = any(key.endswith(_ERROR) for key in keys)
        return "± standard deviation over seeds" + (f", of one seed {over_answers}" if alone else "")
    return over_answers if any(key.endswith(_ERROR) for key in keys) else "one answer, no spread"
