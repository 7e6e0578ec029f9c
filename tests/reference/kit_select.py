"""Selectors and mergers of token pruning spelled out: lists and loops, one image at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference.kit import Vector, cosine, length, mean, ranked, rows_of, top


def maxmin(x: Tensor, k: int, scores: Vector | None = None, start: int | None = None) -> list[int]:
    """Greedy max-min distance `1 - cos`, times a score."""
    z = rows_of(x)
    n = len(z)
    distance = [[1 - cosine(z[i], z[j]) for j in range(n)] for i in range(n)]
    if start is None and scores is not None:
        start = ranked(scores)[0]
    if start is None:
        start = ranked([min((distance[i][j] for j in range(n) if j != i), default=0.0) for i in range(n)])[0]
    chosen = [start]
    while len(chosen) < min(k, n):
        rest = [i for i in range(n) if i not in chosen]
        value = {i: (scores[i] if scores else 1.0) * min(distance[i][j] for j in chosen) for i in rest}
        chosen.append(max(rest, key=lambda i: (value[i], -i)))
    return sorted(chosen)


def farthest(x: Tensor, k: int, start: int) -> list[int]:
    """Farthest-point sampling, Euclidean."""
    z = rows_of(x)
    chosen = [start]
    while len(chosen) < min(k, len(z)):
        rest = [i for i in range(len(z)) if i not in chosen]
        far = {i: min(length([a - b for a, b in zip(z[i], z[j], strict=True)]) for j in chosen) for i in rest}
        chosen.append(max(rest, key=lambda i: (far[i], -i)))
    return sorted(chosen)


def dpp(x: Tensor, relevance: Vector, k: int) -> list[int]:
    """Greedy MAP by determinants: each step takes the token with the largest `log det K[chosen + i]`."""
    z = torch.nn.functional.normalize(x.double(), dim=-1)
    r = torch.tensor(relevance, dtype=torch.float64)
    kernel = r[:, None] * (z @ z.T).fill_diagonal_(1.0) * r[None]
    chosen: list[int] = []
    while len(chosen) < min(k, len(z)):
        rest = [i for i in range(len(z)) if i not in chosen]
        value = {i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in rest}
        chosen.append(max(rest, key=lambda i: (value[i], -i)))
    return sorted(chosen)


def even_odd(x: Tensor, scores: Vector, target: int, step: int = 8) -> list[int]:
    """Rounds of dropping the even places most similar to some odd place."""
    z, order = rows_of(x), ranked(scores)
    if target <= 0:
        return []
    while len(order) > target:
        odd = order[1::2]
        best = {i: max(cosine(z[i], z[j]) for j in odd) for i in order[::2]}
        drop = sorted(order[::2], key=lambda i: (-best[i], order.index(i)))[: min(step, len(order) - target)]
        order = [i for i in order if i not in drop]
    return sorted(order)


def quantile(a: Vector, q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(a)
    place = q * (len(a) - 1)
    low = math.floor(place)
    high = min(low + 1, len(a) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def outliers(a: Vector) -> list[int]:
    """Above `Q3 + 1.5 IQR`; the best one when there are none."""
    q1, q3 = quantile(a, 0.25), quantile(a, 0.75)
    found = [i for i, x in enumerate(a) if x > q3 + 1.5 * (q3 - q1)]
    return found or [ranked(a)[0]]


def bounds(n: int, runs: int) -> list[tuple[int, int]]:
    """Consecutive runs; the first ones are one longer."""
    out, start = [], 0
    for i in range(runs):
        end = start + n // runs + (1 if i < n % runs else 0)
        out.append((start, end))
        start = end
    return out


def runs(scores: Vector, run_scores: Vector, k: int, count: int) -> list[int]:
    """Budget per run by its mean score, floors first, then one by one to the heaviest with room."""
    spans = bounds(len(scores), count)
    weights = [mean(run_scores[a:b]) for a, b in spans]
    budgets = [min(int(k * w / sum(weights) + 1e-9), b - a) for w, (a, b) in zip(weights, spans, strict=True)]
    while sum(budgets) < k:
        for p in ranked(weights):
            if sum(budgets) < k and budgets[p] < spans[p][1] - spans[p][0]:
                budgets[p] += 1
    kept: list[int] = []
    for (a, b), c in zip(spans, budgets, strict=True):
        kept += [a + i for i in top(scores[a:b], c)]
    return kept


# ----------------------------------------------------------------------------------------------------------- mergers


def join(x: Tensor, source: list[int], target: list[int], r: int) -> list[int]:
    """Parents after the `r` best source-target pairs merge."""
    z = rows_of(x)
    best = {}
    for s in source:
        best[s] = max(target, key=lambda t: (cosine(z[s], z[t]), -target.index(t)))
    order = sorted(source, key=lambda s: (-cosine(z[s], z[best[s]]), source.index(s)))
    parent = list(range(len(z)))
    for s in order[:r]:
        parent[s] = best[s]
    return parent


def nearest(x: Tensor, kept: list[int]) -> list[int]:
    """Parents when everybody joins the most similar kept token."""
    z = rows_of(x)
    return [i if i in kept else max(kept, key=lambda j: (cosine(z[i], z[j]), -kept.index(j))) for i in range(len(z))]


def averaged(x: Tensor, parent: list[int], weights: Vector | None = None) -> dict[int, Vector]:
    """Weighted mean per survivor."""
    z = rows_of(x)
    w = weights or [1.0] * len(z)
    out = {}
    for s in sorted(set(parent)):
        members = [i for i, p in enumerate(parent) if p == s]
        mass = sum(w[i] for i in members)
        out[s] = [sum(w[i] * z[i][c] for i in members) / mass for c in range(len(z[0]))]
    return out


def survivor_plus_mean(x: Tensor, parent: list[int]) -> dict[int, Vector]:
    """VisionZip's contextual tokens: target plus mean of those assigned to it."""
    z = rows_of(x)
    out = {}
    for s in sorted(set(parent)):
        members = [i for i, p in enumerate(parent) if p == s and i != s]
        extra = [mean([z[i][c] for i in members]) if members else 0.0 for c in range(len(z[0]))]
        out[s] = [a + b for a, b in zip(z[s], extra, strict=True)]
    return out


def density_peaks(x: Tensor, count: int, noise: Vector) -> list[int]:
    """Parents of density-peak clustering; the `count` nearest include the token itself."""
    z = rows_of(x)
    n, width = len(z), len(z[0])
    d = [
        [length([a - b for a, b in zip(z[i], z[j], strict=True)]) / math.sqrt(width) for j in range(n)]
        for i in range(n)
    ]
    rho = [math.exp(-mean([v**2 for v in sorted(d[i])[:count]])) + 1e-6 * noise[i] for i in range(n)]
    largest = max(max(row) for row in d)
    delta = [min([d[i][j] for j in range(n) if rho[j] > rho[i]], default=largest) for i in range(n)]
    centres = top([r * e for r, e in zip(rho, delta, strict=True)], count)
    return [i if i in centres else min(centres, key=lambda c: (d[i][c], c)) for i in range(n)]


def ramp(scores: Vector, r: int) -> tuple[list[int], Vector]:
    """The `r + 1` lowest join the last of them; the better, the heavier."""
    low = ranked(scores)[len(scores) - r - 1 :]
    parent, weights = list(range(len(scores))), [1.0] * len(scores)
    for place, i in enumerate(low):
        parent[i] = max(low)
        weights[i] = float(r + 1 - place)
    return parent, weights


def knn_add(x: Tensor, keys: Tensor, a: Vector, kept: list[int], neighbours: int) -> list[Vector]:
    """PruMerge's sum over the nearest other tokens by key cosine."""
    z, k = rows_of(x), rows_of(keys)
    out = []
    for i in kept:
        others = [j for j in range(len(z)) if j != i]
        near = sorted(others, key=lambda j: (-cosine(k[i], k[j]), j))[:neighbours]
        out.append([z[i][c] + sum(a[j] * z[j][c] for j in near) for c in range(len(z[0]))])
    return out
