"""Mergers: what becomes of the tokens that leave.

Most of them are a ``parent`` map: int64 ``[..., n]``, the index of the token that takes each token in; survivors are
their own parent. :func:`merge` then averages.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .scores import unit
from .selectors import by_rank, stride


def survivors(parent: Tensor) -> Tensor:
    """bool ``[..., n]``: tokens that are their own parent."""
    return parent == torch.arange(parent.shape[-1], device=parent.device)


def merge(
    features: Tensor, parent: Tensor, weights: Tensor | None = None, how: Literal["mean", "add_mean"] = "mean"
) -> Tensor:
    """Features with every survivor replaced by what its children make of it; other rows stay as they were.

    Args:
        features: ``[..., n, d]``.
        parent: ``[..., n]``.
        weights: ``[..., n]``, >= 0; sizes (ToMe) or a ramp (iLLaVA); 1 by default.
        how: ``mean`` = weighted mean of the survivor and its children; ``add_mean`` = survivor + mean of the children,
            as VisionZip's code does (about twice the length).

    Returns:
        ``[..., n, d]`` in the dtype of ``features``.
    """
    x = features.float()
    alive = survivors(parent)[..., None]
    w = (torch.ones_like(x[..., 0]) if weights is None else weights.float())[..., None]
    if how == "add_mean":
        w = w.masked_fill(alive, 0.0)
    at = parent[..., None]
    total = torch.zeros_like(x).scatter_add(-2, at.expand(x.shape), w * x)
    mass = torch.zeros_like(w).scatter_add(-2, at, w)
    mean = torch.where(mass > 0, total / mass.clamp(min=1e-30), torch.zeros_like(x) if how == "add_mean" else x)
    out = x + mean if how == "add_mean" else mean
    return torch.where(alive, out, x).to(features.dtype)


def merged_sizes(parent: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Tokens that every survivor stands for, fp32 ``[..., n]``; 0 at merged ones (ToMe adds its log to logits)."""
    sizes = torch.ones(parent.shape, device=parent.device) if sizes is None else sizes.float()
    return torch.zeros_like(sizes).scatter_add(-1, parent, sizes)


# ------------------------------------------------------------------------------------------------------- bipartite


def alternate(n: int, protected: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """ToMe's halves: (even places, the first ``protected`` tokens left out; odd places)."""
    places = torch.arange(n, device=device)
    even, odd = places[::2], places[1::2]
    return even[even >= protected], odd[odd >= protected]


def bipartite(metric: Tensor, source: Tensor, target: Tensor, r: int) -> Tensor:
    """The ``r`` source tokens most similar to some target token join it.

    ToMe: :func:`alternate` halves on head-mean keys. TokenCarve: the lower half of the best tokens joins the upper.

    Args:
        metric: ``[..., n, c]``; cosine similarity.
        source: indices ``[..., a]`` (or ``[a]``, shared).
        target: indices ``[..., b]``.
        r: pairs, capped at the number of source tokens.

    Returns:
        parent ``[..., n]``.
    """
    z = unit(metric)
    lead, n = z.shape[:-2], z.shape[-2]
    parent = torch.arange(n, device=z.device).expand(*lead, n).contiguous()
    r = min(r, source.shape[-1])
    if r <= 0 or target.shape[-1] == 0:
        return parent
    source, target = source.expand(*lead, -1), target.expand(*lead, -1)
    left, right = (z.gather(-2, idx[..., None].expand(*idx.shape, z.shape[-1])) for idx in (source, target))
    best, match = (left @ right.transpose(-1, -2)).max(-1)
    order = by_rank(best)[..., :r]
    return parent.scatter(-1, source.gather(-1, order), target.gather(-1, match.gather(-1, order)))


def nearest(features: Tensor, kept: Tensor) -> Tensor:
    """Every other token joins its most similar kept token (ApET).

    Args:
        features: ``[..., n, d]``.
        kept: indices ``[..., k]``.

    Returns:
        parent ``[..., n]``.
    """
    z = unit(features)
    kept = kept.expand(*z.shape[:-2], -1)
    chosen = z.gather(-2, kept[..., None].expand(*kept.shape, z.shape[-1]))
    parent = kept.gather(-1, (z @ chosen.transpose(-1, -2)).argmax(-1))
    return parent.scatter(-1, kept, kept)


def stride_merge(metric: Tensor, count: int) -> Tensor:
    """VisionZip's contextual tokens: ``count`` targets at stride ``max(1, n // count)``, others join by cosine.

    Args:
        metric: ``[..., n, c]``, head-mean keys of the tokens that were not kept.

    Returns:
        parent ``[..., n]``.
    """
    n = metric.shape[-2]
    return nearest(metric, stride(n, n // max(count, 1), metric.device)[:count])


# -------------------------------------------------------------------------------------------------------- clusters


def dpc_knn(features: Tensor, count: int, neighbours: int | None = None, seed: int = 0) -> Tensor:
    """Density-peak clusters (SparseVLM's recycling).

    Distance = Euclid / sqrt(d); density ``rho = exp(-mean of d^2 over the nearest) + 1e-6 noise``; ``delta`` =
    distance to the nearest denser token (the largest distance of all for the densest); centres = the top ``count``
    of ``rho delta``; every other token joins its nearest centre.

    Args:
        features: ``[..., n, d]``.
        count: clusters, capped at n.
        neighbours: nearest tokens of the density, the token itself among them; ``count`` by default.
        seed: of the noise that breaks ties, drawn on the CPU and the same for every image.

    Returns:
        parent ``[..., n]``; centres are their own parents.
    """
    x = features.double()  # density differences decide, and they are small
    n = x.shape[-2]
    count = min(count, n)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    close = distance.topk(min(neighbours or count, n), dim=-1, largest=False).values
    noise = torch.rand(n, generator=torch.Generator().manual_seed(seed)).to(x.device)
    rho = torch.exp(-close.pow(2).mean(-1)) + 1e-6 * noise
    denser = rho[..., None, :] > rho[..., :, None]
    largest = distance.amax((-2, -1), keepdim=True)
    delta = torch.where(denser, distance, largest).amin(-1)
    centres = (rho * delta).argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values
    at = centres[..., None, :].expand(*distance.shape[:-1], count)
    parent = centres.gather(-1, distance.gather(-1, at).argmin(-1))
    return parent.scatter(-1, centres, centres)


# ------------------------------------------------------------------------------------------------------------ ramp


def ramp(scores: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """iLLaVA: the ``r + 1`` lowest tokens collapse into one, at the slot of the last of them.

    Weights rise linearly with the score, ``1 .. r + 1``. Upstream's two ramps run in opposite directions, which is
    taken for a slip: here the better token always weighs more [ours].

    Args:
        scores: ``[..., n]``.
        r: tokens that disappear, ``0 <= r < n``.

    Returns:
        parent ``[..., n]`` and weights fp32 ``[..., n]`` for :func:`merge`.
    """
    n = scores.shape[-1]
    parent = torch.arange(n, device=scores.device).expand(scores.shape).contiguous()
    weights = torch.ones(scores.shape, device=scores.device)
    r = min(r, n - 1)
    if r <= 0:
        return parent, weights
    low = by_rank(scores)[..., -(r + 1) :]  # the last is the lowest
    slot = low.amax(-1, keepdim=True).expand(low.shape)
    rising = torch.arange(r + 1, 0, -1, device=scores.device, dtype=torch.float32).expand(low.shape)
    return parent.scatter(-1, low, slot), weights.scatter(-1, low, rising)


# -------------------------------------------------------------------------------------------------------- PruMerge


def knn_add(features: Tensor, keys: Tensor, attention: Tensor, kept: Tensor, neighbours: int = 32) -> Tensor:
    """PruMerge: ``x_i + sum a_j x_j`` over the nearest other tokens by key cosine, kept ones among them.

    The weights are not normalised.

    Args:
        features: ``[..., n, d]``.
        keys: ``[..., n, c]``.
        attention: CLS attention ``[..., n]``.
        kept: indices ``[..., k]``.

    Returns:
        ``[..., k, d]`` in the dtype of ``features``.
    """
    x, z, a = features.float(), unit(keys), attention.float()
    n = x.shape[-2]
    own = z.gather(-2, kept[..., None].expand(*kept.shape, z.shape[-1]))
    similarity = (own @ z.transpose(-1, -2)).scatter(-1, kept[..., None], -torch.inf)
    near = by_rank(similarity)[..., : min(neighbours, n - 1)]
    share = torch.zeros_like(similarity).scatter(-1, near, 1.0) * a[..., None, :]
    return (x.gather(-2, kept[..., None].expand(*kept.shape, x.shape[-1])) + share @ x).to(features.dtype)


def residual_token(features: Tensor, attention: Tensor, pruned: Tensor) -> Tensor:
    """PruMerge's extra token ``sum_{pruned} a_j x_j``, ``[..., d]``.

    Args:
        features: ``[..., n, d]``.
        attention: ``[..., n]``.
        pruned: bool ``[..., n]``.
    """
    return ((attention.float() * pruned)[..., None] * features.float()).sum(-2).to(features.dtype)


def overwrite_lowest(scores: Tensor, basis: Tensor, k: int) -> Tensor:
    """ApET's kept set: the top of the scores, its lowest places given to the basis tokens.

    Args:
        scores: ``[..., n]``.
        basis: distinct indices ``[..., P]``; all of them stay when ``P <= k``.
        k: tokens to keep.

    Returns:
        ascending indices ``[..., min(k, n)]``, no token twice.
    """
    basis = basis[..., :k]
    first = scores.float().scatter(-1, basis, torch.inf)
    return by_rank(first)[..., :k].sort(-1).values
