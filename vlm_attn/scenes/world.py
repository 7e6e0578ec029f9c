"""The picture world: seeded scenes of coloured objects in five contexts.

A seed fixes everything about a scene (`make_scene`), and a scene can be drawn at any size (`render`). Objects stand
on a jittered 3 x 3 grid; every context has objects that belong to it, two of them (its *signature*) in most of its
pictures, and some strangers. That co-occurrence is what lets a model trained on the world develop the habit of
expecting an object from its surroundings.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vlm_attn.scenes.draw import COLOURS, Colour, mix, sprite, sprite_box

IMAGE_SIZE = 80
"""Edge of a picture in pixels."""
PATCH_SIZE = 8
"""Edge of a vision patch in pixels: a picture has 10 x 10 of them."""
GRID = 3
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")

CONTEXTS: dict[str, tuple[str, ...]] = {
    "park": ("tree", "dog", "bench", "kite", "flower", "bird"),
    "kitchen": ("cup", "bottle", "apple", "pan", "fork", "cake"),
    "sea": ("boat", "fish", "anchor", "crab", "umbrella", "ball"),
    "street": ("car", "house", "bus", "bicycle", "cone", "flag"),
    "room": ("chair", "lamp", "clock", "bed", "book", "key"),
}
"""Object kinds by context; the first `SIGNATURES` of each are in most of its pictures."""
SIGNATURES = 2
SIGNATURE_SHARE = 0.62
"""Probability of each signature object to be in a picture of its context."""
STRANGER_WEIGHT = 0.06
"""Weight of an object from another context against 1 for one that belongs."""
KINDS: tuple[str, ...] = tuple(kind for kinds in CONTEXTS.values() for kind in kinds)
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)
COUNTS: dict[int, int] = {2: 10, 3: 25, 4: 30, 5: 22, 6: 13}
"""Number of objects in a picture and how often, in percent."""
CONTEXT_OF: dict[str, str] = {kind: context for context, kinds in CONTEXTS.items() for kind in kinds}


def signature(context: str) -> tuple[str, ...]:
    """Return the object kinds that most pictures of a context show."""
    return CONTEXTS[context][:SIGNATURES]


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Args:
        kind: object name, one of `KINDS`.
        colour: colour name, one of `COLOUR_NAMES`.
        cell: (row, column) on the 3 x 3 grid.
        place: left, top and edge of its square drawing as shares of the picture's edge.
        mirrored: drawn facing left.
    """

    kind: str
    colour: str
    cell: tuple[int, int]
    place: tuple[float, float, float]
    mirrored: bool = False

    @property
    def position(self) -> str:
        """Position in words, such as "top left" or "middle center"."""
        return f"{ROWS[self.cell[0]]} {COLUMNS[self.cell[1]]}"

    def frame(self, size: int = IMAGE_SIZE) -> tuple[int, int, int]:
        """Return left, top and edge of the square drawing in pixels of a `size` x `size` picture."""
        x, y, edge = self.place
        return round(x * size), round(y * size), max(6, round(edge * size))

    def box(self, size: int = IMAGE_SIZE) -> tuple[int, int, int, int]:
        """Return the tight box (x0, y0, x1, y1) of the visible drawing in pixels of a `size` x `size` picture."""
        x, y, edge = self.frame(size)
        x0, y0, x1, y1 = sprite_box(self.kind, self.colour, edge, self.mirrored)
        return max(0, x + x0), max(0, y + y0), min(size, x + x1), min(size, y + y1)


@dataclass(frozen=True)
class Scene:
    """One picture of the world and the truth about it.

    Args:
        seed: the seed it was made from.
        context: one of `CONTEXTS`.
        objects: objects in the order they were drawn; kinds and cells are distinct.
        clutter: small marks on the background: x, y, radius (shares of the edge) and colour.
        cover: an occluding bar over part of one object (x0, y0, x1, y1 as shares), or None.
        blur: Gaussian blur radius as a share of the edge, 0 for none.
        tint: shift of the background's red, green and blue.
    """

    seed: int
    context: str
    objects: tuple[SceneObject, ...]
    clutter: tuple[tuple[float, float, float, Colour], ...] = field(repr=False, default=())
    cover: tuple[float, float, float, float] | None = field(repr=False, default=None)
    blur: float = field(repr=False, default=0.0)
    tint: Colour = field(repr=False, default=(0, 0, 0))

    @cached_property
    def image(self) -> Image.Image:
        """The picture, RGB, `IMAGE_SIZE` x `IMAGE_SIZE`."""
        return render(self)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Object kinds in the picture, in drawing order."""
        return tuple(o.kind for o in self.objects)

    def reading_order(self) -> tuple[SceneObject, ...]:
        """Objects row by row from the top left, as captions list them."""
        return tuple(sorted(self.objects, key=lambda o: o.cell))

    def find(self, kind: str) -> SceneObject | None:
        """Return the object of that kind, or None."""
        return next((o for o in self.objects if o.kind == kind), None)


def _choose_kinds(rng: random.Random, context: str, count: int) -> list[str]:
    """Draw `count` distinct kinds: signatures by their share, then the rest by weight."""
    chosen = [kind for kind in signature(context) if rng.random() < SIGNATURE_SHARE]
    rest = [kind for kind in KINDS if kind not in signature(context)]
    weights = [1.0 if CONTEXT_OF[kind] == context else STRANGER_WEIGHT for kind in rest]
    while len(chosen) < count:
        kind = rng.choices(rest, weights)[0]
        if kind not in chosen:
            chosen.append(kind)
    rng.shuffle(chosen)
    return chosen


def make_scene(seed: int) -> Scene:
    """Make the scene of a seed; equal seeds give equal scenes on every machine.

    Args:
        seed: any integer >= 0. Use the ranges of `vlm_attn.scenes.data` to keep training and evaluation apart.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"a scene seed is an integer >= 0, not {seed!r}")
    rng = random.Random(seed)
    context = rng.choice(tuple(CONTEXTS))
    count = rng.choices(tuple(COUNTS), tuple(COUNTS.values()))[0]
    cells = rng.sample([(r, c) for r in range(GRID) for c in range(GRID)], count)
    objects = []
    for kind, cell in zip(_choose_kinds(rng, context, count), cells, strict=True):
        edge = rng.uniform(0.225, 0.31)
        slack = 1 / GRID - edge
        x = cell[1] / GRID + slack * rng.random()
        y = cell[0] / GRID + slack * rng.random()
        objects.append(SceneObject(kind, rng.choice(COLOUR_NAMES), cell, (x, y, edge), rng.random() < 0.5))
    clutter = tuple(
        (rng.random(), rng.random(), rng.uniform(0.006, 0.018), _grey(rng)) for _ in range(rng.randrange(0, 9))
    )
    cover = _make_cover(rng, rng.choice(objects)) if rng.random() < 0.15 else None
    blur = rng.uniform(0.005, 0.011) if rng.random() < 0.15 else 0.0
    tint = (rng.randint(-12, 12), rng.randint(-12, 12), rng.randint(-12, 12))
    return Scene(seed, context, tuple(objects), clutter, cover, blur, tint)


def _grey(rng: random.Random) -> Colour:
    value = rng.randint(90, 200)
    return value + rng.randint(-15, 15), value + rng.randint(-15, 15), value + rng.randint(-15, 15)


def _make_cover(rng: random.Random, target: SceneObject) -> tuple[float, float, float, float]:
    """An upright or flat bar over 15 to 30 % of an object's drawing."""
    x, y, edge = target.place
    width = edge * rng.uniform(0.15, 0.3)
    offset = rng.uniform(0.1, 0.9) * (edge - width)
    if rng.random() < 0.5:
        return x + offset, y, x + offset + width, y + edge
    return x, y + offset, x + edge, y + offset + width


_BACKGROUND: dict[str, tuple[Colour, Colour, float]] = {
    "park": ((188, 220, 244), (146, 200, 124), 0.34),
    "kitchen": ((244, 230, 190), (206, 170, 132), 0.7),
    "sea": ((206, 232, 246), (104, 178, 206), 0.26),
    "street": ((198, 198, 208), (148, 148, 156), 0.58),
    "room": ((232, 202, 206), (190, 146, 118), 0.66),
}
"""Colour above, colour below, and height of the border between them."""


@lru_cache(maxsize=32)
def _noise(size: int) -> np.ndarray:
    """Fixed paper grain of a picture, float32 [size, size, 1], +-4 levels."""
    return np.random.default_rng(7).uniform(-4, 4, (size, size, 1)).astype(np.float32)


@lru_cache(maxsize=64)
def _backdrop(context: str, size: int) -> np.ndarray:
    """Untinted background of a context with its pattern, float32 [size, size, 3]."""
    above, below, border = _BACKGROUND[context]
    image = Image.new("RGB", (size, size), above)
    draw = ImageDraw.Draw(image)
    line = max(1, size // 80)
    draw.rectangle([0, round(border * size), size, size], fill=below)
    if context == "kitchen":
        for i in range(1, 8):
            draw.line([i * size // 8, 0, i * size // 8, border * size], fill=mix(above, (0, 0, 0), 0.1), width=line)
            if i < 6:
                draw.line([0, i * size // 8, size, i * size // 8], fill=mix(above, (0, 0, 0), 0.1), width=line)
    elif context == "street":
        for i, height in enumerate((0.2, 0.34, 0.1, 0.28, 0.16)):
            box = [i * size // 5, round(height * size), (i + 1) * size // 5 - line, round(border * size) - 1]
            draw.rectangle(box, fill=mix(above, (60, 60, 90), 0.12 + 0.05 * (i % 2)))
        for i in range(4):
            lane = round(0.8 * size)
            draw.rectangle([i * size // 4, lane, i * size // 4 + size // 8, lane + 2 * line], fill=(235, 235, 225))
    elif context == "sea":
        for i, height in enumerate((0.36, 0.5, 0.66, 0.84)):
            for j in range(5):
                left = round(((j + 0.5 * (i % 2)) / 5) * size)
                wave = [left, height * size, left + size // 7, height * size + size // 14]
                draw.arc(wave, 180, 360, fill=(196, 228, 238), width=line)
    elif context == "room":
        for i in range(0, 10, 2):
            draw.rectangle(
                [i * size // 10, 0, (i + 1) * size // 10 - 1, round(border * size) - 1],
                fill=mix(above, (255,) * 3, 0.3),
            )
    else:
        for i in range(14):
            x, y = (i * 37 % 80) / 80 * size, (0.4 + 0.56 * (i * 23 % 40) / 40) * size
            draw.line([x, y, x + size // 40, y - size // 26], fill=mix(below, (0, 70, 0), 0.3), width=line)
    return np.asarray(image, np.float32)


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw a scene as an RGB picture of `size` x `size` pixels (at least 40)."""
    if size < 40:
        raise ValueError(f"scenes need at least 40 pixels a side to be readable, got {size}")
    base = _backdrop(scene.context, size) + _noise(size) + np.asarray(scene.tint, np.float32)
    image = Image.fromarray(base.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for x, y, radius, colour in scene.clutter:
        draw.ellipse([(x - radius) * size, (y - radius) * size, (x + radius) * size, (y + radius) * size], fill=colour)
    for item in scene.objects:
        left, top, edge = item.frame(size)
        drawing = sprite(item.kind, item.colour, edge, item.mirrored)
        image.paste(drawing, (left, top), drawing)
    if scene.cover is not None:
        draw.rectangle([round(v * size) for v in scene.cover], fill=mix(_BACKGROUND[scene.context][1], (90,) * 3, 0.4))
    return image.filter(ImageFilter.GaussianBlur(scene.blur * size)) if scene.blur else image


def patch_owners(scene: Scene) -> np.ndarray:
    """Tell which object each vision patch shows.

    Returns:
        int64 [10, 10]: index into `scene.objects` of the object that covers most of the patch, -1 where none covers
        at least an eighth of it.
    """
    patches = IMAGE_SIZE // PATCH_SIZE
    owner = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
    for index, item in enumerate(scene.objects, start=1):
        left, top, edge = item.frame()
        mask = (
            sprite(item.kind, item.colour, edge, item.mirrored).getchannel("A").point(lambda a: 255 if a > 96 else 0)
        )
        owner.paste(index, (left, top), mask)
    if scene.cover is not None:
        ImageDraw.Draw(owner).rectangle([round(v * IMAGE_SIZE) for v in scene.cover], fill=0)
    pixels = (
        np.asarray(owner).reshape(patches, PATCH_SIZE, patches, PATCH_SIZE).swapaxes(1, 2).reshape(-1, PATCH_SIZE**2)
    )
    counts = np.stack([(pixels == i).sum(1) for i in range(1, len(scene.objects) + 1)], axis=1)
    best = counts.argmax(1)
    best[counts.max(1) < PATCH_SIZE**2 // 8] = -1
    return best.reshape(patches, patches)
