"""LFM2-VL: tiles or the picture's own shape; convolutions between the attention layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..geometry import ImageGeometry, tile_of
from ..tokens import Grid, Layout
from .base import Family, Media, beside


class Lfm2VL(Family):
    """``Lfm2VlForConditionalGeneration``: one view per tile, the overview last."""

    hybrid = True
    output_names = ("out_proj",)
    refused: ClassVar[Mapping[str, str]] = {
        "prune": "its convolution layers read neighbouring tokens, so a token cannot leave without changing what its "
        "neighbours read; use an edit or a contrastive method"
    }

    def layouts(self, media: Media) -> list[Layout]:
        """Views that follow each other with at most one token between them are tiles of one picture."""
        if media.prompt is None or "spatial_shapes" not in media.arguments:
            return super().layouts(media)
        factor = self.model.config.downsample_factor
        grids = iter([(h // factor, w // factor) for h, w in media.arguments["spatial_shapes"].tolist()])
        pictures: list[list[Grid]] = []
        for row in media.prompt:
            slots = (row == self.placeholders["image"]).nonzero()[:, 0].tolist()
            start, last = 0, -3
            while start < len(slots) and (grid := next(grids, None)) is not None:
                if slots[start] - last > 2:
                    pictures.append([])
                pictures[-1].append(grid)
                start += math.prod(grid)
                last = slots[min(start, len(slots)) - 1]
        return [Layout.of_views(*views) for views in pictures]

    def pictures(self, media: Media, pixels: Tensor) -> list[Tensor]:
        """One entry per tile, filled up to a fixed number of patches."""
        return list(pixels.split([max(len(layout.views), 1) for layout in self.layouts(media)]))

    def framing(self, input_ids: Tensor) -> Tensor:
        """Start, end and the tags of the tiles stand next to placeholders."""
        return beside(input_ids == self.placeholders["image"])

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """Everything is stretched; the processor's own arithmetic says how many tiles lie side by side."""
        if len(layout.views) == 1:
            return [tile_of(size, layout.views[0])]
        columns, rows, *_ = image_processor._get_grid_layout(
            size[1], size[0], image_processor.min_tiles, image_processor.max_tiles, image_processor.tile_size
        )
        rest = len(layout.views) - rows * columns
        if rest not in (0, 1):
            raise ValueError(
                f"the image processor cuts {size[0]} x {size[1]} pixels into {rows} x {columns} tiles but the prompt "
                f"has {len(layout.views)} views: set min_tiles, max_tiles and tile_size on the processor itself"
            )
        tiles = [
            tile_of(size, grid, (rows, columns), divmod(n, columns))
            for n, grid in enumerate(layout.views[: rows * columns])
        ]
        return tiles + [tile_of(size, grid) for grid in layout.views[rows * columns :]]
