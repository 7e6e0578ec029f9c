"""Shared by edits of whole rows: choices of heads, evidence maps, and values that follow the slots of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_attn.stages import EditView

ROOM = 64  # generated tokens for which a layout of the keys has room before it is made anew


def ranked(values: Tensor, fraction: float, zeros: Tensor | None = None) -> Tensor:
    """1 at the top ``int(fraction H)`` (at least one) of the last axis, 0 else; ``zeros`` to start from."""
    top = values.topk(max(1, int(fraction * values.shape[-1]))).indices
    return (torch.zeros_like(values) if zeros is None else zeros).scatter(-1, top, 1.0)


def raised(weights: Tensor, chosen: Tensor, gains: Tensor) -> Tensor:
    """Weights ``[B, H, n]`` times ``1 + chosen gains``, rows renormalised.

    Args:
        chosen: ``[B, k, H]``, 1 in the heads that a kind of gain goes to.
        gains: ``[B, k, n]``, factor less 1 at the keys; kinds share no key.
    """
    out = torch.addcmul(weights, weights, torch.bmm(chosen.transpose(1, 2), gains))
    return out / out.sum(-1, keepdim=True)


def evidence_factor(values: Tensor, sigma: float) -> Tensor:
    """Values ``[n]`` clamped to mean +- ``sigma`` standard deviations (unbiased), min-max to [0, 1]; constant: 0."""
    if values.numel() > 1:
        mean, std = values.mean(), values.std()
        values = values.clamp(mean - sigma * std, mean + sigma * std)
    low, high = values.min(), values.max()
    return torch.zeros_like(values) if high <= low else (values - low) / (high - low)


def scattered(values: Tensor, view: EditView) -> Tensor:
    """Values ``[B, n]`` of a layer's slots at the positions of the whole prompt ``[B, N]``."""
    out = values.new_zeros(view.prompt.vis.shape)
    return out.scatter(1, view.tokens.index, values)
