"""DeepSeek-VL and Janus: one square grid per picture, which is resized first and padded to a square afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..geometry import ImageGeometry
from ..tokens import Layout
from .base import beside
from .llava import Llava


class DeepseekVL(Llava):
    """``DeepseekVL(Hybrid)ForConditionalGeneration``."""

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """Longest edge to the canvas, the shorter one rounded to whole pixels, margins on both sides."""
        canvas = int(image_processor.size["height"])
        longest, smallest = max(size), int(image_processor.min_size)
        width, height = (max(round(length * canvas / longest), smallest) for length in size)
        scale = (width / size[0], height / size[1])
        if not image_processor.do_pad:
            return [ImageGeometry(size, (width, height), grid, scale, (0.0, 0.0)) for grid in layout.views]
        side = max(width, height)
        offset = (float((side - width) // 2), float((side - height) // 2))
        return [ImageGeometry(size, (side, side), grid, scale, offset) for grid in layout.views]


class Janus(DeepseekVL):
    """``JanusForConditionalGeneration``; its ``generate`` does not pass logits processors on."""

    refused: ClassVar[Mapping[str, str]] = {
        "decode": "its generate() drops logits processors, so a second branch cannot take part; use an edit or a "
        "pruning method"
    }

    def framing(self, input_ids: Tensor) -> Tensor:
        """The start and the end token of every picture."""
        return beside(input_ids == self.placeholders["image"])
