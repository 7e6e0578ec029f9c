"""Pictures cut into square tiles of equal token count, each tile a view, the whole picture beside them.

Which tiles make up a picture stands in the prompt alone: between the runs of placeholders are tokens whose meaning
only the tokenizer knows. Their pattern is enough: a run of several tiles is a picture (InternVL), every picture starts
with the same token (Command A Vision), or the token before every whole-picture view is the same (Idefics3).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..geometry import ImageGeometry
from ..tokens import Grid, Layout
from .base import Family, Media

Run = tuple[int, int]


class Tiled(Family):
    """Families with one run of placeholders per picture: ``InternVL``, ``GotOcr2``.

    Frames of a video stand in the prompt as pictures and are pictures here.

    Class attributes:
        lead, trail: tokens that frame a picture before its first and behind its last placeholder.
    """

    lead: ClassVar[int] = 1
    trail: ClassVar[int] = 1

    def layouts(self, media: Media) -> list[Layout]:
        """A view per tile."""
        if media.prompt is None:
            return super().layouts(media)
        return [self.picture(runs, media) for _, runs in self.spans(media.prompt)]

    def picture(self, runs: list[Run], media: Media) -> Layout:
        """Layout of the picture that fills ``runs``."""
        return _views(sum(end - start for start, end in runs), media.lengths[0])

    def spans(self, prompt: Tensor) -> Iterator[tuple[int, list[Run]]]:
        """(row, its runs) of every picture of the prompts ``[B, N]``."""
        visual = (prompt == self.placeholders["image"]).int()
        for number, row in enumerate(prompt.tolist()):
            border = visual.new_zeros(1)
            edges = torch.diff(visual[number], prepend=border, append=border).nonzero()[:, 0].tolist()
            runs = list(zip(edges[::2], edges[1::2], strict=True))
            for group in self.grouped(row, runs):
                yield number, group

    def grouped(self, row: list[int], runs: list[Run]) -> list[list[Run]]:
        """The runs of one prompt, picture by picture."""
        return [[run] for run in runs]

    def framing(self, input_ids: Tensor) -> Tensor:
        """Tokens around a picture and between its tiles."""
        frame = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, runs in self.spans(input_ids):
            frame[row, max(runs[0][0] - self.lead, 0) : runs[-1][1] + self.trail] = True
        return frame & (input_ids != self.placeholders["image"])

    # --------------------------------------------------------------------------------------------------- pixels

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """Tiles of the stretched picture row by row, and the stretched picture itself."""
        if len(layout.views) < 2:
            return [self.stretched(size, grid) for grid in layout.views]
        rows, columns = self.tiles(image_processor, size)
        if rows * columns + 1 != len(layout.views):
            raise ValueError(
                f"the picture has {len(layout.views) - 1} tiles, but its processor cuts {size[0]} x {size[1]} pixels "
                f"into {rows} x {columns}: set the tiling on the image processor itself instead of on each call"
            )
        *cut, whole = layout.views
        places = [(at // columns, at % columns) for at in range(len(cut))]
        boxes = [self.stretched(size, grid, (rows, columns), at) for grid, at in zip(cut, places, strict=True)]
        return [*boxes, self.stretched(size, whole)]

    def tiles(self, image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tiles for a picture of ``size`` (width, height)."""
        choose: Any = vars(sys.modules[type(image_processor).__module__])["get_optimal_tiled_canvas"]
        tile = (image_processor.size["height"], image_processor.size["width"])
        columns, rows = choose(size[::-1], tile, image_processor.min_patches, image_processor.max_patches)
        return int(rows), int(columns)

    def stretched(
        self, size: tuple[int, int], grid: Grid, tiles: tuple[int, int] = (1, 1), at: tuple[int, int] = (0, 0)
    ) -> ImageGeometry:
        """Tile ``at`` of a picture stretched over ``tiles`` (rows, columns); lengths count in cells.

        A tile may be wider than its cells: patches of 14 leave a margin of a tile of 384 pixels unseen.
        """
        span = self.span(grid[0])
        scale = (tiles[1] * span / size[0], tiles[0] * span / size[1])
        return ImageGeometry(size, grid[::-1], grid, scale, (-at[1] * span, -at[0] * span))

    def span(self, side: int) -> float:
        """Cells along a whole tile of which ``side`` are tokens."""
        vision = self.model.config.vision_config
        pixels, patch = (_first(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
        if not pixels or not patch or pixels // patch < side:
            return float(side)
        return pixels / patch / (pixels // patch // side)


class Tagged(Tiled):
    """Families with a run of placeholders per tile."""

    def picture(self, runs: list[Run], media: Media) -> Layout:
        """A view per run."""
        start, end = runs[0]
        return _views(sum(end - start for start, end in runs), end - start)


class Cohere2Vision(Tagged):
    """``Cohere2VisionForConditionalGeneration``: a line break behind every tile, the same token before the first."""

    trail = 2

    def grouped(self, row: list[int], runs: list[Run]) -> list[list[Run]]:
        """A picture starts where the token before the prompt's first run stands again."""
        out: list[list[Run]] = []
        for run in runs:
            if row[run[0] - 1] == row[runs[0][0] - 1]:
                out.append([])
            out[-1].append(run)
        return out


class AyaVision(Tagged):
    """``AyaVisionForConditionalGeneration``: a tag before every tile; the whole picture comes last, with its own."""

    lead = 2

    def grouped(self, row: list[int], runs: list[Run]) -> list[list[Run]]:
        """A picture ends with the tag of the prompt's last run."""
        out: list[list[Run]] = [[]]
        for run in runs:
            out[-1].append(run)
            if row[run[0] - 1] == row[runs[-1][0] - 1]:
                out.append([])
        return out[:-1]


class Idefics3(AyaVision):
    """``Idefics3ForConditionalGeneration``, ``SmolVLMForConditionalGeneration``: as Aya Vision, other tiles."""

    def tiles(self, image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """As many tiles as the resized picture holds."""
        _, rows, columns = image_processor.get_number_of_image_patches(size[1], size[0])
        return int(rows), int(columns)


class PerceptionLM(Tiled):
    """``PerceptionLMForConditionalGeneration``: the whole picture first, as many tiles in every picture of a batch."""

    lead = trail = 0

    def layouts(self, media: Media) -> list[Layout]:
        """As many views as the pixels have tiles.

        Raises:
            UnsupportedError: the prompt holds a video.
        """
        if media.prompt is not None and self.placeholders["video"] in media.prompt:
            raise UnsupportedError(
                f"{self._who()} sends videos through its picture function, where they cannot be told from pictures: "
                "pass the frames as pictures"
            )
        pixels = media.arguments.get("pixel_values")
        if pixels is None:
            return super().layouts(media)
        tile, count = media.lengths[0], int(pixels.shape[1])
        return [_views(tile * count, tile) for _ in range(len(media.lengths) // count)]

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """As the base class, with the whole picture in front."""
        turned = replace(layout, views=(*layout.views[1:], *layout.views[:1]))
        *cut, whole = super().geometry(image_processor, size, turned)
        return [whole, *cut]

    def tiles(self, image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """The canvas that holds the picture best, else the one of the closest shape."""
        width, height = size
        tile = image_processor.tile_size
        columns, rows = image_processor._fit_image_to_canvas(
            width, height, tile
        ) or image_processor._find_closest_aspect_ratio(width, height, tile)
        return int(rows), int(columns)


class Idefics2(Family):
    """``Idefics2ForConditionalGeneration``: latents of a resampler, which have no place in the picture.

    A picture that the processor splits counts as five.
    """

    def layouts(self, media: Media) -> list[Layout]:
        """One set of latents per picture."""
        latents = int(self.model.config.perceiver_config.resampler_n_latents)
        return [Layout.without_grid(latents) for _ in range(sum(media.lengths) // latents)]

    def framing(self, input_ids: Tensor) -> Tensor:
        """The token on either side of a picture."""
        picture = input_ids == self.placeholders["image"]
        beside = picture.roll(1, dims=1) | picture.roll(-1, dims=1)
        return beside & ~picture


def _views(length: int, tile: int) -> Layout:
    """``length`` tokens in square tiles of ``tile``."""
    side = math.isqrt(tile)
    if side * side != tile or length % tile:
        return Layout.without_grid(length)
    return Layout.of_views(*[(side, side)] * (length // tile))


def _first(value: Any) -> int | None:
    return value[0] if isinstance(value, list | tuple) else value
