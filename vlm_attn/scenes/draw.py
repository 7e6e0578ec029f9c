"""Drawings of the picture world: one small function per object kind, in unit coordinates.

Every function receives a `Pen` on a transparent square (x to the right, y downwards, both from 0 to 1) and draws one
object in the pen's main colour. `sprite` draws it four times too large, shrinks it and keeps it in a cache, which
is what makes pictures cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 222, 40),
    "green": (44, 150, 60),
    "blue": (40, 90, 215),
    "purple": (135, 50, 170),
    "black": (38, 38, 42),
    "white": (250, 250, 250),
}
"""The eight object colours by name, RGB 0-255."""

SUPERSAMPLING = 4
"""Sprites are drawn this many times larger and then averaged down."""


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return `a` moved towards `b` by `share` (0 to 1)."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


class Pen:
    """A drawing surface in unit coordinates with the shades of one object colour.

    Args:
        size: edge of the square surface in pixels.
        colour: main colour, RGB 0-255.
    """

    def __init__(self, size: int, colour: Colour) -> None:
        self.size = size
        self.image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)
        self.main = colour
        bright = sum(colour) > 150
        self.edge: Colour = (28, 28, 28) if bright else (0, 0, 0)
        self.dark: Colour = mix(colour, (0, 0, 0), 0.45) if bright else (120, 120, 125)
        self.light: Colour = mix(colour, (255, 255, 255), 0.55) if sum(colour) < 700 else (205, 205, 212)
        self.width = max(1, round(size * 0.035))

    def _points(self, points: Sequence[Point]) -> list[Point]:
        return [(x * (self.size - 1), y * (self.size - 1)) for x, y in points]

    def poly(self, *points: Point, fill: Colour | None = None) -> None:
        """Filled polygon with outline through unit points."""
        self._draw.polygon(self._points(points), fill=fill or self.main, outline=self.edge, width=self.width)

    def rect(self, x0: float, y0: float, x1: float, y1: float, fill: Colour | None = None, radius: float = 0) -> None:
        """Filled rectangle with outline; `radius` rounds the corners (unit length)."""
        corner = radius * self.size
        box = [*self._points([(x0, y0)])[0], *self._points([(x1, y1)])[0]]
        self._draw.rounded_rectangle(box, corner, fill=fill or self.main, outline=self.edge, width=self.width)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour | None = None) -> None:
        """Filled ellipse with outline around the centre (x, y) with half axes rx, ry."""
        box = [*self._points([(x - rx, y - ry)])[0], *self._points([(x + rx, y + ry)])[0]]
        self._draw.ellipse(box, fill=fill or self.main, outline=self.edge, width=self.width)

    def ring(self, x: float, y: float, r: float, width: float, fill: Colour | None = None) -> None:
        """Circle line of the given width around (x, y)."""
        box = [*self._points([(x - r, y - r)])[0], *self._points([(x + r, y + r)])[0]]
        self._draw.ellipse(box, outline=self.edge, width=round((width + 0.03) * self.size))
        inner = [box[0] + self.width, box[1] + self.width, box[2] - self.width, box[3] - self.width]
        self._draw.ellipse(inner, outline=fill or self.main, width=max(1, round((width - 0.03) * self.size)))

    def arc(self, x: float, y: float, r: float, start: float, end: float, width: float) -> None:
        """Circle arc in the main colour from `start` to `end` degrees (0 is east, clockwise)."""
        box = [*self._points([(x - r, y - r)])[0], *self._points([(x + r, y + r)])[0]]
        self._draw.arc(box, start, end, fill=self.main, width=round(width * self.size))

    def pie(self, x: float, y: float, r: float, start: float, end: float, fill: Colour | None = None) -> None:
        """Filled circle sector from `start` to `end` degrees."""
        box = [*self._points([(x - r, y - r)])[0], *self._points([(x + r, y + r)])[0]]
        self._draw.pieslice(box, start, end, fill=fill or self.main, outline=self.edge, width=self.width)

    def line(self, *points: Point, width: float = 0.07, fill: Colour | None = None) -> None:
        """Line through unit points, `width` in unit length."""
        self._draw.line(
            self._points(points), fill=fill or self.main, width=max(1, round(width * self.size)), joint="curve"
        )

    def outlined(self, *points: Point, width: float = 0.1) -> None:
        """Line in the main colour with a dark border."""
        self.line(*points, width=width + 0.05, fill=self.edge)
        self.line(*points, width=width)


def _tree(p: Pen) -> None:
    p.rect(0.42, 0.6, 0.58, 0.99, fill=(110, 72, 40))
    for x, y in ((0.28, 0.48), (0.72, 0.48), (0.5, 0.26)):
        p.oval(x, y, 0.26, 0.25)
    p.oval(0.5, 0.44, 0.2, 0.16)


def _dog(p: Pen) -> None:
    p.outlined((0.14, 0.5), (0.03, 0.28), width=0.07)
    for x in (0.16, 0.3, 0.56, 0.69):
        p.rect(x, 0.62, x + 0.11, 0.97)
    p.rect(0.1, 0.42, 0.8, 0.72, radius=0.12)
    p.oval(0.76, 0.34, 0.19, 0.19)
    p.rect(0.82, 0.34, 0.99, 0.5, radius=0.06)
    p.poly((0.6, 0.18), (0.72, 0.16), (0.68, 0.46), (0.58, 0.4), fill=p.dark)
    p.oval(0.96, 0.38, 0.03, 0.03, fill=p.edge)


def _bench(p: Pen) -> None:
    for y in (0.2, 0.36):
        p.rect(0.03, y, 0.97, y + 0.12)
    p.rect(0.0, 0.56, 0.99, 0.7)
    for x in (0.1, 0.78):
        p.rect(x, 0.7, x + 0.12, 0.98, fill=p.dark)
        p.rect(x + 0.02, 0.46, x + 0.09, 0.57, fill=p.dark)


def _kite(p: Pen) -> None:
    p.line((0.5, 0.62), (0.38, 0.75), (0.56, 0.86), (0.42, 0.99), width=0.05, fill=p.edge)
    p.poly((0.5, 0.0), (0.88, 0.3), (0.5, 0.72), (0.12, 0.3))
    p.poly((0.5, 0.0), (0.88, 0.3), (0.5, 0.3), fill=p.light)
    p.poly((0.12, 0.3), (0.5, 0.3), (0.5, 0.72), fill=p.light)
    p.poly((0.4, 0.74), (0.6, 0.8), (0.4, 0.9), (0.6, 0.72))


def _flower(p: Pen) -> None:
    p.line((0.5, 0.4), (0.5, 0.99), width=0.08, fill=(30, 110, 40))
    p.poly((0.5, 0.85), (0.75, 0.66), (0.72, 0.82), fill=(50, 150, 60))
    for i in range(6):
        a = math.pi * i / 3
        p.oval(0.5 + 0.23 * math.cos(a), 0.32 + 0.23 * math.sin(a), 0.14, 0.14)
    p.oval(0.5, 0.32, 0.12, 0.12, fill=(240, 200, 90) if p.main[2] > 60 or p.main[0] < 200 else (120, 70, 30))


def _bird(p: Pen) -> None:
    p.poly((0.0, 0.42), (0.3, 0.5), (0.26, 0.72), (0.02, 0.66))
    p.line((0.45, 0.74), (0.45, 0.98), width=0.05, fill=p.edge)
    p.line((0.58, 0.74), (0.58, 0.98), width=0.05, fill=p.edge)
    p.oval(0.48, 0.56, 0.3, 0.24)
    p.oval(0.74, 0.32, 0.17, 0.17)
    p.poly((0.88, 0.26), (1.0, 0.34), (0.88, 0.4), fill=(245, 170, 30))
    p.poly((0.3, 0.46), (0.62, 0.5), (0.36, 0.74), fill=p.dark)
    p.oval(0.78, 0.29, 0.03, 0.03, fill=(255, 255, 255) if sum(p.main) < 200 else p.edge)


def _cup(p: Pen) -> None:
    p.ring(0.74, 0.5, 0.22, 0.1)
    p.poly((0.08, 0.24), (0.76, 0.24), (0.68, 0.9), (0.16, 0.9))
    p.oval(0.42, 0.24, 0.34, 0.09, fill=p.dark)


def _bottle(p: Pen) -> None:
    p.rect(0.4, 0.0, 0.6, 0.1, fill=(150, 110, 70))
    p.poly((0.42, 0.1), (0.58, 0.1), (0.58, 0.3), (0.72, 0.46), (0.72, 0.99), (0.28, 0.99), (0.28, 0.46), (0.42, 0.3))
    p.rect(0.28, 0.58, 0.72, 0.82, fill=p.light)


def _apple(p: Pen) -> None:
    p.line((0.5, 0.32), (0.56, 0.04), width=0.08, fill=(100, 62, 34))
    p.oval(0.35, 0.6, 0.29, 0.34)
    p.oval(0.65, 0.6, 0.29, 0.34)
    p.oval(0.5, 0.62, 0.26, 0.3, fill=p.main)
    p.oval(0.5, 0.6, 0.28, 0.26)
    p._draw.ellipse([*p._points([(0.22, 0.32)])[0], *p._points([(0.78, 0.88)])[0]], fill=p.main)
    p.poly((0.58, 0.2), (0.78, 0.04), (0.86, 0.18), fill=(60, 160, 60))
    p.oval(0.3, 0.46, 0.05, 0.08, fill=p.light)


def _pan(p: Pen) -> None:
    p.outlined((0.62, 0.38), (0.95, 0.05), width=0.11)
    p.oval(0.4, 0.6, 0.39, 0.38)
    p.oval(0.4, 0.6, 0.27, 0.26, fill=p.dark)


def _fork(p: Pen) -> None:
    for x in (0.26, 0.42, 0.58, 0.74):
        p.outlined((x, 0.02), (x, 0.36), width=0.06)
    p.rect(0.2, 0.32, 0.8, 0.5, radius=0.08)
    p.rect(0.41, 0.46, 0.59, 0.99, radius=0.06)


def _cake(p: Pen) -> None:
    p.rect(0.47, 0.12, 0.54, 0.34, fill=(250, 245, 220))
    p.oval(0.505, 0.07, 0.05, 0.07, fill=(255, 190, 40))
    p.rect(0.2, 0.32, 0.8, 0.62)
    p.rect(0.05, 0.6, 0.95, 0.96)
    p.rect(0.05, 0.6, 0.95, 0.7, fill=p.light)
    p.rect(0.2, 0.32, 0.8, 0.42, fill=p.light)


def _boat(p: Pen) -> None:
    p.line((0.48, 0.05), (0.48, 0.72), width=0.07, fill=(95, 60, 30))
    p.poly((0.54, 0.04), (0.95, 0.58), (0.54, 0.58), fill=(255, 255, 250) if sum(p.main) < 700 else (190, 200, 215))
    p.poly((0.42, 0.16), (0.42, 0.58), (0.12, 0.58), fill=p.light)
    p.poly((0.0, 0.66), (1.0, 0.66), (0.82, 0.96), (0.18, 0.96))


def _fish(p: Pen) -> None:
    p.poly((0.26, 0.5), (0.0, 0.2), (0.06, 0.5), (0.0, 0.8))
    p.poly((0.45, 0.3), (0.6, 0.1), (0.72, 0.32), fill=p.dark)
    p.oval(0.6, 0.5, 0.38, 0.26)
    p.oval(0.82, 0.44, 0.06, 0.06, fill=(255, 255, 255))
    p.oval(0.83, 0.44, 0.025, 0.025, fill=(0, 0, 0))
    p.line((0.62, 0.32), (0.56, 0.5), (0.62, 0.68), width=0.05, fill=p.dark)


def _anchor(p: Pen) -> None:
    p.ring(0.5, 0.14, 0.13, 0.09)
    p.outlined((0.26, 0.36), (0.74, 0.36), width=0.1)
    p.pie(0.5, 0.56, 0.42, 10, 170, fill=p.edge)
    p.pie(0.5, 0.56, 0.385, 12, 168)
    p._draw.ellipse([*p._points([(0.27, 0.3)])[0], *p._points([(0.73, 0.82)])[0]], fill=(0, 0, 0, 0))
    p.outlined((0.26, 0.36), (0.74, 0.36), width=0.1)
    p.outlined((0.5, 0.24), (0.5, 0.96), width=0.12)
    p.poly((0.0, 0.74), (0.12, 0.5), (0.26, 0.72))
    p.poly((1.0, 0.74), (0.88, 0.5), (0.74, 0.72))


def _crab(p: Pen) -> None:
    for side in (-1, 1):
        for dx, dy in ((0.4, 0.62), (0.44, 0.76), (0.36, 0.92)):
            p.line((0.5 + side * 0.2, 0.68), (0.5 + side * dx, dy), width=0.08, fill=p.edge)
        p.line((0.5 + side * 0.22, 0.56), (0.5 + side * 0.38, 0.3), width=0.12, fill=p.edge)
        start = 300 if side > 0 else 290
        p.pie(0.5 + side * 0.35, 0.2, 0.19, start, start + 310)
        p.line((0.5 + side * 0.1, 0.5), (0.5 + side * 0.1, 0.36), width=0.05, fill=p.edge)
        p.oval(0.5 + side * 0.1, 0.34, 0.055, 0.055, fill=(255, 255, 255))
    p.oval(0.5, 0.68, 0.3, 0.22)


def _umbrella(p: Pen) -> None:
    p.line((0.5, 0.05), (0.5, 0.9), width=0.07, fill=(90, 60, 35))
    p.line((0.5, 0.88), (0.58, 0.97), (0.68, 0.88), width=0.07, fill=(90, 60, 35))
    p.pie(0.5, 0.52, 0.48, 180, 360)
    p.poly((0.34, 0.52), (0.42, 0.1), (0.5, 0.04), (0.58, 0.1), (0.66, 0.52), fill=p.light)


def _ball(p: Pen) -> None:
    p.oval(0.5, 0.5, 0.46, 0.46)
    p.poly((0.5, 0.04), (0.68, 0.1), (0.58, 0.5), (0.68, 0.9), (0.5, 0.96), (0.4, 0.5), fill=p.light)
    p.oval(0.5, 0.5, 0.09, 0.09, fill=p.dark)


def _car(p: Pen) -> None:
    p.poly((0.2, 0.48), (0.34, 0.22), (0.7, 0.22), (0.84, 0.48))
    p.poly((0.3, 0.46), (0.38, 0.29), (0.5, 0.29), (0.5, 0.46), fill=(190, 225, 245))
    p.poly((0.55, 0.46), (0.55, 0.29), (0.66, 0.29), (0.74, 0.46), fill=(190, 225, 245))
    p.rect(0.01, 0.46, 0.99, 0.72, radius=0.08)
    for x in (0.25, 0.76):
        p.oval(x, 0.74, 0.14, 0.14, fill=(40, 40, 40))
        p.oval(x, 0.74, 0.06, 0.06, fill=(190, 190, 190))


def _bus(p: Pen) -> None:
    p.rect(0.02, 0.12, 0.98, 0.84, radius=0.08)
    for x in (0.08, 0.31, 0.54, 0.77):
        p.rect(x, 0.22, x + 0.16, 0.46, fill=(190, 225, 245))
    p.rect(0.02, 0.54, 0.98, 0.62, fill=p.light)
    for x in (0.24, 0.76):
        p.oval(x, 0.85, 0.12, 0.12, fill=(40, 40, 40))
        p.oval(x, 0.85, 0.05, 0.05, fill=(190, 190, 190))


def _house(p: Pen) -> None:
    p.rect(0.14, 0.44, 0.86, 0.98)
    p.poly((0.0, 0.48), (0.5, 0.02), (1.0, 0.48), fill=p.dark)
    p.rect(0.56, 0.64, 0.76, 0.98, fill=(110, 72, 40))
    p.rect(0.24, 0.58, 0.46, 0.78, fill=(190, 225, 245))


def _bicycle(p: Pen) -> None:
    p.ring(0.23, 0.68, 0.23, 0.09, fill=p.main)
    p.ring(0.77, 0.68, 0.23, 0.09, fill=p.main)
    p.outlined((0.23, 0.68), (0.38, 0.36), (0.68, 0.36), (0.5, 0.68), (0.23, 0.68), width=0.05)
    p.outlined((0.77, 0.68), (0.66, 0.24), (0.82, 0.2), width=0.05)
    p.rect(0.28, 0.24, 0.48, 0.34, fill=p.edge)


def _cone(p: Pen) -> None:
    p.rect(0.04, 0.84, 0.96, 0.98, fill=p.dark)
    p.poly((0.42, 0.04), (0.58, 0.04), (0.84, 0.85), (0.16, 0.85))
    p.poly((0.36, 0.26), (0.64, 0.26), (0.7, 0.44), (0.3, 0.44), fill=p.light)
    p.poly((0.25, 0.6), (0.75, 0.6), (0.8, 0.74), (0.2, 0.74), fill=p.light)


def _flag(p: Pen) -> None:
    p.rect(0.08, 0.02, 0.18, 0.99, fill=(120, 90, 60))
    p.poly((0.18, 0.06), (0.4, 0.12), (0.66, 0.04), (0.97, 0.12), (0.97, 0.58), (0.66, 0.5), (0.4, 0.58), (0.18, 0.52))


def _chair(p: Pen) -> None:
    p.rect(0.14, 0.02, 0.3, 0.98)
    p.rect(0.2, 0.08, 0.34, 0.5, fill=p.light)
    p.rect(0.7, 0.6, 0.84, 0.98)
    p.rect(0.14, 0.5, 0.88, 0.66)


def _clock(p: Pen) -> None:
    p.oval(0.5, 0.5, 0.48, 0.48)
    p.oval(0.5, 0.5, 0.34, 0.34, fill=(255, 255, 245))
    p.line((0.5, 0.5), (0.5, 0.24), width=0.07, fill=(0, 0, 0))
    p.line((0.5, 0.5), (0.7, 0.58), width=0.07, fill=(0, 0, 0))


def _bed(p: Pen) -> None:
    p.rect(0.0, 0.14, 0.1, 0.92, fill=(120, 80, 45))
    p.rect(0.9, 0.4, 1.0, 0.92, fill=(120, 80, 45))
    p.rect(0.1, 0.62, 0.9, 0.8, fill=(245, 240, 230))
    p.rect(0.12, 0.44, 0.36, 0.62, fill=(255, 255, 255), radius=0.05)
    p.poly((0.36, 0.46), (0.9, 0.46), (0.9, 0.78), (0.36, 0.78))


def _book(p: Pen) -> None:
    p.poly((0.0, 0.22), (0.5, 0.32), (1.0, 0.22), (1.0, 0.86), (0.5, 0.96), (0.0, 0.86))
    page = (255, 252, 238) if sum(p.main) < 700 else (225, 215, 190)
    p.poly((0.08, 0.14), (0.5, 0.26), (0.5, 0.86), (0.08, 0.76), fill=page)
    p.poly((0.92, 0.14), (0.5, 0.26), (0.5, 0.86), (0.92, 0.76), fill=page)
    for y in (0.36, 0.5, 0.64):
        p.line((0.16, y - 0.04), (0.42, y + 0.03), width=0.04, fill=p.main)
        p.line((0.84, y - 0.04), (0.58, y + 0.03), width=0.04, fill=p.main)


def _key(p: Pen) -> None:
    p.rect(0.4, 0.43, 0.99, 0.57)
    p.rect(0.72, 0.55, 0.82, 0.8)
    p.rect(0.88, 0.55, 0.98, 0.74)
    p.ring(0.25, 0.5, 0.25, 0.14)


def _lamp(p: Pen) -> None:
    p.rect(0.45, 0.48, 0.55, 0.9, fill=(120, 90, 60))
    p.rect(0.24, 0.88, 0.76, 0.98, fill=(120, 90, 60))
    p.poly((0.3, 0.04), (0.7, 0.04), (0.94, 0.52), (0.06, 0.52))
    p.oval(0.5, 0.56, 0.08, 0.06, fill=(255, 240, 150))


DRAWINGS: dict[str, Callable[[Pen], None]] = {
    name.removeprefix("_"): function
    for name, function in list(globals().items())
    if name.startswith("_") and callable(function) and getattr(function, "__module__", "") == __name__
}
"""Drawing function by object kind."""


@lru_cache(maxsize=32768)
def sprite(kind: str, colour: str, size: int, mirrored: bool) -> Image.Image:
    """Return the drawing of one object as a premultiplied-free RGBA picture of `size` x `size` pixels."""
    if kind not in DRAWINGS or colour not in COLOURS:
        raise ValueError(f"no drawing for {colour!r} {kind!r}; kinds: {sorted(DRAWINGS)}, colours: {sorted(COLOURS)}")
    pen = Pen(size * SUPERSAMPLING, COLOURS[colour])
    DRAWINGS[kind](pen)
    # resize() weights colours by alpha for RGBA, so edges keep the object's colour
    image = pen.image.resize((size, size), Image.Resampling.BOX)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


@lru_cache(maxsize=32768)
def sprite_box(kind: str, colour: str, size: int, mirrored: bool) -> tuple[int, int, int, int]:
    """Return the tight box (x0, y0, x1, y1), in pixels, of what is visible of a sprite."""
    alpha = sprite(kind, colour, size, mirrored).getchannel("A")
    visible = ImageChops.invert(alpha.point(lambda a: 255 if a < 64 else 0))
    box = visible.getbbox()
    if box is None:
        raise ValueError(f"the drawing of {kind!r} at {size} px is empty; ask for a larger picture")
    return box
