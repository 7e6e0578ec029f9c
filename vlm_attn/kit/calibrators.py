"""Calibrators: change the ranking, never the attention of the forward pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------ positional trend


def raster_position(n: int, device: torch.device | str = "cpu") -> Tensor:
    """``x_i = i / (N - 1)``, fp32 ``[N]``; 0 for a single token."""
    return torch.arange(n, device=device).float() / max(n - 1, 1)


BENCHMARKS = ("MME", "GQA", "MM-Vet", "MMB", "MMB-CN", "POPE", "SQA", "TextVQA", "VizWiz", "VQAv2")

RELEASED_SIGMA = {
    "himap": (1.1738, 1.2490, 0.9791, 0.9254, 0.8510, 1.2955, 0.9816, 0.8504, 1.1334, 1.2732),
    "pyramiddrop": (1.8777, 2.2938, 2.3768, 1.5248, 1.4931, 2.3291, 1.5516, 1.8094, 1.4484, 2.1597),
    "sparsevlm": (2.1866, 1.3232, 2.4293, 1.8375, 1.4944, 2.6663, 1.7206, 1.8099, 1.5767, 2.3696),
    "tokencarve": (0.8450, 0.9593, 0.9755, 0.7447, 0.6397, 0.9860, 0.6783, 0.6787, 0.8227, 0.9755),
}
"""Exponents released for LLaVA-1.5-7B, per pruner in the order of :data:`BENCHMARKS`.

They were apparently fitted on the benchmarks themselves: for comparison with published rows only, never a default.
"""


def trend_weights(x: Tensor, sigma: float | Tensor) -> Tensor:
    """``w = exp(-sigma x)`` (arXiv 2508.17807)."""
    return torch.exp(-sigma * x)


def exp_trend(scores: Tensor, x: Tensor, sigma: float) -> Tensor:
    """Divides scores by their positional trend ``exp(sigma x)``; a constant factor of the trend changes no ranking."""
    return scores * trend_weights(x, sigma)


def fastv_released(x: Tensor) -> Tensor:
    """The weights released for FastV, a cubic: ``1 / (1 + 1.73373862 x - 4.82643345 x^2 + 4.88412565 x^3)``."""
    return 1 / (1 + 1.73373862 * x - 4.82643345 * x**2 + 4.88412565 * x**3)


def grid_position(cells: Tensor, grids: Tensor) -> Tensor:
    """(y, x) in [0, 1], fp32, of (row, column) ``[..., 2]`` on grids of (rows, columns) ``[..., 2]``."""
    return cells.float() / (grids - 1).clamp(min=1)


def grid_trend_weights(places: Tensor, sigma_row: float, sigma_column: float) -> Tensor:
    """``exp(-sigma_row y - sigma_column x)`` at the places (y, x) ``[..., 2]`` [ours: for M-RoPE, where position does
    not grow with the raster index alone]."""
    y, x = places.unbind(-1)
    return trend_weights(y, sigma_row) * trend_weights(x, sigma_column)


def mean_map(scores: Tensor, mean: Tensor, eps: float = 1e-7) -> Tensor:
    """``a_i / (mean_i + eps)`` with an offline mean of the same score [unverified]."""
    return scores / (mean + eps)


# ----------------------------------------------------------------------------------------------------- padding


def unpadded_cells(size: tuple[int, int], grid: int) -> Tensor:
    """Cells left when whole padded rows or columns are cut as LLaVA-NeXT's unpadding does, bool ``[grid, grid]``.

    A released variant of :meth:`vlm_attn.geometry.ImageGeometry.visible`, the padding mask by area.
    """
    width, height = size
    out = torch.ones(grid, grid, dtype=torch.bool)
    if width > height:
        cut = (grid - int(height * grid / width)) // 2
        out[:cut], out[grid - cut :] = False, False
    elif height > width:
        cut = (grid - int(width * grid / height)) // 2
        out[:, :cut], out[:, grid - cut :] = False, False
    return out


def suppress(scores: Tensor, visible: Tensor) -> Tensor:
    """``a_i v_i``: padding (``pad_mask``) or sinks (``sink_mask``) rank last among scores >= 0."""
    return scores * visible


# ------------------------------------------------------------------------------------------------------- scaling


def minmax(scores: Tensor, eps: float = 1e-8, flat: float = 1e-5) -> Tensor:
    """``(s - min) / (max - min + eps)`` per image; all ones when ``max - min < flat * mean``.

    The guard keeps rounding noise of a constant score from being blown up to [0, 1].
    """
    scores = scores.float()
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    constant = (high - low) <= flat * scores.mean(-1, keepdim=True).abs()
    return torch.where(constant, torch.ones_like(scores), (scores - low) / (high - low + eps))


def tilt(relevance: Tensor, theta: float) -> Tensor:
    """CDPruner's trade-off ``exp(theta / (2 (1 - theta)) r)``, theta in [0, 1).

    Raises:
        ValueError: theta is outside [0, 1).
    """
    if not 0 <= theta < 1:
        raise ValueError(f"theta={theta} must lie in [0, 1): 0 ignores relevance, values near 1 follow it alone")
    return torch.exp(theta / (2 * (1 - theta)) * relevance.float())


# ------------------------------------------------------------------------------------------------ rotary distance


def inverse_frequencies(head_dim: int, base: float) -> Tensor:
    """Rotary frequencies ``theta_j = base^(-2j / d)``, fp64 ``[d / 2]``."""
    return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def rope_gain(distance: Tensor, frequencies: Tensor) -> Tensor:
    """``R(D) / R(0) = (2 / d) sum_j cos(D theta_j)``: what RoPE leaves of the product of two all-ones vectors."""
    return torch.cos(distance.double()[..., None] * frequencies.double().to(distance.device)).mean(-1)


def rope_ones(weights: Tensor, distance: Tensor, frequencies: Tensor, floor: float = 0.1) -> Tensor:
    """SparseVLM+: weights divided by ``R(q - s) / R(0)``.

    Upstream divides by R itself, a constant factor more, and does not clamp; with base 1e4 the gain changes sign near
    distance 3000.

    Args:
        weights: post-softmax ``[..., R, N]``.
        distance: ``q - s`` ``[..., R, N]`` or broadcastable.
        frequencies: ``[d / 2]``.
        floor: lower clamp of the gain.
    """
    return weights.float() / rope_gain(distance, frequencies).clamp(min=floor).float()


def position_correction(distance: Tensor, frequencies: Tensor, sizes: Tensor | float = 1.0, c: float = 2.0) -> Tensor:
    """RESTORE's logit correction ``log(s_n (c - R(|D|) / R(0)))`` for keys that keep their original position.

    Args:
        distance: ``q - s``, any shape.
        sizes: ``s_n``, read here as the number of tokens that a key stands for [unverified].
        c: 2 in the paper; at least 1 + a little, else the logarithm is undefined.
    """
    inner = (c - rope_gain(distance.abs(), frequencies)).clamp(min=1e-6)
    size = torch.as_tensor(sizes, dtype=torch.float64, device=distance.device)
    return torch.log(size * inner).float()


def trend_sigma(x: Tensor, scores: Tensor) -> float:
    """Exponent of the trend by linear regression of ``ln a`` on x, the closed form (spec: start of the full fit).

    Args:
        x: positions ``[n]``.
        scores: mean scores ``[n]``, > 0.

    Raises:
        ValueError: fewer than two different positions.
    """
    x, y = x.double(), scores.double().clamp(min=1e-12).log()
    spread = float(((x - x.mean()) ** 2).sum())
    if x.numel() < 2 or math.isclose(spread, 0.0, abs_tol=1e-18):
        raise ValueError("a positional trend needs at least two different positions")
    return float(((x - x.mean()) * (y - y.mean())).sum() / spread)
