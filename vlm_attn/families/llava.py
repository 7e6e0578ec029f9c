"""LLaVA-1.5 and models of the same plan: one square grid of visual tokens per image, row-major, causal decoder."""

from __future__ import annotations

import functools
from dataclasses import replace

from ..errors import AttachError
from ..tokens import Layout
from .base import Media, SquareGrid


class Llava(SquareGrid):
    """A fixed-size encoder, one run of visual tokens per image; the class token may be among them."""

    def layouts(self, media: Media) -> list[Layout]:
        """The patch grid, checked against the tower."""
        side = self._side()
        strategy = getattr(self.model.config, "vision_feature_select_strategy", "default")
        expected = side * side + (strategy == "full")
        for length in media.lengths:
            if length != expected:
                raise ValueError(f"{self._who()}: a picture gave {length} visual tokens instead of {expected}")
        return super().layouts(media)

    def _side(self) -> int:
        vision = self.model.config.vision_config
        size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
        if not isinstance(size, int) or not isinstance(patch, int):
            raise AttachError(f"{self._who()}: its vision tower has no fixed square grid (image_size / patch_size)")
        return size // patch


class VideoLlava(Llava):
    """``VideoLlavaForConditionalGeneration``: every frame of a video keeps its class token."""

    def layouts(self, media: Media) -> list[Layout]:
        """The patch grid of pictures; class token and patch grid of every frame."""
        if media.kind == "image":
            return super().layouts(media)
        side = self._side()
        frame = Layout.without_grid(1).joined(Layout.of_views((side, side)))
        pixels = media.arguments.get("pixel_values_videos")
        frames = len(media.lengths) if pixels is None else int(pixels.shape[1])
        video = functools.reduce(Layout.joined, [frame] * frames)
        return [replace(video, video=True) for _ in range(len(media.lengths) // frames)]
