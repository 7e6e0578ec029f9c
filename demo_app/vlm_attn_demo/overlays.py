"""Pictures of what a model looked at: heatmap overlays and masks of kept visual tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

Cell = tuple[int, int]
Box = tuple[float, float, float, float]

_STOPS = ((48, 18, 59), (64, 108, 220), (40, 190, 190), (160, 252, 70), (250, 190, 40), (220, 50, 10))
"""Cold to hot, RGB."""
DROPPED = (24, 26, 36)


def shown(image: Image.Image, edge: int = 480) -> Image.Image:
    """The picture scaled so that its longer side has ``edge`` pixels, as the page shows it."""
    factor = edge / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def colours(values: np.ndarray) -> np.ndarray:
    """uint8 ``(H, W, 3)`` colours of values in 0..1."""
    stops = np.asarray(_STOPS, np.float32)
    place = np.clip(np.nan_to_num(values), 0, 1) * (len(stops) - 1)
    low = np.floor(place).astype(int).clip(max=len(stops) - 2)
    share = (place - low)[..., None]
    mixed: np.ndarray = (stops[low] * (1 - share) + stops[low + 1] * share).round().astype(np.uint8)
    return mixed


def heat_overlay(image: Image.Image, heat: np.ndarray, edge: int = 480) -> Image.Image:
    """The picture under a heatmap ``(H, W)`` in its own pixels; the hottest place is the most opaque.

    The map is stretched to 0..1 between its 2nd and 99.5th percentile, so colours compare places of one map only.
    """
    base = shown(image, edge)
    low, high = np.percentile(heat, (2, 99.5))
    unit = np.clip((heat - low) / (high - low), 0, 1) if high > low else np.zeros_like(heat)
    scaled = np.asarray(Image.fromarray(unit.astype(np.float32)).resize(base.size, Image.Resampling.BILINEAR))
    alpha = (0.15 + 0.6 * scaled)[..., None]
    grey = np.asarray(base.convert("L").convert("RGB"), np.float32)
    mixed = grey * (1 - alpha) + colours(scaled) * alpha
    return Image.fromarray(mixed.round().astype(np.uint8))


def kept_overlay(
    image: Image.Image, boxes: Mapping[Cell, Box], kept: Iterable[Sequence[int]], edge: int = 480
) -> Image.Image:
    """The picture with every dropped cell dark.

    Args:
        image: the picture that was asked about.
        boxes: (row, column) -> (x0, y0, x1, y1) of the visual tokens in pixels of ``image``.
        kept: the cells that stayed.
        edge: longer side of the result in pixels.
    """
    base = shown(image, edge)
    factor = base.width / image.width, base.height / image.height
    veil = Image.new("L", base.size, 255)
    draw = ImageDraw.Draw(veil)
    kept_set = {(int(row), int(column)) for row, column in kept}
    frames = {cell: _pixels(box, factor) for cell, box in boxes.items()}
    for cell, frame in frames.items():
        if cell in kept_set and frame[2] >= frame[0] and frame[3] >= frame[1]:
            draw.rectangle(frame, fill=0)
    dark = Image.blend(base.convert("L").convert("RGB"), Image.new("RGB", base.size, DROPPED), 0.82)
    out = Image.composite(dark, base, veil)
    lines = ImageDraw.Draw(out)
    for cell, frame in frames.items():
        if cell in kept_set:
            lines.rectangle(frame, outline=(255, 255, 255), width=1)
    return out


def _pixels(box: Box, factor: tuple[float, float]) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box
    return round(x0 * factor[0]), round(y0 * factor[1]), round(x1 * factor[0]) - 1, round(y1 * factor[1]) - 1
