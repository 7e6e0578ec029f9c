"""Budgets and schedules: how many tokens stay, where, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

AUTO_SHARE = 0.99
"""Share of the score's mass that ``keep="auto"`` holds."""


def budget(keep: int | float | str, total: int, scores: Tensor | None = None) -> int:
    """Tokens to keep of ``total``: a count is capped, a share is rounded; at least 1.

    ``"auto"`` or ``"auto:0.95"`` [ours]: the fewest tokens whose ``scores [n]`` hold that share of all their mass,
    99 % by default.

    Raises:
        ValueError: ``"auto"`` without scores, or with negative ones; or a time, which is no budget of one picture.
    """
    if isinstance(keep, str):
        if keep.endswith("ms"):
            raise ValueError(f"keep='{keep}' is a time: only methods that document it turn times into counts")
        if scores is None or bool((scores < 0).any()):
            raise ValueError(f"keep='{keep}' counts the mass of scores that are not negative: give a count or a share")
        share = float(keep.partition(":")[2] or AUTO_SHARE)
        return max(1, int(mass_count(scores, share))) if scores.numel() else 0
    count = keep if isinstance(keep, int) else round(total * keep)
    return max(1, min(count, total))


def cascade(keep: int | float, total: int, step: int, steps: int) -> int:
    """Left of ``total`` after ``step`` of ``steps`` equal cuts down to ``budget(keep, total)`` (SpAtten) [ours]."""
    return total - round((total - budget(keep, total)) * step / steps)


def floor_share(total: int, share: float) -> int:
    """``int(share * total)``, at least 1 (PyramidDrop, ZOO-Prune; DivPrune and FastV round)."""
    return max(1, min(int(share * total), total))


def cap(k: int, visible: Tensor) -> Tensor:
    """``k_eff = min(k, sum v)`` per image of bool ``[..., N]``."""
    return visible.sum(-1).clamp(max=k)


def proportional(k: int, sizes: Sequence[int]) -> list[int]:
    """``k`` split over images or crops in proportion to their token counts, each at least 1.

    Largest remainders get what rounding leaves, the earlier first; no part exceeds its size.

    Raises:
        ValueError: fewer tokens than parts.
    """
    if k < len(sizes):
        raise ValueError(f"{k} tokens cannot be split over {len(sizes)} images: at least one each")
    k, total = min(k, sum(sizes)), sum(sizes)
    exact = [k * size / total for size in sizes]
    out = [max(1, math.floor(e + 1e-9)) for e in exact]
    order = sorted(range(len(sizes)), key=lambda i: (-(exact[i] - out[i]), i))
    while (left := k - sum(out)) != 0:
        for i in order if left > 0 else reversed(order):
            room = out[i] < sizes[i] if left > 0 else out[i] > 1
            if left and room:
                out[i] += 1 if left > 0 else -1
                left += -1 if left > 0 else 1
    return out


def equal_crops(keep: float, total: int, crops: int) -> int:
    """Tokens per crop ``int(total * keep / crops)`` (ZOO-Prune on tiles: 2,880 tokens, newline tokens apart)."""
    return max(1, int(total * keep / crops))


# -------------------------------------------------------------------------------------------------------- schedules

PYRAMIDDROP = ((8, 0.5), (16, 0.25), (24, 0.125))
"""PyramidDrop on 32 layers: (after this many layers, share of the original N)."""

HIMAP = ((2, 288), (8, 72))
"""HiMAP on LLaVA-1.5: (layer, tokens)."""

SPARSEVLM_LAYERS = (2, 6, 15)
"""SparseVLM: tokens leave at the outputs of these layers."""

SPARSEVLM = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17), 96: (238, 48, 26)}
"""SparseVLM 1.5: tokens left by each stage, before the recycled ones, per nominal budget of 576."""

SPARSEVLM_PLUS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
"""SparseVLM+: the same for the version without merging."""

VISIONZIP = {64: (54, 10), 128: (108, 20), 192: (162, 30)}
"""VisionZip: (dominant tokens, CLS among them; contextual tokens)."""


def scaled_layers(layers: Sequence[int], depth: int, lowest: int = 1, published_depth: int = 32) -> tuple[int, ...]:
    """Published layer numbers carried over to a model of another depth: ``round(l depth / published)``, at least
    ``lowest`` and strictly ascending [ours]."""
    out: list[int] = []
    for layer in layers:
        out.append(max(round(layer * depth / published_depth), (out[-1] + 1) if out else lowest))
    return tuple(out)


def recycled(pruned: int, share: float = 0.3) -> tuple[int, int]:
    """SparseVLM's recycling of n pruned tokens: (taken = ``int(0.3 n) + 1``, clusters = ``int(taken / 10) + 1``)."""
    if pruned <= 0:
        return 0, 0
    taken = min(int(share * pruned) + 1, pruned)
    return taken, int(taken / 10) + 1


def rank_budget(block: Tensor, total: int, scale: float | None = 13.5, rate: float = 1.0) -> int:
    """Tokens to keep from the rank of the rater x visual attention block ``[R, N]`` (SparseVLM before its lists).

    Args:
        scale: keep ``int(scale * rank)`` as version 1.0 does; None = the paper's rule, prune
            ``int(rate * (N - rank))``.
        rate: the paper's lambda.
    """
    rank = int(torch.linalg.matrix_rank(block.float()))
    keep = int(scale * rank) if scale is not None else total - int(rate * (total - rank))
    return max(1, min(keep, total))


def entropy_drop(attention: Tensor, n: int, target: int, remaining: int) -> int:
    """Tokens FlowCut drops now: ``round((n - T) / sqrt(rpl) (1 - (H / ln n)^2))``, the rest of them at ``rpl = 0``.

    Args:
        attention: head-mean CLS attention ``[..., n]``; H = entropy of its renormalised form, the maximum over images.
        n: tokens left.
        target: T.
        remaining: pruning layers still to come, rpl; nothing is dropped when it is odd or n <= T.
    """
    if n <= target or remaining % 2:
        return 0
    if remaining == 0:
        return n - target
    p = attention.double() / attention.double().sum(-1, keepdim=True)
    entropy = float(torch.special.entr(p).sum(-1).amax())
    evenness = entropy / math.log(n) if n > 1 else 1.0
    drop = round((n - target) / math.sqrt(remaining) * (1 - evenness**2))
    return max(0, min(drop, n - target))


def plus_stride(kept: int, total: int) -> int:
    """PruMerge+: stride ``int((1 / ratio) / 3)`` of the uniform tokens, ``ratio = kept / total``; at least 1."""
    return max(1, int(total / max(kept, 1) / 3))


def mass_count(scores: Tensor, share: float) -> Tensor:
    """Smallest k whose top-k scores hold ``share`` of the mass, int64 ``[...]`` [ours: the budget autopilot].

    Args:
        scores: ``[..., N]``, >= 0.
        share: in (0, 1].
    """
    ordered = scores.double().sort(dim=-1, descending=True).values
    mass = ordered.cumsum(-1) / ordered.sum(-1, keepdim=True).clamp(min=1e-30)
    return ((mass < share - 1e-12).sum(-1) + 1).clamp(max=scores.shape[-1])


# ------------------------------------------------------------------------------------------------------------- cost


def equivalent_tokens(per_layer: Sequence[int]) -> float:
    """``(1 / L) sum_l n_l``: visual tokens that a layer processes on average, the figure that makes budgets
    comparable."""
    return sum(per_layer) / len(per_layer)


def per_layer(total: int, depth: int, schedule: Sequence[tuple[int, int]]) -> list[int]:
    """Visual tokens of every layer under a schedule of (first layer with fewer tokens, tokens left)."""
    out = [total] * depth
    for layer, left in schedule:
        out[layer:] = [left] * (depth - layer)
    return out
