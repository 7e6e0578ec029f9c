"""The parts of token pruning spelled out: lists and loops in double precision, one image at a time."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Vector = list[float]
INPUTS = 50


def fifty(check: Callable[..., None]) -> Callable[..., None]:
    """A test that runs on 50 random inputs: `check(seed, ...)` for seeds 0..49."""
    plain = inspect.signature(check)

    @functools.wraps(check)
    def run(**kwargs: Any) -> None:
        for seed in range(INPUTS):
            try:
                check(seed, **kwargs)
            except AssertionError as error:
                raise AssertionError(f"random input {seed}: {error}") from error

    run.__signature__ = plain.replace(parameters=[p for n, p in plain.parameters.items() if n != "seed"])  # type: ignore[attr-defined]
    return run


def draw(seed: int, *shape: int) -> Tensor:
    """Gaussian numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(x: Tensor) -> list[Vector]:
    """A `[n, d]` tensor as lists."""
    return x.double().tolist()


def dot(a: Vector, b: Vector) -> float:
    """Inner product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def length(a: Vector) -> float:
    """Euclidean length."""
    return math.sqrt(dot(a, a))


def cosine(a: Vector, b: Vector) -> float:
    """Cosine similarity."""
    return dot(a, b) / (length(a) * length(b))


def softmax(a: Vector) -> Vector:
    """Softmax of a list."""
    top = max(a)
    powers = [math.exp(x - top) for x in a]
    return [p / sum(powers) for p in powers]


def ranked(scores: Sequence[float]) -> list[int]:
    """Indices by descending score, the earlier first among equals."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def top(scores: Sequence[float], k: int) -> list[int]:
    """The `k` best, ascending."""
    return sorted(ranked(scores)[:k])


def mean(a: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(a) / len(a)


# ---------------------------------------------------------------------------------------------------------- scores


def attention_row(query: Tensor, key: Tensor, scaling: float) -> list[Vector]:
    """Per head: softmax of one query `[H, d]` on keys `[Hkv, N, d]`."""
    group = query.shape[0] // key.shape[0]
    out = []
    for head, q in enumerate(rows_of(query)):
        out.append(softmax([scaling * dot(q, k) for k in rows_of(key[head // group])]))
    return out


def cls_attention(query: Tensor, key: Tensor, scaling: float) -> list[Vector]:
    """The same without the column of CLS, which comes first."""
    return [row[1:] for row in attention_row(query, key, scaling)]


def head_rows(weights: Tensor, rows: list[int], over: str, heads: int | None = None) -> Vector:
    """Mean over heads of the mean or sum over rows of `[H, R, N]`; `heads` = only those with most mass."""
    table = weights.double().tolist()
    mass = [sum(sum(head[r]) for r in rows) for head in table]
    used = ranked(mass)[: heads or len(table)]
    out = []
    for i in range(weights.shape[-1]):
        total = mean([sum(table[h][r][i] for r in rows) for h in used])
        out.append(total if over == "sum" else total / len(rows))
    return out


def received(query: Tensor, key: Tensor, scaling: float, causal: bool) -> Vector:
    """Mean over heads and queries of the weight that each key gets."""
    heads, n = query.shape[0], key.shape[1]
    out = [0.0] * n
    for head in range(heads):
        keys = rows_of(key[head])
        for number, q in enumerate(rows_of(query[head])):
            seen = number + 1 if causal else n
            for i, w in enumerate(softmax([scaling * dot(q, k) for k in keys[:seen]])):
                out[i] += w / (heads * query.shape[1])
    return out


def raters(text: Tensor, visual: Tensor) -> list[bool]:
    """Text tokens whose mean share of the visual tokens' softmax is above average."""
    shares = [softmax([dot(v, t) for t in rows_of(text)]) for v in rows_of(visual)]
    columns = [mean([row[t] for row in shares]) for t in range(len(text))]
    return [c > mean(columns) for c in columns]


def value_flow(attention: Tensor, cls_value: Tensor, value: Tensor) -> Vector:
    """`(alpha / sum + beta / sum) |mean v|_1`."""
    heads, n = attention.shape
    alpha = [mean([float(attention[h, i]) for h in range(heads)]) for i in range(n)]
    per_head = [softmax([dot(rows_of(cls_value)[h], v) for v in rows_of(value[h])]) for h in range(heads)]
    beta = [mean([row[i] for row in per_head]) for i in range(n)]
    out = []
    for i in range(n):
        average = [mean([float(value[h, i, c]) for h in range(heads)]) for c in range(value.shape[-1])]
        out.append((alpha[i] / sum(alpha) + beta[i] / sum(beta)) * sum(abs(a) for a in average))
    return out


def svd_energy(x: Tensor) -> Vector:
    """`sum_j |U_ij| s_j` from a full decomposition."""
    u, s, _ = torch.linalg.svd(x.double(), full_matrices=False)
    return [sum(abs(float(u[i, j])) * float(s[j]) for j in range(len(s))) for i in range(len(x))]


def borda(*scores: Vector) -> Vector:
    """Each ranking gives N to its best and 1 to its last; equal shares."""
    n = len(scores[0])
    out = [0.0] * n
    for score in scores:
        for place, i in enumerate(ranked(score)):
            out[i] += (n - place) / len(scores)
    return out


def approx_error(x: Tensor, basis: list[int]) -> Vector:
    """Distance of every token to its ridge reconstruction from the basis."""
    x = x.double()
    b = x[basis]
    inverse = torch.linalg.inv(b @ b.T + 1e-5 * torch.eye(len(basis), dtype=torch.float64))
    return [length((row - (inverse @ (b @ row)) @ b).tolist()) for row in x]


def clip_relevance(image: Tensor, text: Tensor) -> Vector:
    """Mean over text chunks of minus the cosine."""
    return [mean([-cosine(i, t) for t in rows_of(text)]) for i in rows_of(image)]


def duplication(x: Tensor, pivots: list[int]) -> Vector:
    """Largest cosine to a pivot."""
    z = rows_of(x)
    return [max(cosine(row, z[p]) for p in pivots) for row in z]


def sensitivity(matrix: Tensor, bias: Tensor, x: Tensor, bank: Tensor, h: float) -> Vector:
    """Central differences through `gelu(x W^T + b) V^T`-like callables are the caller's; here a tanh layer."""
    weights, shift = rows_of(matrix), bias.double().tolist()

    def layer(row: Vector) -> Vector:
        return [math.tanh(dot(w, row) + s) for w, s in zip(weights, shift, strict=True)]

    out = []
    for row in rows_of(x):
        total = 0.0
        for u in rows_of(bank):
            plus = layer([a + h * b for a, b in zip(row, u, strict=True)])
            minus = layer([a - h * b for a, b in zip(row, u, strict=True)])
            total += length([(p - q) / (2 * h) for p, q in zip(plus, minus, strict=True)])
        out.append(total / len(bank))
    return out


def derivative(matrix: Tensor, bias: Tensor, x: Tensor, bank: Tensor) -> Vector:
    """The same with the exact derivative of tanh."""
    out = []
    for row in rows_of(x):
        total = 0.0
        for u in rows_of(bank):
            parts = []
            for w, s in zip(rows_of(matrix), bias.double().tolist(), strict=True):
                parts.append((1 - math.tanh(dot(w, row) + s) ** 2) * dot(w, u))
            total += length(parts)
        out.append(total / len(bank))
    return out


def holistic(a: Vector, x: Tensor, bounds: list[tuple[int, int]], whole: bool) -> Vector:
    """`1e3 a + 0.09 var`, the variance rescaled to the mean of 1e3 a in the run, or over the image."""
    z, n = rows_of(x), len(a)
    variance = [0.0] * n
    for start, end in bounds:
        for i in range(start, end):
            sims = [cosine(z[i], z[j]) for j in range(start, end)]
            variance[i] = mean([(s - mean(sims)) ** 2 for s in sims])
    scaled = [0.0] * n
    for start, end in [(0, n)] if whole else bounds:
        level = mean([1e3 * a[i] for i in range(start, end)])
        base = mean([variance[i] for i in range(start, end)])
        for i in range(start, end):
            scaled[i] = variance[i] * level / max(base, 1e-12)
    return [1e3 * a[i] + 0.09 * scaled[i] for i in range(n)]


# ------------------------------------------------------------------------------------------------------ calibrators


def trend(n: int, sigma: float) -> Vector:
    """`exp(-sigma i / (n - 1))`."""
    return [1.0 if n == 1 else math.exp(-sigma * i / (n - 1)) for i in range(n)]


def minmax(a: Vector, eps: float = 1e-8) -> Vector:
    """Rescaled to [0, 1]; ones when all but constant."""
    low, high = min(a), max(a)
    if high - low <= 1e-5 * abs(mean(a)):
        return [1.0] * len(a)
    return [(x - low) / (high - low + eps) for x in a]


def gain(distance: float, base: float, dim: int) -> float:
    """`(2 / d) sum cos(D theta_j)`."""
    return 2 / dim * sum(math.cos(distance * base ** (-2 * j / dim)) for j in range(dim // 2))


def unpadded(width: int, height: int, grid: int) -> list[list[bool]]:
    """Rows or columns left after LLaVA-NeXT's unpadding of a square."""
    wide = width > height
    inner = int(height * grid / width) if wide else int(width * grid / height)
    cut = (grid - inner) // 2
    kept = [cut <= i < grid - cut for i in range(grid)]
    return [[kept[row] if wide else kept[column] for column in range(grid)] for row in range(grid)]
