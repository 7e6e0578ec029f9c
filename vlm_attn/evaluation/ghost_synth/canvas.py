"""A picture under construction, with the list of what was drawn on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["SIDE", "Canvas", "smear"]

SIDE = 448
"""Width and height of every picture, in pixels."""
READABLE = 0.05
"""A letter whose gradient energy fell below this share of the sharp one cannot be read."""

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
Primitive = tuple[Any, ...]
"""``(shape, coordinates in 0..1 of the box, colour, *angles)``; ellipse, rectangle, line, polygon or pieslice."""


@lru_cache(maxsize=16)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


@dataclass
class Canvas:
    """One picture; ``drawn`` names everything on it, which is what checks look at."""

    rng: np.random.Generator
    background: Colour
    drawn: list[str] = field(default_factory=list)
    image: Image.Image = field(init=False)

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (SIDE, SIDE), self.background)

    @property
    def pen(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image)

    def put(self, name: str, primitives: Sequence[Primitive], box: Box) -> None:
        """Draw primitives into a box (pixels) under one name."""
        left, top, right, bottom = box
        scale = ((right - left), (bottom - top))
        pen = self.pen
        for shape, points, colour, *angles in primitives:
            spots = [(left + x * scale[0], top + y * scale[1]) for x, y in zip(points[::2], points[1::2], strict=True)]
            if shape == "line":
                pen.line(spots, fill=colour, width=max(3, round(scale[0] / 14)))
            elif shape == "pieslice":
                pen.pieslice([*spots[0], *spots[1]], angles[0], angles[1], fill=colour)
            else:
                getattr(pen, shape)(spots, fill=colour)
        self.drawn.append(name)

    def text(self, text: str, box: Box, colour: Colour) -> None:
        """Text centred in a box (pixels), as large as fits."""
        width, height = box[2] - box[0], box[3] - box[1]
        size = int(height)
        while size > 8 and _font(size).getlength(text) > width:
            size -= 2
        self.pen.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), text, colour, _font(size), anchor="mm")
        self.drawn.append(f"text:{text}")

    def smear_box(self, box: Box, letters: int) -> None:
        """Blur a box until none of its letters can be read; the text in it leaves the list of what is drawn."""
        left, top, right, bottom = map(round, box)
        sharp = np.asarray(self.image.crop((left, top, right, bottom)), dtype=np.float64)
        self.image.paste(Image.fromarray(smear(sharp, letters).astype(np.uint8)), (left, top))
        self.drawn = [name for name in self.drawn if not name.startswith("text:")]
        self.drawn.append("illegible text")


def smear(sharp: NDArray[np.float64], letters: int) -> NDArray[np.float64]:
    """Motion blur of a text box (height, width, 3), along and across, growing from 1.5 letter heights until every
    letter's gradient energy is below `READABLE` of the sharp one."""
    before = _energy(sharp, letters)
    kernel = max(3, round(1.5 * sharp.shape[0]))
    blurred = sharp
    while True:
        for axis in (1, 0):
            blurred = _moving_mean(blurred, min(kernel, 4 * sharp.shape[axis]), axis)
        if (_energy(blurred, letters) <= READABLE * before).all():
            return blurred
        kernel *= 2


def _moving_mean(values: NDArray[np.float64], width: int, axis: int) -> NDArray[np.float64]:
    """Mean over a window of ``width``, the border repeated."""
    pad = [(0, 0)] * values.ndim
    pad[axis] = (width // 2 + 1, width - width // 2 - 1)
    sums = np.cumsum(np.pad(values, pad, mode="edge"), axis=axis)
    high = np.take(sums, range(width, width + values.shape[axis]), axis=axis)
    return (high - np.take(sums, range(values.shape[axis]), axis=axis)) / width


def _energy(values: NDArray[np.float64], letters: int) -> NDArray[np.float64]:
    """Squared differences of neighbouring pixels, summed per letter cell."""
    grey = values.mean(-1)
    squares = np.zeros_like(grey)
    squares[:, 1:] += np.diff(grey, axis=1) ** 2
    squares[1:] += np.diff(grey, axis=0) ** 2
    cells = np.array_split(squares, max(1, letters), axis=1)
    return np.array([cell.sum() for cell in cells])
