"""How sure a figure is: pass@k, avg@k, bootstrap intervals, and McNemar's test between two models.

    pass@k   1 - C(n - c, k) / C(n, k), the mean over items: the unbiased estimate of the chance that at least
             one of k replies is right, of an item with c right ones among n (Chen et al., arXiv 2107.03374)
    avg@k    mean over items of the mean of their first k replies
    interval percentile bootstrap: whole clusters are drawn with replacement, so that replies to one item, or
             questions about one image, count as the one observation that they are
    McNemar  exact and two-sided: of the items on which two models disagree, how many each has right, against
             a fair coin

Pure functions. Left out: corrections for many comparisons, and bias-corrected bootstraps.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000


class Interval(NamedTuple):
    """Example: `Interval(value=0.72, low=0.69, high=0.75)`"""

    value: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Items that only one of two models has right, and how likely a fair coin is to divide them as
    unevenly."""

    only_first: int
    only_second: int
    p: float


def pass_at_k(replies: int, right: int, k: int) -> float:
    """Chance that of k replies, drawn without replacement from these, at least one is right.

    Example: `pass_at_k(4, 1, 2)` is 1 - C(3, 2) / C(4, 2) = 0.5.
    """
    if not 0 <= right <= replies:
        raise ValueError(f"{right} of {replies} replies cannot be right. Give 0 to {replies}.")
    if not 1 <= k <= replies:
        raise ValueError(f"pass@{k} needs {k} replies or more, and at least 1; there are {replies}.")
    return 1.0 - math.comb(replies - right, k) / math.comb(replies, k)


def mean_pass_at_k(rights: Sequence[Sequence[bool]], k: int) -> float:
    """The mean over items; `rights` has one sequence per item."""
    return float(np.mean([pass_at_k(len(item), sum(map(bool, item)), k) for item in rights]))


def avg_at_k(values: Sequence[Sequence[float]], k: int) -> float:
    """Mean over items of the mean of the first k values of each."""
    short = min((len(item) for item in values), default=0)
    if not 1 <= k <= short:
        raise ValueError(f"avg@{k} needs {k} replies to every item, and at least 1; one has {short}.")
    return float(np.mean([np.mean(item[:k]) for item in values]))


def interval(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """The mean of `values` with its interval. `clusters` names what each value belongs to; None: to itself.
    The order of the values does not matter, unless the clusters' names cannot be ordered."""
    if not len(values):
        raise ValueError("There are no values to take a mean of. Give at least one.")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}. It must be between 0 and 1, e.g. 0.95.")
    if draws < 1:
        raise ValueError(f"draws is {draws}. It must be at least 1.")
    sums, counts = _clustered(np.asarray(values, dtype=float), clusters)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        picked = rng.integers(len(sums), size=len(sums))
        means[draw] = sums[picked].sum() / counts[picked].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(values)), float(low), float(high))


def paired_interval(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """The mean of `second - first`, item by item, with its interval: both models meet the same draws."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values are no pairs. Give the same items of both.")
    gains = [b - a for a, b in zip(first, second, strict=True)]
    return interval(gains, clusters, level=level, draws=draws, seed=seed)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Exact: p = min(1, 2 P(X <= min(b, c))), X binomial with b + c trials and 1/2; 1 where none differs.

    Example: with b = 1 and c = 5, p = 2 (1 + 6) / 64 = 0.21875.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} marks are no pairs. Give the same items of both.")
    pairs = list(zip(map(bool, first), map(bool, second), strict=True))
    ours, theirs = pairs.count((True, False)), pairs.count((False, True))
    trials = ours + theirs
    tail, term = 0, 1
    for hits in range(min(ours, theirs) + 1):
        tail += term
        term = term * (trials - hits) // (hits + 1)
    return McNemar(ours, theirs, min(1.0, 2 * tail / 2**trials))


def _clustered(
    values: NDArray[np.float64], clusters: Sequence[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of each cluster's values, in the clusters' order."""
    if clusters is None:
        return np.sort(values), np.ones(len(values))
    if len(clusters) != len(values):
        raise ValueError(f"{len(clusters)} clusters are named for {len(values)} values. Name one for each.")
    kinds = set(clusters)
    try:
        ordered = sorted(kinds)  # type: ignore[type-var]
    except TypeError:  # of kinds that do not compare: as they come
        ordered = list(dict.fromkeys(clusters))
    place = {name: number for number, name in enumerate(ordered)}
    of = np.array([place[name] for name in clusters])
    # Summed in the order of size, so that rounding does not depend on the order of the rows.
    order = np.argsort(values, kind="stable")
    sums = np.bincount(of[order], weights=values[order], minlength=len(place)).astype(float)
    return sums, np.bincount(of, minlength=len(place)).astype(float)
