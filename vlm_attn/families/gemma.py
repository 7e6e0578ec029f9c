"""Gemma 3: one pooled square grid per picture, between start and end tokens."""

from __future__ import annotations

from typing import Any

from ..geometry import ImageGeometry
from ..tokens import Layout
from .base import SquareGrid


class Gemma3(SquareGrid):
    """``Gemma3ForConditionalGeneration``: patches pooled to one square grid per picture."""

    structure = ("boi_token_index", "eoi_token_index")

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """The stretched picture; pan and scan lays crops of unknown place beside it."""
        if getattr(image_processor, "do_pan_and_scan", False):
            raise ValueError(
                "pan and scan adds crops as pictures of their own: pass do_pan_and_scan=False to the processor for "
                "heatmaps and padding-aware methods"
            )
        return super().geometry(image_processor, size, layout)
