"""Which visual tokens an answer kept, small enough to lie beside it, and drawn on its picture in the report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from vlm_attn.errors import UnsupportedError

__all__ = ["drawing", "masks"]

EDGE = 48  # the longer side of a mask: no published grid of one picture has more cells, tiles are coarsened
DROPPED = "rgb(24,26,36)"


def masks(vlm: Any, pictures: Sequence[Sequence[Any]]) -> list[dict[str, list[str]]]:
    """Per sample of the batch that ran last: ``kept_mask``, rows of ``1`` (kept) and ``0`` over the picture; empty
    where nothing was pruned, the sample shows no single picture, or the model has no grid.

    Args:
        pictures: the PIL images of every sample.
    """
    stages = {method.stage for method in getattr(vlm, "methods", ())}
    if "prune" not in stages or "refine" in stages:  # a refined picture is another one
        return [{} for _ in pictures]
    return [_mask(vlm, shown, row) for row, shown in enumerate(pictures)]


def _mask(vlm: Any, pictures: Sequence[Any], row: int) -> dict[str, list[str]]:
    if len(pictures) != 1:
        return {}
    try:
        kept = vlm.kept_map(pictures[0], row)
    except UnsupportedError:
        return {}
    height, width = kept.shape
    size = [max(1, round(EDGE * side / max(width, height))) for side in (width, height)]
    small = Image.fromarray(kept).resize((size[0], size[1]), Image.Resampling.BOX)
    return {"kept_mask": ["".join("1" if cell >= 0.5 else "0" for cell in line) for line in np.asarray(small)]}


def drawing(mask: Sequence[str], picture: str, size: tuple[int, int]) -> str:
    """The picture with what was dropped dark, as SVG.

    Args:
        mask: rows of a ``kept_mask``.
        picture: id of an SVG image of ``size`` (width, height) on the same page.
    """
    width, height = size
    step_x, step_y = width / max(map(len, mask)), height / len(mask)
    path = "".join(
        f"M{start * step_x:.1f} {y * step_y:.1f}h{length * step_x:.1f}v{step_y:.1f}h{-length * step_x:.1f}z"
        for y, line in enumerate(mask)
        for start, length in _runs(line)
    )
    return (
        f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='kept visual tokens'>"
        f"<use href='#{escape(picture)}'/>"
        f"<path d='{path}' fill='{DROPPED}' fill-opacity='.82' shape-rendering='crispEdges'/></svg>"
    )


def _runs(line: str) -> list[tuple[int, int]]:
    """Start and length of the runs of dropped cells."""
    runs, start = [], 0
    for piece in line.split("1"):
        if piece:
            runs.append((start, len(piece)))
        start += len(piece) + 1
    return runs
