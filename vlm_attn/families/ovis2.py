"""Ovis2: an overview and tiles; indicator tokens between them close a tile's row and the picture."""

from __future__ import annotations

import inspect
import math
from typing import Any

from ..geometry import ImageGeometry, tile_of
from ..tokens import Layout
from .base import Family, Media


class Ovis2(Family):
    """``Ovis2ForConditionalGeneration``: one view per tile, the overview first."""

    structure = ("visual_indicator_token_ids",)

    def layouts(self, media: Media) -> list[Layout]:
        """As many views as fit between the start and the end token of every picture."""
        if media.prompt is None:
            return super().layouts(media)
        start, *_, end = self.model.config.visual_indicator_token_ids
        side = math.isqrt(max(media.lengths, default=1))
        pictures, count = [], 0
        for token in media.prompt.flatten().tolist():
            count = 0 if token == start else count + (token == self.placeholders["image"])
            if token == end:
                pictures.append(Layout.of_views(*[(side, side)] * (count // side**2)))
        return pictures

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """Overview and tiles are stretched; the processor's own arithmetic says how many tiles lie side by side."""
        overview, *tiles = layout.views
        boxes = [tile_of(size, overview)]
        if tiles:
            rows, columns = self._tiles(image_processor, size)
            if rows * columns != len(tiles):
                raise ValueError(
                    f"the image processor cuts {size[0]} x {size[1]} pixels into {rows} x {columns} tiles but the "
                    f"prompt has {len(tiles)}: set crop_to_patches and max_patches on the processor itself"
                )
            boxes += [tile_of(size, grid, (rows, columns), divmod(n, columns)) for n, grid in enumerate(tiles)]
        return boxes

    def _tiles(self, image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tiles; the covering search gives rows first, but the processor takes columns first."""
        tools: Any = inspect.getmodule(type(image_processor))
        height, most = int(image_processor.size["height"]), int(image_processor.max_patches)
        if image_processor.use_covering_area_grid:
            columns, rows = tools.get_min_tile_covering_grid(size[::-1], height, most)
        else:
            tile = (height, int(image_processor.size["width"]))
            columns, rows = tools.get_optimal_tiled_canvas(size[::-1], tile, int(image_processor.min_patches), most)
        return rows, columns
