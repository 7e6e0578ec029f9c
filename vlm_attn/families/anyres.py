"""LLaVA-NeXT and its kin: a base view, then the tiles of the best canvas, unpadded, with a token behind every row.

The model itself is asked how it packs its tiles: its own function lays out coordinates instead of features.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

from ..geometry import ImageGeometry, fixed_canvas, tile_of
from ..tokens import Layout
from .base import Family, Media


class LlavaNext(Family):
    """``LlavaNext(Video)ForConditionalGeneration``: the whole picture, then its canvas of tiles as one view.

    The frames of a video are pooled and have no row ends.
    """

    def layouts(self, media: Media) -> list[Layout]:
        """Base view, canvas and row ends of every picture; frames of every video."""
        if media.kind == "video":
            frames = _frames(media)
            return [self.video_layout(length, frames) for length in media.lengths]
        sizes = media.arguments.get("image_sizes")
        if sizes is None:
            return super().layouts(media)  # finished features: only their number is known
        return [self.picture(n, size) for n, size in zip(media.lengths, torch.as_tensor(sizes).cpu(), strict=True)]

    def picture(self, length: int, size: Tensor) -> Layout:
        """Layout of a picture of ``size`` (height, width) that became ``length`` tokens.

        Raises:
            ValueError: the model would make another number of tokens of such a picture.
        """
        side = self.side()
        whole = Layout.of_views((side, side))
        if length == side * side + 1:  # not cut into tiles
            return whole.joined(Layout.without_grid(1))
        rows, columns = self._tiles(size.tolist())
        marked = torch.zeros(rows * columns + 1, side * side, 1)
        packed = self.pack(marked, size[None], torch.ones(1))[side * side :, 0]
        if length != side * side + len(packed):
            raise ValueError(
                f"{self._who()}: a picture of {size[1]} x {size[0]} gave {length} visual tokens instead of "
                f"{side * side + len(packed)}: build pixels and image_sizes with the model's own processor"
            )
        height = int(packed.sum())
        canvas = Layout.of_views((height, len(packed) // height - 1))
        return whole.joined(with_row_ends(canvas))

    def pack(self, features: Tensor, size: Tensor, newline: Tensor) -> Tensor:
        """What the model makes of the features ``[tiles, n, D]`` of one picture."""
        packed, _ = self.base.pack_image_features([features], size, "default", image_newline=newline)  # type: ignore[operator]
        return packed[0]

    def video_layout(self, length: int, frames: int) -> Layout:
        """Pooled frames, one after the other."""
        side = math.isqrt(length // max(frames, 1))
        if frames * side * side != length:
            return replace(Layout.without_grid(length), video=True)
        return Layout.of_views(*[(side, side)] * frames, video=True)

    def side(self) -> int:
        """Patches along the side of a tile."""
        vision = self.model.config.vision_config
        return int(vision.image_size) // int(vision.patch_size)

    def _tiles(self, size: list[int]) -> tuple[int, int]:
        """(rows, columns) of tiles for a picture of ``size`` (height, width)."""
        config = self.model.config
        height, width = select_best_resolution(tuple(size), config.image_grid_pinpoints)
        return height // config.vision_config.image_size, width // config.vision_config.image_size

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """The base view is stretched; the canvas is resized, centred on whole tiles and unpadded.

        For a video, ``image_processor`` is the video processor. A tile whose side is no multiple of the patch (384
        pixels in patches of 14) loses its last pixels; its cells are taken to cover the whole tile, which is off by
        at most that margin.
        """
        if layout.video:
            return [fixed_canvas(image_processor, size, grid) for grid in layout.views]
        whole, *canvas = layout.views
        return [tile_of(size, whole), *(self._canvas(size, grid) for grid in canvas)]

    def _canvas(self, size: tuple[int, int], grid: tuple[int, int]) -> ImageGeometry:
        """The unpadded canvas; ``grid`` has fewer cells than it where the model shrinks it (OneVision)."""
        width, height = size
        cell = self.model.config.vision_config.image_size / self.side()  # pixels
        rows, columns = (tiles * self.side() for tiles in self._tiles([height, width]))
        unpad: Any = vars(sys.modules[type(self.base).__module__])["unpad_image"]
        kept_rows, kept_columns = unpad(torch.empty(1, rows, columns), [height, width]).shape[1:]
        target = (round(rows * cell), round(columns * cell))
        resized = get_patch_output_size(np.empty((0, height, width)), target, "channels_first")

        def offset(target: int, resized: int, cells: int, kept: int) -> float:
            return (target - resized) // 2 - (cells - kept) // 2 * cell

        return ImageGeometry(
            size,
            (round(kept_columns * cell), round(kept_rows * cell)),
            grid,
            (resized[1] / width, resized[0] / height),
            (offset(target[1], resized[1], columns, kept_columns), offset(target[0], resized[0], rows, kept_rows)),
        )


class LlavaOneVision(LlavaNext):
    """``LlavaOnevisionForConditionalGeneration``: large canvases are shrunk, several pictures have no tiles."""

    def pack(self, features: Tensor, size: Tensor, newline: Tensor) -> Tensor:
        """As the model packs, with its limit on the canvas."""
        packed, _ = self.base.pack_image_features(  # type: ignore[operator]
            [features], size, newline, vision_aspect_ratio=self.model.config.vision_aspect_ratio
        )
        return packed[0]

    def video_layout(self, length: int, frames: int) -> Layout:
        """Pooled frames and one closing token, which older models add behind the features."""
        pooled = length - 1 if self.takes_features else length
        return super().video_layout(pooled, frames).joined(Layout.without_grid(1))

    def geometry(self, image_processor: Any, size: tuple[int, int], layout: Layout) -> list[ImageGeometry]:
        """As LLaVA-NeXT; one of several pictures is padded to a square."""
        if layout.video or len(layout.views) > 1:
            return super().geometry(image_processor, size, layout)
        ((rows, columns),) = layout.views
        width, height = size
        longest = max(size)
        offset = (float((longest - width) // 2), float((longest - height) // 2))
        return [ImageGeometry(size, (longest, longest), (rows, columns), (1.0, 1.0), offset)]


def with_row_ends(canvas: Layout) -> Layout:
    """The layout of one view with a token that shows no pixels behind every row."""
    ((rows, columns),) = canvas.views
    view = torch.full((rows, columns + 1), -1)
    cell = torch.full((rows, columns + 1, 2), -1)
    view[:, :columns] = canvas.view.view(rows, columns)
    cell[:, :columns] = canvas.cell.view(rows, columns, 2)
    return Layout(canvas.views, view.flatten(), cell.flatten(0, 1))


def _frames(media: Media) -> int:
    """Frames of each video, 0 where only finished features are known."""
    pixels = media.arguments.get("pixel_values_videos")
    return 0 if pixels is None else int(pixels.shape[1])
