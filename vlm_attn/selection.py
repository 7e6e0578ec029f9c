"""The kit's parts applied to the images of a token map: per-image budgets, positions and choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .kit.budgets import budget, floor_share, proportional
from .kit.calibrators import grid_position, grid_trend_weights, trend_weights
from .kit.calibrators import mean_map as divide
from .kit.selectors import by_rank
from .sites import PruneView
from .tokens import TokenMap

Keep = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]
"""Visual tokens to keep per image: a count (int) or a share of the image's tokens (float in (0, 1])."""
Auto = Annotated[str, Field(pattern=r"^auto(:(0?\.\d+|\d+(\.\d+)?ms))?$")]
"""``"auto"``, ``"auto:0.95"``: as few tokens per image as hold 99 % (95 %) of the score's mass. ``"auto:30ms"``: as
many as let the decoder's prefill of the sample take 30 ms, by times measured when the method is attached [ours]."""
Per = Literal["image", "view"]
"""What a budget is for: a whole image, or each of its views (tile, video frame) in proportion to its tokens."""


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
    """Normalised raster position ``x = i / (N - 1)`` in [0, 1] of the slots of one image, fp32 ``[n]``.

    It starts anew in every view (whole picture, canvas of tiles, video frame); row ends and separators do not count.
    """
    view = tokens.layouts[row][int(tokens.img_id[row, slots[0]])].view
    rank, last = torch.zeros(len(view)), torch.ones(len(view))
    for number in view.unique().tolist():
        mine = view == number
        count = int(mine.sum())
        rank[mine], last[mine] = torch.arange(count).float(), float(max(count - 1, 1))
    return (rank / last).to(slots.device)[tokens.order[row, slots]]


def place(tokens: TokenMap, row: int, slots: Tensor) -> Tensor:
    """(y, x) in [0, 1] of the slots of one image in their views, fp32 ``[n, 2]``.

    Raises:
        ValueError: the tokens of this image form no grid.
    """
    views = tokens.layouts[row][int(tokens.img_id[row, slots[0]])].views
    if not views:
        raise ValueError("this model's visual tokens form no grid of rows and columns; use calibrate=['exp_trend']")
    grids = torch.tensor(views, device=slots.device)
    return grid_position(tokens.cell[row, slots], grids[tokens.frame[row, slots]])


def select(
    tokens: TokenMap,
    keep: int | float | str | list[float] | Callable[[int], int],
    choose: Callable[[int, Tensor, int], Tensor],
    visible: Tensor | None = None,
    scores: Tensor | None = None,
    per: Per = "image",
) -> Tensor:
    """Applies a selector to each image, or to each of its views.

    Args:
        keep: budget per image, relative to the tokens the image had in the prompt, a share per sample (rounded down),
            or a function of their number.
        choose: ``(row, slots [n], k) -> positions [k'] into slots``; with ``visible`` it sees visible slots only.
        visible: bool ``[B, N]``; tokens that show only padding are never chosen, so an image may keep fewer than k.
        scores: fp32 ``[B, N]``, for ``keep="auto"``.
        per: ``"view"`` splits an image's budget over its views in proportion to their tokens, at least one each.

    Returns:
        bool ``[B, N]`` of kept visual tokens.
    """
    out = torch.zeros_like(tokens.vis)
    for row, slots, total in images(tokens):
        if visible is not None:
            slots = slots[visible[row, slots]]
        mass = None if scores is None else scores[row, slots]
        if isinstance(keep, list):
            whole = floor_share(total, keep[row] + 1e-9)
        else:
            whole = keep(total) if callable(keep) else budget(keep, total, mass)
        whole = min(whole, slots.numel())
        for part, k in views(tokens, row, slots, whole) if per == "view" else [(slots, whole)]:
            if k:
                out[row, part[choose(row, part, k)]] = True
    return out


def affordable(view: PruneView, keep: Keep | str) -> Keep | str | list[float]:
    """A budget in time as the share of its visual tokens that each sample can afford; other budgets as they are.

    A sample is reckoned as if it were alone. One token per image stays even if that is too much.
    """
    if not isinstance(keep, str) or not keep.endswith("ms"):
        return keep
    if view.latency is None:
        raise ValueError(f"keep='{keep}' needs the times that are measured when the method is attached")
    target, tokens = float(keep.partition(":")[2][:-2]) / 1000, view.tokens
    free = (tokens.vis & ~protected(tokens)).sum(1).tolist()
    return [
        view.latency.budget(target, whole - visual, visual, view.site.layer) / max(visual, 1)
        for whole, visual in zip(tokens.valid.sum(1).tolist(), free, strict=True)
    ]


def views(tokens: TokenMap, row: int, slots: Tensor, k: int) -> list[tuple[Tensor, int]]:
    """The slots of each view of one image, with its part of ``k`` tokens in proportion to them, at least one each."""
    frames = tokens.frame[row, slots]
    parts = [slots[frames == view] for view in frames.unique().tolist()]
    if not parts:
        return []
    return list(zip(parts, proportional(max(k, len(parts)), [p.numel() for p in parts]), strict=True))


def top_k(scores: Tensor) -> Callable[[int, Tensor, int], Tensor]:
    """Selector: the k highest of fp32 ``scores [B, N]``; the earlier token wins a tie."""
    return lambda row, slots, k: by_rank(scores[row, slots])[:k]


def weighted(
    tokens: TokenMap,
    scores: Tensor,
    weights: Callable[[Tensor], Tensor],
    where: Callable[[TokenMap, int, Tensor], Tensor] = position,
) -> Tensor:
    """Scores times ``weights(x)``: ``x_i = i / (N - 1)`` per view, or what else ``where`` says of the slots."""
    out = scores.clone()
    for row, slots, _ in images(tokens):
        out[row, slots] = scores[row, slots] * weights(where(tokens, row, slots))
    return out


def exp_trend(tokens: TokenMap, scores: Tensor, sigma: float) -> Tensor:
    """Divides scores by their positional trend: ``a_i * exp(-sigma * x_i)``, ``x_i = i / (N - 1)`` per view."""
    return weighted(tokens, scores, lambda x: trend_weights(x, sigma))


def grid_trend(tokens: TokenMap, scores: Tensor, sigma: tuple[float, float]) -> Tensor:
    """Divides scores by a trend of rows and of columns: ``a_i * exp(-sigma_row y_i - sigma_column x_i)`` [ours]."""
    return weighted(tokens, scores, lambda places: grid_trend_weights(places, *sigma), place)


def mean_map(tokens: TokenMap, scores: Tensor, mean: Sequence[float], name: str) -> Tensor:
    """Divides scores by their offline mean at the same place: ``a_i / (mean_i + 1e-7)`` per image.

    Raises:
        ValueError: an image has another number of tokens than the mean was taken over.
    """
    out = scores.clone()
    average = torch.tensor(mean, dtype=torch.float32, device=scores.device)
    for row, slots, _ in images(tokens):
        total = len(tokens.layouts[row][int(tokens.img_id[row, slots[0]])])
        if total != len(mean):
            raise ValueError(
                f"{name}: the mean map was measured on images of {len(mean)} visual tokens, this one has {total}; use "
                "calibrate=['exp_trend'], or calibrate again at this size"
            )
        out[row, slots] = divide(scores[row, slots], average[tokens.order[row, slots]])
    return out


__all__ = [
    "Auto",
    "Keep",
    "Per",
    "affordable",
    "budget",
    "exp_trend",
    "grid_trend",
    "images",
    "mean_map",
    "place",
    "position",
    "protected",
    "select",
    "top_k",
    "views",
    "weighted",
]
