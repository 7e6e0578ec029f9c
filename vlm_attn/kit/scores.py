"""Scores: one fp32 number per visual token, from attention weights, features or a projector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .selectors import by_rank, run_bounds

Project = Callable[[Tensor], Tensor]
Reduce = Literal["mean", "sum"]

CHUNK_ELEMENTS = 1 << 24  # upper bound on attention weights held at a time


def unit(x: Tensor) -> Tensor:
    """fp32 rows of length 1 (zero rows stay zero)."""
    return F.normalize(x.float(), dim=-1, eps=1e-12)


# ---------------------------------------------------------------------------------------------- attention weights


def attention_row(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Softmax of one query per head on the given keys only, fp32.

    With queries and keys taken before the rotary embedding this is the RoPE-free score (FEATHER): softmax over the
    visual keys alone, per head.

    Args:
        query: ``[..., H, d]``.
        key: ``[..., Hkv, N, d]``; query head h uses key head ``h // (H / Hkv)``.

    Returns:
        ``[..., H, N]``.
    """
    heads, groups = query.shape[-2], key.shape[-3]
    grouped = query.float().unflatten(-2, (groups, heads // groups))
    return (grouped @ key.float().transpose(-1, -2) * scaling).softmax(-1).flatten(-3, -2)


def cls_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention of the CLS token on the patches, fp32 ``[..., H, N]`` (softmax over CLS and patches, CLS dropped).

    One row of one encoder layer: no attention matrix is needed. VisionZip sums the heads, FasterVLM, VisPruner and
    HoloV average them; PruMerge passes the full width as a single head with ``scaling = 1 / sqrt(width)``.

    Args:
        query: CLS query ``[..., H, d]``.
        key: keys ``[..., H, 1 + N, d]``, CLS first.
    """
    return attention_row(query, key, scaling)[..., 1:]


def head_rows(weights: Tensor, rows: Tensor | None = None, over: Reduce = "mean", heads: int | None = None) -> Tensor:
    """Head-mean attention of chosen rows, averaged or summed over them.

    FastV, PyramidDrop: one row. HiMAP: the sum over text rows, later over visual rows. SparseVLM: the mean over rater
    rows, in its second version of the ``heads`` heads with most mass on the picture.

    Args:
        weights: post-softmax ``[..., H, R, N]`` on the visual keys.
        rows: bool ``[..., R]``, the rows that count; all if None. Without any row the score is 0.
        over: reduction over the rows.
        heads: only this many heads, those with the largest total mass in the rows (earlier head first on ties).

    Returns:
        fp32 ``[..., N]``.
    """
    weights = weights.float()
    chosen = torch.ones_like(weights[..., 0, :, 0], dtype=torch.bool) if rows is None else rows
    per_head = (weights * chosen[..., None, :, None]).sum(-2)  # [..., H, N]
    if heads is not None and heads < per_head.shape[-2]:
        best = by_rank(per_head.sum(-1))[..., :heads]
        per_head = per_head.gather(-2, best[..., None].expand(*best.shape, per_head.shape[-1]))
    score = per_head.mean(-2)
    return score if over == "sum" else score / chosen.sum(-1, keepdim=True).clamp(min=1)


def received_attention(
    query: Tensor, key: Tensor, scaling: float, over: Reduce = "mean", causal: bool = False
) -> Tensor:
    """Attention that every token receives, over heads and queries, in chunks of rows.

    Encoders without CLS (SigLIP, Qwen-VL, iLLaVA): the mean. SpAtten: the sum over heads and queries; the caller adds
    it up over layers.

    Args:
        query: ``[..., H, N, d]``.
        key: ``[..., H, N, d]``.
        causal: row q sees keys up to q.

    Returns:
        fp32 ``[..., N]``.
    """
    n = key.shape[-2]
    size = max(1, CHUNK_ELEMENTS // max(1, query[..., 0].numel()))
    total = query.new_zeros((*query.shape[:-3], n), dtype=torch.float32)
    columns = torch.arange(n, device=query.device)
    for rows in torch.arange(query.shape[-2], device=query.device).split(size):
        logits = query[..., rows, :].float() @ key.float().transpose(-1, -2) * scaling
        if causal:
            logits = logits.masked_fill(columns[None] > rows[:, None], -torch.inf)
        total += logits.softmax(-1).sum((-3, -2))
    return total if over == "sum" else total / (query.shape[-3] * query.shape[-2])


def head_importance(outputs: Tensor) -> Tensor:
    """``sum |head output|`` of head outputs ``[..., H, R, d]`` -> ``[..., H]`` (SpAtten; the caller accumulates)."""
    return outputs.float().abs().sum((-2, -1))


def text_raters(text: Tensor, visual: Tensor) -> Tensor:
    """Text tokens that the picture speaks to (SparseVLM): column mean of ``softmax_text(E_V E_Q^T)`` above average.

    Args:
        text: input embeddings ``[..., T, d]`` of the text after the image.
        visual: input embeddings ``[..., N, d]`` of the visual tokens.

    Returns:
        bool ``[..., T]``.
    """
    share = (visual.float() @ text.float().transpose(-1, -2)).softmax(-1).mean(-2)
    return share > share.mean(-1, keepdim=True)


def group_mean(scores: Tensor, size: int) -> Tensor:
    """Scores of merged tokens: the mean over ``size`` consecutive patches, ``[..., N * size] -> [..., N]``."""
    return scores.float().unflatten(-1, (-1, size)).mean(-1)


# --------------------------------------------------------------------------------------------------- value flow


def value_flow(attention: Tensor, cls_value: Tensor, value: Tensor) -> Tensor:
    """FlowCut's information flow ``(alpha / sum + beta / sum) * |mean_h v|_1``.

    ``alpha`` is the head-mean CLS attention, ``beta`` the head mean of ``softmax_j(v_CLS . v_j)`` over the patches,
    without a scale.

    Args:
        attention: CLS attention ``[..., H, N]``.
        cls_value: ``[..., H, d]``.
        value: values of the patches ``[..., H, N, d]``.

    Returns:
        fp32 ``[..., N]``.
    """
    alpha = attention.float().mean(-2)
    beta = attention_row(cls_value, value, 1.0).mean(-2)
    size = value.float().mean(-3).abs().sum(-1)
    return (alpha / alpha.sum(-1, keepdim=True) + beta / beta.sum(-1, keepdim=True)) * size


def running(previous: Tensor | None, score: Tensor, decay: float = 0.5) -> Tensor:
    """Running score ``decay * previous + (1 - decay) * score``; the first score stands as it is (FlowCut)."""
    return score.float() if previous is None else decay * previous + (1 - decay) * score.float()


# ----------------------------------------------------------------------------------------------------- features


def norm(features: Tensor) -> Tensor:
    """Length ``|z_i|`` of features ``[..., N, d]``, the zero-cost stand-in for the projector's sensitivity."""
    return features.float().norm(dim=-1)


def svd_energy(features: Tensor) -> Tensor:
    """``sum_j |U_ij| s_j`` of the SVD of ``[..., N, d]`` (TokenCarve), through the smaller Gram matrix in fp64."""
    x = features.double()
    if x.shape[-2] > x.shape[-1]:  # U_ij s_j = (X V)_ij
        vectors = torch.linalg.eigh(x.transpose(-1, -2) @ x)[1]
        return (x @ vectors).abs().sum(-1).float()
    values, vectors = torch.linalg.eigh(x @ x.transpose(-1, -2))
    return (vectors.abs() * values.clamp(min=0).sqrt()[..., None, :]).sum(-1).float()


def borda(*scores: Tensor) -> Tensor:
    """Mean of the rank weights ``N .. 1`` that each of several scores ``[..., N]`` gives (TokenCarve)."""
    n = scores[0].shape[-1]
    weights = torch.arange(n, 0, -1, device=scores[0].device, dtype=torch.float32)
    total = torch.zeros_like(scores[0], dtype=torch.float32)
    for score in scores:
        order = by_rank(score)
        total += torch.zeros_like(total).scatter(-1, order, weights.expand(order.shape))
    return total / len(scores)


def approx_error(features: Tensor, basis: Tensor, ridge: float = 1e-5) -> Tensor:
    """``|x_i - B^T c_i|`` with ``c = (B B^T + ridge I)^-1 B x`` (ApET).

    Args:
        features: ``[..., N, d]``.
        basis: indices ``[..., P]`` of the basis tokens.

    Returns:
        fp32 ``[..., N]``.
    """
    x = features.float()
    b = x.gather(-2, basis[..., None].expand(*basis.shape, x.shape[-1]))
    gram = b @ b.transpose(-1, -2) + ridge * torch.eye(b.shape[-2], device=x.device)
    coefficients = torch.linalg.solve(gram, b @ x.transpose(-1, -2))
    return (x - coefficients.transpose(-1, -2) @ b).norm(dim=-1)


def max_similarity(features: Tensor, pivots: Tensor) -> Tensor:
    """Largest cosine to any pivot (DART: the fewer a token duplicates, the better), ``[..., N]``.

    Args:
        features: ``[..., N, d]``.
        pivots: indices ``[..., P]``.
    """
    z = unit(features)
    chosen = z.gather(-2, pivots[..., None].expand(*pivots.shape, z.shape[-1]))
    return (z @ chosen.transpose(-1, -2)).amax(-1)


def clip_relevance(image: Tensor, text: Tensor) -> Tensor:
    """CDPruner's relevance: the mean over text chunks of the **negative** cosine.

    The sign is the published one: projected patch tokens of CLIP rank inversely.

    Args:
        image: patches in CLIP's joint space ``[..., N, d]``.
        text: embeddings of the question's 77-token chunks ``[..., C, d]``.

    Returns:
        fp32 ``[..., N]``.
    """
    return -(unit(image) @ unit(text).transpose(-1, -2)).mean(-1)


def holistic(attention: Tensor, features: Tensor, runs: int, scope: Literal["run", "image"] = "run") -> Tensor:
    """HoloV's token score ``t_i = 1e3 a_i + 0.09 var_i`` on runs of consecutive tokens.

    ``var_i`` is the variance of the cosines between token i and its run, rescaled to the mean of ``|1e3 a|``: per run
    as released, where it cancels from the run weights, or over the image as intended.

    Args:
        attention: ``a`` ``[N]``.
        features: ``[N, d]``.
        runs: number of runs.

    Returns:
        fp32 ``[N]``.
    """
    attention = 1e3 * attention.float()
    spread = torch.zeros_like(attention)
    bounds = run_bounds(attention.shape[-1], runs)
    for start, end in bounds:
        z = unit(features[start:end])
        spread[start:end] = (z @ z.T).var(-1, correction=0)
    for start, end in bounds if scope == "run" else [(0, attention.shape[-1])]:
        part = spread[start:end]
        spread[start:end] = part * attention[start:end].abs().mean() / part.mean().clamp(min=1e-12)
    return attention + 0.09 * spread


# ------------------------------------------------------------------------------------------ projector sensitivity


def directions(count: int, width: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """``count`` Gaussian directions of length 1, fp32 ``[count, width]``; drawn on the CPU, so devices agree."""
    generator = torch.Generator().manual_seed(seed)
    return unit(torch.randn(count, width, generator=generator)).to(device)


def zo_sensitivity(
    project: Project, features: Tensor, m: int = 64, h: float = 0.01, seed: int = 0, behind: Project | None = None
) -> Tensor:
    """Zeroth-order sensitivity ``S_i = mean_j |M(x_i + h u_j) - M(x_i - h u_j)| / (2 h)`` (ZOO-Prune).

    One bank of ``m`` directions is shared by all tokens. Everything is fp32: in half precision most of the
    displacement is rounded away.

    Args:
        project: the projector M on ``[..., N, d_v]``, in fp32.
        features: encoder output ``[..., N, d_v]``.
        h: step length.
        behind: a linear map that ends M, if ``project`` leaves it out: it then runs on differences, once a direction.

    Returns:
        fp32 ``[..., N]``.
    """
    x = features.float()
    total = x.new_zeros(x.shape[:-1])
    for u in directions(m, x.shape[-1], seed, x.device):
        plus, minus = project(torch.stack([x + h * u, x - h * u]))
        moved = plus - minus if behind is None else behind(plus - minus)
        total += moved.float().norm(dim=-1) / (2 * h)
    return total / m


def jvp_sensitivity(
    project: Project, features: Tensor, m: int = 64, seed: int = 0, behind: Project | None = None
) -> Tensor:
    """The exact limit of :func:`zo_sensitivity` for ``h -> 0``: ``mean_j |J(x_i) u_j|`` by forward differentiation."""
    x = features.float()
    total = x.new_zeros(x.shape[:-1])
    for u in directions(m, x.shape[-1], seed, x.device):
        tangent = torch.func.jvp(project, (x,), (u.expand_as(x),))[1]
        moved = tangent if behind is None else behind(tangent)
        total += moved.float().norm(dim=-1)
    return total / m


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors ``(left [out, rank], right [rank, in])`` of the best approximation of a weight of that rank, fp32."""
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]
