"""MiniCPM-V 4.6: the whole picture, then its slices, each in its own shape; linear attention between the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..geometry import ImageGeometry, tile_of
from ..tokens import Layout
from .base import Media
from .qwen_vl import LinearLayers
from .tiled import Cohere2Vision


class MiniCPMV(Cohere2Vision):
    """``MiniCPMV4_6ForConditionalGeneration``: the same token starts every picture, another one its slices."""

    hybrid = True
    refused: ClassVar[Mapping[str, str]] = LinearLayers.refused
    trail = 1

    def layouts(self, media: Media) -> list[Layout]:
        """The whole picture and its slices, a view each.

        Raises:
            UnsupportedError: the prompt holds a video.
        """
        if media.kind == "video":
            raise UnsupportedError(
                f"{self._who()} cuts every frame of a video into slices of its own, which is not supported: pass the "
                "frames as pictures"
            )
        sizes = media.arguments.get("target_sizes")
        if media.prompt is None or sizes is None:
            return [Layout.without_grid(length) for length in media.lengths]
        mode = media.arguments.get("downsample_mode") or self.model.config.downsample_mode
        merged = 2 if mode == "4x" else 4
        grids = iter([(rows // merged, columns // merged) for rows, columns in sizes.tolist()])
        return [Layout.of_views(*[next(grids) for _ in runs]) for _, runs in self.spans(media.prompt)]

    def pictures(self, media: Media, pixels: Tensor) -> list[Tensor]:
        """Patches lie one behind the other along the last axis."""
        patches = torch.tensor([len(lay) for lay in self.layouts(media)])
        return list(pixels.split((patches * pixels.shape[-1] // patches.sum()).tolist(), dim=-1))

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """Whole picture and slices are stretched; the processor says how many slices lie side by side."""
        whole, *cut = layout.views
        rows, columns = (0, 0)
        if cut:
            limits = image_processor.max_slice_nums, image_processor.scale_resolution
            rows, columns = image_processor.get_sliced_grid(size[::-1], *limits) or (0, 0)
        if rows * columns != len(cut):
            raise ValueError(
                f"the picture has {len(cut)} slices, but its processor cuts {size[0]} x {size[1]} pixels into "
                f"{rows} x {columns}: set the slicing on the image processor itself instead of on each call"
            )
        slices = [tile_of(size, grid, (rows, columns), divmod(at, columns)) for at, grid in enumerate(cut)]
        return [tile_of(size, whole), *slices]
