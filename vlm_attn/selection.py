"""The kit's parts applied to the images of a token map: per-image budgets, positions and choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .kit.budgets import budget
from .kit.calibrators import trend_weights
from .kit.selectors import by_rank
from .tokens import TokenMap

Keep = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]
"""Visual tokens to keep per image: a count (int) or a share of the image's tokens (float in (0, 1])."""


def protected(tokens: TokenMap) -> Tensor:
    """bool ``[B, N]``: visual tokens that show no pixels beside others that do (row ends, separators, class tokens).

    They frame the picture and are neither scored nor dropped. Tokens of a picture without any grid (queries) all count
    as picture.
    """
    out = torch.zeros_like(tokens.vis)
    for row, layouts in enumerate(tokens.layouts):
        for image, layout in enumerate(layouts):
            if layout.views:
                out[row] |= (tokens.img_id[row] == image) & (tokens.frame[row] < 0)
    return out & tokens.vis


def images(tokens: TokenMap) -> Iterator[tuple[int, Tensor, int]]:
    """(row, slots ``[n]`` of one image that are left, number of tokens the image had in the prompt).

    Protected tokens are in neither.
    """
    free = tokens.vis & ~protected(tokens)
    for row in range(tokens.batch):
        for image in range(tokens.images(row)):
            slots = (free[row] & (tokens.img_id[row] == image)).nonzero()[:, 0]
            if slots.numel():
                layout = tokens.layouts[row][image]
                yield row, slots, int((layout.view >= 0).sum()) if layout.views else len(layout)


def position(tokens: TokenMap, row: int, slots: Tensor) -> Tensor:
    """Normalised raster position ``x = i / (N - 1)`` in [0, 1] of the slots of one image, fp32 ``[n]``."""
    total = len(tokens.layouts[row][int(tokens.img_id[row, slots[0]])])
    return tokens.order[row, slots].float() / max(total - 1, 1)


def select(
    tokens: TokenMap,
    keep: int | float | Callable[[int], int],
    choose: Callable[[int, Tensor, int], Tensor],
    visible: Tensor | None = None,
) -> Tensor:
    """Applies a per-image selector.

    Args:
        keep: budget per image, relative to the tokens the image had in the prompt, or a function of their number.
        choose: ``(row, slots [n], k) -> positions [k'] into slots``; with ``visible`` it sees visible slots only.
        visible: bool ``[B, N]``; tokens that show only padding are never chosen, so an image may keep fewer than k.

    Returns:
        bool ``[B, N]`` of kept visual tokens.
    """
    out = torch.zeros_like(tokens.vis)
    for row, slots, total in images(tokens):
        if visible is not None:
            slots = slots[visible[row, slots]]
        k = min(keep(total) if callable(keep) else budget(keep, total), slots.numel())
        if k:
            out[row, slots[choose(row, slots, k)]] = True
    return out


def top_k(scores: Tensor) -> Callable[[int, Tensor, int], Tensor]:
    """Selector: the k highest of fp32 ``scores [B, N]``; the earlier token wins a tie."""
    return lambda row, slots, k: by_rank(scores[row, slots])[:k]


def exp_trend(tokens: TokenMap, scores: Tensor, sigma: float) -> Tensor:
    """Divides scores by their positional trend: ``a_i * exp(-sigma * x_i)``, ``x_i = i / (N - 1)`` per image."""
    out = scores.clone()
    for row, slots, _ in images(tokens):
        out[row, slots] = scores[row, slots] * trend_weights(position(tokens, row, slots), sigma)
    return out


__all__ = ["Keep", "budget", "exp_trend", "images", "position", "protected", "select", "top_k"]
