"""Mistral 3: a picture keeps its shape; every row of its grid ends in a separator, which is text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..geometry import ImageGeometry, tile_of
from ..tokens import Layout
from .base import Family, Media


class Mistral3(Family):
    """``Mistral3ForConditionalGeneration``: one grid per picture, of the size the processor chose for it."""

    def layouts(self, media: Media) -> list[Layout]:
        """Grids of merged patches, from the pictures' resized sizes."""
        config = self.model.config
        cell = config.vision_config.patch_size * config.spatial_merge_size
        sizes = torch.as_tensor(media.arguments["image_sizes"]) if "image_sizes" in media.arguments else None
        if sizes is None:
            return super().layouts(media)  # finished features: only their number is known
        return [Layout.of_views((height // cell, width // cell)) for height, width in sizes.tolist()]

    def framing(self, input_ids: Tensor) -> Tensor:
        """The separator behind every row of the grid, and the one that closes the picture."""
        picture = input_ids == self.placeholders["image"]
        return ~picture & picture.roll(1, dims=1)

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """The processor stretches the picture to whole cells."""
        return [tile_of(size, grid) for grid in layout.views]
