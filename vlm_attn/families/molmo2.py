"""Molmo2: the whole picture small, then its canvas of overlapping crops, both pooled to one grid each."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError
from ..geometry import ImageGeometry
from ..tokens import Grid, Layout
from .base import Family, Media, beside


class Molmo2(Family):
    """``Molmo2ForConditionalGeneration``: pictures and words of a prompt in one mask, pictures seeing each other."""

    joined = "every picture of a prompt sees the others already"
    structure = ("image_start_token_id", "low_res_image_start_token_id", "image_end_token_id")

    def _placeholders(self) -> dict[str, int]:
        """Videos have the same placeholder, so that one prompt cannot tell them from pictures."""
        return {"image": super()._placeholders()["image"]}

    def layouts(self, media: Media) -> list[Layout]:
        """Two views per picture: the small one and the canvas.

        Raises:
            UnsupportedError: the prompt holds a video.
        """
        if media.kind == "video":
            raise UnsupportedError(f"{self._who()}: videos are not supported; pass the frames as pictures")
        if "image_grids" not in media.arguments:
            return super().layouts(media)
        return [Layout.of_views((a, b), (c, d)) for a, b, c, d in media.arguments["image_grids"].tolist()]

    def pictures(self, media: Media, pixels: Tensor) -> list[Tensor]:
        """The crops that the pools of each picture take their patches from."""
        pools = media.arguments["image_token_pooling"].split([len(layout) for layout in self.layouts(media)])
        ends = [int(picture.max()) // pixels.shape[1] + 1 for picture in pools]
        return [pixels[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def framing(self, input_ids: Tensor) -> Tensor:
        """Start and end tokens, and the one that closes every row."""
        return super().framing(input_ids) | beside(input_ids == self.placeholders["image"])

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """Both views are stretched to whole patches, which are pooled from the middle outwards."""
        tools: Any = inspect.getmodule(type(image_processor))
        crop, patch = int(image_processor.size["height"]), int(image_processor.patch_size)
        canvas = tools.compute_crop_geometry(
            size[1], size[0], image_processor.max_crops, image_processor.overlap_margins, crop, patch
        )[2:]
        pool = image_processor.pooling_size
        sides = [(crop // patch, crop // patch), (canvas[0] // patch, canvas[1] // patch)]
        if [tuple(map(math.ceil, (r / pool[0], c / pool[1]))) for r, c in sides] != list(layout.views):
            raise ValueError(
                f"the image processor lays {size[0]} x {size[1]} pixels out as {sides} patches, but the prompt "
                f"has the grids {layout.views}: set max_crops and the sizes on the processor itself"
            )
        return [_pooled(size, grid, side, pool) for grid, side in zip(layout.views, sides, strict=True)]


def _pooled(size: tuple[int, int], grid: Grid, patches: tuple[int, int], pool: tuple[int, int]) -> ImageGeometry:
    """A grid of pools over ``patches`` (rows, columns); a pool that is not full is filled up evenly on both ends."""
    spans = [n / p for n, p in zip(patches, pool, strict=True)]
    starts = [float((cells * p - n) // 2 / p) for cells, n, p in zip(grid, patches, pool, strict=True)]
    scale = (spans[1] / size[0], spans[0] / size[1])
    return ImageGeometry(size, (grid[1], grid[0]), grid, scale, (starts[1], starts[0]))
