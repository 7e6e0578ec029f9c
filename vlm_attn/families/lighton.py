"""LightOnOCR: a picture keeps its shape; patches that make no whole token are dropped at its far edges."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from torch import Tensor

from ..geometry import ImageGeometry
from ..tokens import Layout
from .base import Family
from .pixtral import Mistral3


class LightOnOcr(Mistral3):
    """``LightOnOcrForConditionalGeneration``: the grid of Mistral 3 without its separators."""

    def framing(self, input_ids: Tensor) -> Tensor:
        """Nothing stands around a picture."""
        return Family.framing(self, input_ids)

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """Sides rounded up to whole patches, of which whole tokens are shown."""
        config = self.model.config
        cell = config.vision_config.patch_size * config.spatial_merge_size
        resize: Any = vars(sys.modules[type(image_processor).__module__])["get_resize_output_image_size"]
        patch = image_processor.patch_size
        height, width = resize(
            np.empty((3, size[1], size[0]), np.uint8),
            image_processor.size["longest_edge"],
            patch if isinstance(patch, int) else (patch["height"], patch["width"]),
            "channels_first",
        )
        scale = (width / size[0], height / size[1])
        return [
            ImageGeometry(size, (columns * cell, rows * cell), (rows, columns), scale, (0.0, 0.0))
            for rows, columns in layout.views
        ]
