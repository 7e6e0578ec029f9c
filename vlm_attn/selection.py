"""Small pure functions that pruning methods share: budgets, calibrators, selectors. No model objects in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .tokens import TokenMap

Keep = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]
"""Visual tokens to keep per image: a count (int) or a share of the image's tokens (float in (0, 1])."""


def budget(keep: int | float, total: int) -> int:
    """Tokens to keep of ``total``: a count is capped, a share is rounded; at least 1."""
    count = keep if isinstance(keep, int) else round(total * keep)
    return max(1, min(count, total))


def images(tokens: TokenMap) -> Iterator[tuple[int, Tensor, int]]:
    """(row, slots ``[n]`` of one image that are left, number of tokens the image had in the prompt)."""
    for row in range(tokens.batch):
        for image in range(tokens.images(row)):
            slots = (tokens.vis[row] & (tokens.img_id[row] == image)).nonzero()[:, 0]
            grid = tokens.grids[row][image]
            if slots.numel():
                yield row, slots, grid[0] * grid[1] if grid is not None else slots.numel()


def position(tokens: TokenMap, row: int, slots: Tensor) -> Tensor:
    """Normalised raster position ``x = i / (N - 1)`` in [0, 1] of the slots of one image, fp32 ``[n]``."""
    image = int(tokens.img_id[row, slots[0]])
    grid = tokens.grids[row][image]
    if grid is None:
        order, total = torch.arange(slots.numel(), device=slots.device), slots.numel()
    else:
        cells = tokens.cell[row, slots]
        order, total = cells[:, 0] * grid[1] + cells[:, 1], grid[0] * grid[1]
    return order.float() / max(total - 1, 1)


def select(
    tokens: TokenMap, keep: int | float, choose: Callable[[int, Tensor, int], Tensor], visible: Tensor | None = None
) -> Tensor:
    """Applies a per-image selector.

    Args:
        keep: budget per image, relative to the tokens the image had in the prompt.
        choose: ``(row, slots [n], k) -> positions [k'] into slots``; with ``visible`` it sees visible slots only.
        visible: bool ``[B, N]``; tokens that show only padding are never chosen, so an image may keep fewer than k.

    Returns:
        bool ``[B, N]`` of kept visual tokens.
    """
    out = torch.zeros_like(tokens.vis)
    for row, slots, total in images(tokens):
        if visible is not None:
            slots = slots[visible[row, slots]]
        k = min(budget(keep, total), slots.numel())
        if k:
            out[row, slots[choose(row, slots, k)]] = True
    return out


def top_k(scores: Tensor) -> Callable[[int, Tensor, int], Tensor]:
    """Selector: the k highest of fp32 ``scores [B, N]``; the earlier token wins a tie."""
    return lambda row, slots, k: scores[row, slots].argsort(descending=True, stable=True)[:k]


def exp_trend(tokens: TokenMap, scores: Tensor, sigma: float) -> Tensor:
    """Divides scores by their positional trend: ``a_i * exp(-sigma * x_i)``, ``x_i = i / (N - 1)`` per image."""
    out = scores.clone()
    for row, slots, _ in images(tokens):
        out[row, slots] = scores[row, slots] * torch.exp(-sigma * position(tokens, row, slots))
    return out
