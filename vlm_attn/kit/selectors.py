"""Selectors: ascending int64 indices of the tokens to keep, from scores or features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Choose = Callable[[Tensor, int], Tensor]
WHOLE = 1 << 24  # cosines that may be held at a time
STEPS = 32  # products of one row with all tokens take about as long per row as this many in one matrix product


def by_rank(scores: Tensor) -> Tensor:
    """Indices ``[..., N]`` by descending fp32 score; the earlier token wins a tie."""
    return scores.float().argsort(dim=-1, descending=True, stable=True)


def topk(scores: Tensor, k: int) -> Tensor:
    """The ``k`` highest of ``scores [..., N]`` -> ``[..., min(k, N)]``."""
    return by_rank(scores)[..., :k].sort(-1).values


def topk_visible(scores: Tensor, visible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The highest among visible tokens: ``k_eff = min(k, sum v)`` per image.

    Args:
        scores: ``[..., N]``.
        visible: bool ``[..., N]``.

    Returns:
        indices ``[..., k']`` with ``k'`` the largest ``k_eff``, ascending, and their validity: slots beyond an image's
        own ``k_eff`` are invalid and hold its first invisible tokens in raster order.
    """
    order = by_rank(scores.float().masked_fill(~visible, -torch.inf))
    order = order.gather(-1, (~visible.gather(-1, order)).int().argsort(dim=-1, stable=True))
    slots = int(visible.sum(-1).amax().clamp(max=k))
    idx = order[..., :slots].sort(-1).values
    return idx, visible.gather(-1, idx)


def uniform(n: int, k: int, device: torch.device | str = "cpu") -> Tensor:
    """Every (n/k)-th token: ``floor((j + 1/2) n / k)``, ``[k]``."""
    return (2 * torch.arange(k, device=device) + 1) * n // (2 * k)


def stride(n: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """Tokens ``0, step, 2 step, ...`` below n."""
    return torch.arange(0, n, max(1, step), device=device)


def grid_stride(cells: Tensor, step: int) -> Tensor:
    """Positions of the tokens whose row and column are both multiples of ``step`` (FEATHER's uniform part).

    Args:
        cells: (row, column) ``[N, 2]``.
    """
    return ((cells % step) == 0).all(-1).nonzero()[:, 0]


def random(n: int, k: int, seed: int) -> Tensor:
    """``k`` of ``n`` at random, drawn on the CPU."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].sort().values


def union(*indices: Tensor) -> Tensor:
    """Ascending union of index sets ``[k_i]``."""
    return torch.cat(indices).unique(sorted=True)


def complement(indices: Tensor, n: int) -> Tensor:
    """Ascending indices below n that are not among ``[..., k]`` (equal counts per image)."""
    left = torch.ones((*indices.shape[:-1], n), dtype=torch.bool, device=indices.device).scatter(-1, indices, False)
    return left.nonzero()[:, -1].reshape(*indices.shape[:-1], n - indices.shape[-1])


def per_group(groups: Tensor, counts: Sequence[int], choose: Choose) -> Tensor:
    """Applies a selector to each crop, tile or frame by itself; protected tokens always stay.

    Args:
        groups: int64 ``[N]``, the group of each token; -1 = protected (newlines, separators, timestamps).
        counts: budget per group, capped at the group's size.
        choose: ``(slots [n], k) -> positions [k] into slots``.

    Returns:
        ascending indices into the N tokens.
    """
    chosen = [(groups < 0).nonzero()[:, 0]]
    for group, count in enumerate(counts):
        slots = (groups == group).nonzero()[:, 0]
        k = min(count, slots.numel())
        if k:
            chosen.append(slots[choose(slots, k)])
    return torch.cat(chosen).sort().values


# -------------------------------------------------------------------------------------------- diversity, relevance


def maxmin(features: Tensor, k: int, scores: Tensor | None = None, start: int | None = None) -> Tensor:
    """Greedy max-min diversity on cosine distance, weighted by a score if given.

    Next token: ``argmax_i s_i min_{j chosen} (1 - cos(z_i, z_j))``. The first is ``argmax s`` with scores (ZOO-Prune),
    else the token farthest from its nearest neighbour (DivPrune), or ``start``.

    Args:
        features: ``[..., N, d]``.
        scores: fp32 ``[..., N]``, >= 0.
        start: index of the first token.

    Returns:
        ``[..., min(k, N)]``.
    """
    z = F.normalize(features.float(), dim=-1, eps=1e-12)
    cosines = Cosines(z, k)
    if start is not None:
        first = torch.full(z.shape[:-2], start, device=z.device)
    elif scores is not None:
        first = scores.float().argmax(-1)
    else:
        first = _most_isolated(cosines)
    weight = torch.ones_like(z[..., 0]) if scores is None else scores.float()
    return _greedy(first, k, lambda token: (1 - cosines.of(token)).clamp(min=0), weight)


def farthest_points(features: Tensor, k: int, start: int = 0) -> Tensor:
    """Farthest-point sampling in Euclidean distance (ApET's basis; upstream starts at a random token).

    Args:
        features: ``[..., N, d]``.
        start: index of the first token.
    """
    x = features.float()
    first = torch.full(x.shape[:-2], start, device=x.device)
    return _greedy(first, k, lambda token: (x - _row(x, token)).pow(2).sum(-1), torch.ones_like(x[..., 0]))


class Cosines:
    """Cosines between unit rows ``z [..., N, d]``, of which a greedy selector wants one row in each of its steps.

    The whole matrix is made at once where it fits and is cheaper than the rows one by one.
    """

    def __init__(self, z: Tensor, steps: int):
        self.z = z
        fits, n = z[..., 0].numel() * z.shape[-2] <= WHOLE, z.shape[-2]
        self.whole = z @ z.transpose(-1, -2) if fits and n <= STEPS * steps else None

    def of(self, token: Tensor) -> Tensor:
        """``[..., N]`` of one token ``[...]`` per sample."""
        if self.whole is not None:
            return _row(self.whole, token)[..., 0, :]
        return (_row(self.z, token) @ self.z.transpose(-1, -2))[..., 0, :]

    def block(self, rows: Tensor) -> Tensor:
        """``[..., R, N]`` of tokens ``rows [R]``."""
        return self.z[..., rows, :] @ self.z.transpose(-1, -2) if self.whole is None else self.whole[..., rows, :]


def _row(x: Tensor, token: Tensor) -> Tensor:
    """Row ``token [...]`` of ``x [..., N, d]`` as ``[..., 1, d]``."""
    return x.gather(-2, token[..., None, None].expand(*token.shape, 1, x.shape[-1]))


def _greedy(first: Tensor, k: int, distances: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """Farthest-first traversal: keeps only the running minimum of the distances ``[..., N]`` to the tokens taken."""
    n = weight.shape[-1]
    nearest = torch.full_like(weight, torch.inf)
    taken = torch.zeros_like(weight, dtype=torch.bool)
    chosen, current = [], first
    for _ in range(min(k, n)):
        chosen.append(current)
        taken = taken.scatter(-1, current[..., None], True)
        nearest = torch.minimum(nearest, distances(current))
        current = (weight * nearest).masked_fill(taken, -torch.inf).argmax(-1)
    return torch.stack(chosen, -1).sort(-1).values


def _most_isolated(cosines: Cosines) -> Tensor:
    """Index ``[...]`` of the row that is farthest from its nearest other row.

    Two tokens that are each other's nearest tie by construction; rounding must not choose, so the earlier one wins.
    """
    z = cosines.z
    n = z.shape[-2]
    if n == 1:
        return torch.zeros(z.shape[:-2], dtype=torch.long, device=z.device)
    similarity, neighbour = [], []
    for rows in torch.arange(n, device=z.device).split(1024):
        part = cosines.block(rows)
        part[..., torch.arange(rows.numel(), device=z.device), rows] = -torch.inf
        best = part.max(-1)
        similarity.append(best.values)
        neighbour.append(best.indices)
    closest = torch.cat(neighbour, -1)
    first = torch.cat(similarity, -1).argmin(-1, keepdim=True)
    other = closest.gather(-1, first)
    mutual = closest.gather(-1, other) == first
    return torch.where(mutual, torch.minimum(first, other), first)[..., 0]


def dpp(features: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Fast greedy MAP of the determinantal point process ``K = diag(r) S diag(r)``, S = cosines (CDPruner).

    State ``d_i^2 = K_ii``; repeatedly ``j = argmax d^2``, ``e_i = (K_ji - c_j . c_i) / sqrt(d_j^2)``,
    ``d^2 -= e^2``. A token whose gain has fallen to rounding noise (3e-6 of its ``K_ii``) gains exactly 0 and changes
    no other gain; upstream divides by the root of the noise.

    Args:
        features: ``[..., N, d]``.
        relevance: r >= 0, ``[..., N]``.

    Returns:
        ``[..., min(k, N)]``.
    """
    return dpp_gains(features, relevance, k)[0].sort(-1).values


def dpp_gains(features: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Tokens of :func:`dpp` in the order they are taken, and the gain ``d_j^2`` of each, ``[..., min(k, N)]``."""
    z = F.normalize(features.float(), dim=-1, eps=1e-12)
    cosines = Cosines(z, k)
    r = relevance.float()
    n = z.shape[-2]
    steps = min(k, n)
    diagonal = r * r * (z != 0).any(-1)  # exactly, so that equal relevance ties
    gains, taken = diagonal, torch.zeros_like(diagonal, dtype=torch.bool)
    basis = z.new_zeros((*r.shape[:-1], steps, n))
    chosen, values = [], []
    for step in range(steps):
        best = gains.masked_fill(taken, -torch.inf).argmax(-1, keepdim=True)  # [..., 1]
        value = gains.gather(-1, best)
        row = r.gather(-1, best) * cosines.of(best[..., 0]) * r
        before = basis[..., :step, :]
        own = before.gather(-1, best[..., None].expand(*before.shape[:-1], 1))
        e = (row - (own.transpose(-1, -2) @ before)[..., 0, :]) / value.clamp(min=1e-12).sqrt() * (value > 0)
        basis[..., step, :] = e
        left = gains - e * e
        gains, taken = left * (left > 3e-6 * diagonal), taken.scatter(-1, best, True)
        chosen.append(best[..., 0])
        values.append(value[..., 0])
    return torch.stack(chosen, -1), torch.stack(values, -1)


def even_odd_dedup(features: Tensor, scores: Tensor, target: int, step: int = 8) -> Tensor:
    """VisPruner's removal of near duplicates down to ``target`` tokens.

    Tokens stand in descending score order. Each round splits them into even and odd places and drops the
    ``min(step, surplus)`` even ones whose best cosine with an odd one is highest.

    Args:
        features: ``[n, d]``.
        scores: ``[n]``.

    Returns:
        ascending indices ``[min(target, n)]``.
    """
    z, order = F.normalize(features.float(), dim=-1, eps=1e-12), by_rank(scores)
    if target <= 0:
        return order[:0]
    while order.numel() > target:
        even, odd = order[::2], order[1::2]
        best = (z[even] @ z[odd].T).amax(-1)
        drop = min(step, order.numel() - target, even.numel())
        left = torch.ones_like(order, dtype=torch.bool)
        left[2 * by_rank(best)[:drop]] = False
        order = order[left]
    return order.sort().values


# ------------------------------------------------------------------------------------------------- outliers, runs


def iqr_outliers(scores: Tensor) -> Tensor:
    """bool ``[..., N]``: ``a > Q3 + 1.5 (Q3 - Q1)`` with linear quantiles (PruMerge); the best token if none is.

    The count follows the picture, so that it is a mask and not a dense index.
    """
    a = scores.float()
    q1, q3 = (torch.quantile(a, q, dim=-1, keepdim=True) for q in (0.25, 0.75))
    out = a > q3 + 1.5 * (q3 - q1)
    best = torch.zeros_like(out).scatter(-1, a.argmax(-1, keepdim=True), True)
    return torch.where(out.any(-1, keepdim=True), out, best)


def run_bounds(n: int, runs: int) -> list[tuple[int, int]]:
    """(start, end) of consecutive runs of nearly equal length; the first ``n % runs`` are one token longer."""
    runs = max(1, min(runs, n))
    size, extra = divmod(n, runs)
    ends = [size * (i + 1) + min(i + 1, extra) for i in range(runs)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def run_counts(weights: Tensor, sizes: Sequence[int], k: int) -> list[int]:
    """Budget per run: ``floor(k w_p / sum w)``, the remainder one token each to the largest weights with room.

    What a run cannot hold goes round again (upstream leaves the places empty).

    Args:
        weights: ``[P]``, >= 0.
        sizes: tokens per run; their sum is at least k.
    """
    w = weights.double()
    share = w / w.sum() if float(w.sum()) > 0 else torch.full_like(w, 1 / w.numel())
    counts = [min(int(c), size) for c, size in zip((k * share + 1e-9).floor().tolist(), sizes, strict=True)]
    order = by_rank(weights).tolist()
    left = min(k, sum(sizes)) - sum(counts)
    while left > 0:
        for p in order:
            if left > 0 and counts[p] < sizes[p]:
                counts[p] += 1
                left -= 1
    return counts


def runs(scores: Tensor, run_scores: Tensor, k: int, count: int) -> Tensor:
    """HoloV: budgets per run of consecutive tokens by the mean of ``run_scores``, then the top of ``scores`` in each.

    As released: ``run_scores = holistic(...)``, ``scores`` = attention. As intended: both are
    ``holistic(..., scope="image")``.

    Args:
        scores: ``[N]``.
        run_scores: ``[N]``.
        count: number of runs (16 on LLaVA).

    Returns:
        ascending ``[min(k, N)]``.
    """
    bounds = run_bounds(scores.shape[-1], count)
    weights = torch.stack([run_scores[a:b].float().mean() for a, b in bounds])
    budgets = run_counts(weights, [b - a for a, b in bounds], k)
    return torch.cat([a + topk(scores[a:b], c) for (a, b), c in zip(bounds, budgets, strict=True)])


def masked(indices: Tensor, n: int) -> Tensor:
    """bool ``[..., n]``, True at indices ``[..., k]``."""
    return torch.zeros((*indices.shape[:-1], n), dtype=torch.bool, device=indices.device).scatter(-1, indices, True)
