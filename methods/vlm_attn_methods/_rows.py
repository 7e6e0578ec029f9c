"""Shared by edits of whole rows: choices of heads, evidence maps, and values that follow the slots of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_attn.stages import EditView


def ranked(values: Tensor, fraction: float) -> Tensor:
    """1 at the top ``int(fraction H)`` (at least one) of the last axis, earlier ones first among equals; 0 else."""
    count = max(1, int(fraction * values.shape[-1]))
    order = values.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(values).scatter_(-1, order, 1.0)


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


def laid(values: Tensor, view: EditView) -> Tensor:
    """Values ``[B, N]`` of the whole prompt at a layer's slots, 0 at generated tokens."""
    longest = int(view.tokens.index.max()) + 1
    padded = torch.nn.functional.pad(values, (0, max(longest - values.shape[1], 0)))
    return padded.gather(1, view.tokens.index)
