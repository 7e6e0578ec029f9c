"""Intervals and paired tests: Wilson, seeded bootstrap over clusters (images), exact McNemar.

Questions about the same picture are not independent, therefore the bootstrap draws whole pictures. Everything works
on a matrix of per-cluster sums, ``sums[c, k]`` = sum of statistic k over cluster c: a resample is a weighted sum of
rows, so 2,000 resamples of 500 pictures are one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "McNemar", "bootstrap", "cluster_sums", "holm", "mcnemar", "paired_bootstrap", "wilson"]

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Maps sums of shape (resamples, statistics) to values of shape (resamples,)."""


@dataclass(frozen=True)
class Interval:
    """A value with its interval at ``level``."""

    value: float
    low: float
    high: float
    level: float = 0.95

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion. ``n = 0`` gives the whole of 0..1."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0..n, got {successes} of {n}.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}.")
    if n == 0:
        return Interval(0.0, 0.0, 1.0, level)
    z = normal_quantile(0.5 + level / 2)
    p = successes / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half), level)


def normal_quantile(p: float) -> float:
    """Inverse of the standard normal distribution function."""
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def cluster_sums(rows: Sequence[Sequence[float]], clusters: Sequence[Hashable]) -> tuple[Array, list[Hashable]]:
    """Sum ``rows`` (n, k) within each cluster: array (clusters, k) and the cluster ids in order of appearance."""
    if len(rows) != len(clusters):
        raise ValueError(f"{len(rows)} rows for {len(clusters)} cluster ids.")
    order = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    width = len(rows[0]) if rows else 0
    sums = np.zeros((len(order), width))
    np.add.at(sums, [order[cluster] for cluster in clusters], np.asarray(rows, dtype=np.float64).reshape(-1, width))
    return sums, list(order)


@lru_cache(maxsize=4)
def _resample(n: int, resamples: int, seed: int) -> Array:
    """How often each of ``n`` clusters is drawn in each resample: (resamples, n). Shared by all metrics of a run."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}.")
    draw = np.random.default_rng(seed)
    drawn = np.empty((resamples, n))
    for row in drawn:  # counting drawn indices is ten times faster than drawing the counts
        row[:] = np.bincount(draw.integers(0, n, n), minlength=n)
    drawn.setflags(write=False)
    return drawn


def _percentiles(values: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap(
    sums: Array, statistic: Statistic, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile interval of ``statistic`` over resampled clusters (rows of ``sums``)."""
    if len(sums) == 0:
        return Interval(0.0, 0.0, 0.0, level)
    value = float(statistic(sums.sum(0, keepdims=True))[0])
    low, high = _percentiles(statistic(_resample(len(sums), resamples, seed) @ sums), level)
    return Interval(value, low, high, level)


def paired_bootstrap(
    first: Array, second: Array, statistic: Statistic, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[Interval, float]:
    """Interval of ``statistic(second) - statistic(first)`` when the same clusters are drawn for both, and a two-sided
    p-value: twice the smaller share of resampled differences on either side of zero (ties count on both sides, so two
    equal systems get 1)."""
    if first.shape != second.shape:
        raise ValueError(f"Paired sums must have equal shapes, got {first.shape} and {second.shape}.")
    if len(first) == 0:
        return Interval(0.0, 0.0, 0.0, level), 1.0
    weights = _resample(len(first), resamples, seed)
    drawn = statistic(weights @ second) - statistic(weights @ first)
    value = float(statistic(second.sum(0, keepdims=True))[0] - statistic(first.sum(0, keepdims=True))[0])
    low, high = _percentiles(drawn, level)
    p = min(1.0, 2 * min(float((drawn <= 0).mean()), float((drawn >= 0).mean())))
    return Interval(value, low, high, level), max(p, 1 / resamples)


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test of two systems on the same questions: ``gained`` = wrong before and right now, ``lost`` the
    reverse; ``p`` two-sided from the binomial distribution with p = 1/2."""

    gained: int
    lost: int
    p: float

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> McNemar:
    """Exact McNemar test on paired right/wrong verdicts of the same questions in the same order."""
    if len(before) != len(after):
        raise ValueError(f"McNemar needs the same questions on both sides, got {len(before)} and {len(after)}.")
    gained = sum(not b and a for b, a in zip(before, after, strict=True))
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    n, k = gained + lost, min(gained, lost)
    if n == 0:
        return McNemar(0, 0, 1.0)
    tail = sum(math.comb(n, i) for i in range(k + 1))  # exact integers: no underflow for any n
    return McNemar(gained, lost, min(1.0, 2 * tail / (1 << n)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: p-values that may all be read against one level, however many comparisons there are."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    out, worst = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[place]))
        out[place] = worst
    return out
